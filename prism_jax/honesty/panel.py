"""The honesty panel: does the discriminator look, and at what? See docs/honesty.md.

Everything is measured on pairs that the discriminator has not learnt from: those that the warm-up
holds out, and in alignment a step's own, before they are learnt from. Names are
`honesty/{segment}_…`; a value that does not exist is absent.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from models import kinds
from models.inputs import Example
from prism_jax import configuration
from prism_jax.honesty import other_pictures, probes
from prism_jax.honesty import router as honesty_router
from prism_jax.rows import Continuation

# A probe explains an accuracy that is above a coin's when it is nearly as high, and high itself.
_EXPLAINS_WITHIN = 0.02
_EXPLAINS_FROM = 0.75
# A table of more experts is not read by anyone.
_MAX_EXPERTS_TOLD = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(configuration.Section):
    """Say when the panel is measured, and on how many pairs it asks the discriminator again."""

    every_steps: int | None  # besides the last step; None: never, at no cost
    num_pairs: int  # of responses

    def problems(self) -> list[str]:
        """See `Section`."""
        return configuration.at_least(self, 1, "every_steps", "num_pairs")

    def is_due(self, step: int, num_steps: int) -> bool:
        """Tell whether the panel is measured after this many finished steps."""
        return self.every_steps is not None and (step % self.every_steps == 0 or step == num_steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
    """Hold pairs of segments: what a teacher and a student wrote to the same prompt.

    `units` holds [teacher's, student's] for each pair, `names` which of `segments` it is, and
    `is_cut` whether a limit has cut the teacher's.
    """

    prompts: Sequence[Example]
    units: Sequence[Sequence[Continuation]]
    names: Sequence[int]
    is_cut: Sequence[bool]
    segments: tuple[str, ...]
    kinds: tuple[int, ...]  # of each segment to the model

    def of(self, name: str) -> np.ndarray:
        """Return bool[pairs]: which are of one segment."""
        return np.array(self.names, int) == self.segments.index(name)

    def at(self, chosen: np.ndarray) -> "Pairs":
        """Return the pairs where `chosen`, bool[pairs], is True."""
        places = np.flatnonzero(chosen)
        return dataclasses.replace(
            self,
            units=[self.units[n] for n in places],
            names=[self.names[n] for n in places],
            is_cut=[self.is_cut[n] for n in places],
        )

    def first(self, num_responses: int) -> np.ndarray:
        """Return bool[pairs]: those of so many responses, from as many prompts as can be."""
        chosen = np.zeros(len(self.units), bool)
        for name in self.segments:
            seen: collections.Counter[int] = collections.Counter()
            rounds = []  # the first response to every prompt, then the second, …
            for place in np.flatnonzero(self.of(name)):
                prompt = self.units[place][0].prompt
                rounds.append((seen[prompt], place))
                seen[prompt] += 1
            chosen[[place for _, place in sorted(rounds)[:num_responses]]] = True
        return chosen

    def probed(self) -> probes.Pairs:
        """Return what the probes see."""
        return probes.Pairs.of(
            [unit[0].prompt for unit in self.units],
            [unit[0].tokens for unit in self.units],
            [unit[1].tokens for unit in self.units],
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge:
    """Hold the discriminator as the panel asks it, and what is known about it."""

    score: Callable[[Pairs], np.ndarray]  # float[pairs, 2], teacher's and student's
    count: Callable[[Pairs], np.ndarray] | None  # float[L, K, E] router's choices; None: dense
    sees_images: bool
    keeps_apart: bool  # the kind of a segment changes its score
    spatial_merge_size: int


def measure(
    pairs: Pairs,
    judge: Judge,
    *,
    known: np.ndarray | None,
    fitted: Mapping[str, probes.Pairs] | None,
    num_pairs: int,
) -> dict[str, float]:
    """Return the panel.

    Args:
      known: float[pairs, 2], the scores of all pairs; None asks for those of the first
        `num_pairs`, and leaves the others out.
      fitted: by segment, what the probes are fitted on; None fits them on one half of the prompts
        for the other.
      num_pairs: responses whose pairs are scored again with a change.
    """
    is_few = pairs.first(num_pairs)
    few = pairs.at(is_few)
    if not few.units:
        return {}
    if known is None:
        pairs, known = few, judge.score(few)
        is_few = np.ones(len(few.units), bool)
    told = {"honesty/num_pairs": len(pairs.units) / len(pairs.segments)}
    gaps = known[:, 0] - known[:, 1]
    for name in pairs.segments:
        of_name = pairs.of(name)
        if of_name.any():
            told |= _of_segment(pairs.at(of_name), gaps[of_name], fitted)
    told |= _against_the_other(pairs, known)
    told |= _with_other_pictures(few, judge, known[is_few])
    told |= _swapped(few, judge, known[is_few])
    if judge.count is not None:
        told |= _of_router(judge.count(few), few)
    return told


def warnings(told: Mapping[str, float], segments: Sequence[str]) -> list[str]:
    """Return a line for each segment whose accuracy a probe explains alone."""
    lines = []
    for name in segments:
        if told.get(f"honesty/{name}_probe_explains") != 1:
            continue
        found = {
            probe: told[f"honesty/{name}_{probe}_probe_accuracy"]
            for probe in probes.PROBES
            if f"honesty/{name}_{probe}_probe_accuracy" in told
        }
        best = max(found, key=lambda probe: found[probe])
        lines.append(
            f"WARNING: {name}: the {best.replace('_', ' ')} alone tells teacher from student in "
            f"{100 * found[best]:.0f} % of pairs, the discriminator in "
            f"{100 * told[f'honesty/{name}_pair_accuracy']:.0f} %: it may look at nothing else"
        )
    return lines


def explains(probe_accuracy: float, accuracy: float) -> bool:
    """Tell whether a probe's accuracy alone explains the discriminator's."""
    has_learnt = accuracy > 0.5
    is_near = probe_accuracy >= accuracy - _EXPLAINS_WITHIN
    return has_learnt and is_near and probe_accuracy >= _EXPLAINS_FROM


def _of_segment(
    pairs: Pairs, gaps: np.ndarray, fitted: Mapping[str, probes.Pairs] | None
) -> dict[str, float]:
    """Return the accuracies of the discriminator and of the probes on one segment's pairs."""
    name = pairs.segments[pairs.names[0]]
    right = probes.accuracy(gaps)
    told = {
        f"honesty/{name}_pair_accuracy": right,
        f"honesty/{name}_teacher_cut_fraction": float(np.mean(pairs.is_cut)),
    }
    seen, found = pairs.probed(), []
    for probe, fit in probes.PROBES.items():
        if fitted is None:
            value = probes.across_prompts(fit, seen)
        else:
            value = probes.accuracy(fit(fitted[name], seen))
        if value is not None:
            told[f"honesty/{name}_{probe}_probe_accuracy"] = value
            found.append(value)
    if found:
        told[f"honesty/{name}_probe_explains"] = float(explains(max(found), right))
    return told


def _against_the_other(pairs: Pairs, scores: np.ndarray) -> dict[str, float]:
    """Return how often a teacher's caption is above the student's cot, and its cot above a caption.

    A judge of who wrote a segment says so in both; one that scores captions and cots at different
    heights, in one of them alone. Nothing is scored anew.
    """
    if not {"caption", "cot"} <= set(pairs.segments):
        return {}
    # The segments of responses stand in one order under every name.
    captions, cots = (scores[pairs.of(name)] for name in ("caption", "cot"))
    if not len(captions) or len(captions) != len(cots):
        return {}
    return {
        "honesty/caption_against_cot_pair_accuracy": probes.accuracy(captions[:, 0] - cots[:, 1]),
        "honesty/cot_against_caption_pair_accuracy": probes.accuracy(cots[:, 0] - captions[:, 1]),
    }


def _with_other_pictures(few: Pairs, judge: Judge, scores: np.ndarray) -> dict[str, float]:
    """Return what other pictures change in the scores of the segment that describes them."""
    name = few.segments[0]  # the caption where there is one
    chosen = few.of(name)
    if judge.sees_images:
        chosen &= np.array([bool(few.prompts[unit[0].prompt].grids) for unit in few.units])
    if not chosen.any():
        return {}
    pairs, before = few.at(chosen), scores[chosen]
    told = {f"honesty/{name}_score_std": float(np.std(before))}
    used = sorted({unit[0].prompt for unit in pairs.units})
    for change in other_pictures.CHANGES:
        if change == "shuffled" and len(used) < 2:
            continue
        after = before  # where pictures are not read at all
        if judge.sees_images:
            others = other_pictures.changed(
                [few.prompts[n] for n in used], change, spatial_merge_size=judge.spatial_merge_size
            )
            prompts = list(few.prompts)
            for n, other in zip(used, others, strict=True):
                prompts[n] = other
            after = judge.score(dataclasses.replace(pairs, prompts=prompts))
        told |= _changes(f"{name}_{change}_image", before, after)
    return told


def _swapped(few: Pairs, judge: Judge, scores: np.ndarray) -> dict[str, float]:
    """Return what changes when captions are scored as cots and cots as captions.

    Nothing is returned where the discriminator is not told the kind: 0 would be no measurement.
    """
    other = {kinds.CAPTION: kinds.COT, kinds.COT: kinds.CAPTION}
    if not judge.keeps_apart or not set(other) <= set(few.kinds):
        return {}
    swapped = tuple(other.get(kind, kind) for kind in few.kinds)
    after = judge.score(dataclasses.replace(few, kinds=swapped))
    told = {}
    for name, kind in zip(few.segments, few.kinds, strict=True):
        of_name = few.of(name)
        if kind in other and of_name.any():
            told |= _changes(f"{name}_swapped", scores[of_name], after[of_name])
    return told


def _changes(what: str, before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    return {
        f"honesty/{what}_change": float(np.mean(np.abs(after - before))),
        f"honesty/{what}_pair_accuracy": probes.accuracy(after[:, 0] - after[:, 1]),
    }


def _of_router(choices: np.ndarray, pairs: Pairs) -> dict[str, float]:
    """Return how captions and cots use the experts."""
    parts = {kind: name for name, kind in zip(pairs.segments, pairs.kinds, strict=True)}
    told = {}
    share = honesty_router.loads(choices).mean(0)  # [K, E]
    if choices.shape[-1] <= _MAX_EXPERTS_TOLD:
        for kind, name in parts.items():
            for expert, value in enumerate(share[kind]):
                if np.isfinite(value):
                    told[f"honesty/{name}_expert_{expert}_load"] = float(value)
    if {kinds.CAPTION, kinds.COT} <= set(parts):
        # A whole response is no third part of the question.
        bits = honesty_router.information_bits(choices[:, [kinds.CAPTION, kinds.COT]])
        told["honesty/router_information_bits_mean"] = float(bits.mean())
        told["honesty/router_information_bits_max"] = float(bits.max())
    return told
