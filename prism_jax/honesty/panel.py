"""The honesty panel: does the discriminator look, and at what? See docs/honesty.md.

Everything is measured on pairs that the discriminator has not learned from: the held-out pairs of
the warm-up, and in alignment the pairs of a step, before its update. Names are
`honesty/{segment}_…`; a value that does not exist is absent.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from models import kinds
from models.inputs import Example
from prism_jax import configuration
from prism_jax.honesty import other_pictures, probes, strata
from prism_jax.honesty import router as honesty_router
from prism_jax.rows import Continuation

# A probe explains an accuracy that is above a coin's when it is nearly as high, and high itself.
_EXPLAINS_WITHIN = 0.02
_EXPLAINS_FROM = 0.75
# Nobody reads a table of more experts.
_MAX_EXPERTS_LOGGED = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(configuration.Section):
    """The steps after which the panel is measured, and the pairs that it scores again."""

    every_steps: int | None  # besides the last step; None: never, at no cost
    num_pairs: int  # of responses

    def problems(self) -> list[str]:
        """See `Section`."""
        return configuration.at_least(self, 1, "every_steps", "num_pairs")

    def is_due(self, step: int, num_steps: int) -> bool:
        """Return whether the panel is measured after the step of this number."""
        return self.every_steps is not None and (step % self.every_steps == 0 or step == num_steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pairs of segments, a teacher's and a student's to the same prompt.

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
        """Return bool[pairs], True for the pairs of this segment."""
        return np.array(self.names, int) == self.segments.index(name)

    def at(self, mask: np.ndarray) -> "Pairs":
        """Return the pairs where `mask`, bool[pairs], is True."""
        places = np.flatnonzero(mask)
        return dataclasses.replace(
            self,
            units=[self.units[n] for n in places],
            names=[self.names[n] for n in places],
            is_cut=[self.is_cut[n] for n in places],
        )

    def first(self, num_responses: int) -> np.ndarray:
        """Return bool[pairs], True for `num_responses` responses from most prompts."""
        mask = np.zeros(len(self.units), bool)
        for name in self.segments:
            seen: collections.Counter[int] = collections.Counter()
            rounds = []  # the first response to every prompt, then the second, …
            for place in np.flatnonzero(self.of(name)):
                prompt = self.units[place][0].prompt
                rounds.append((seen[prompt], place))
                seen[prompt] += 1
            mask[[place for _, place in sorted(rounds)[:num_responses]]] = True
        return mask

    def probed(self) -> probes.Pairs:
        """Return the pairs in the form of the probes."""
        return probes.Pairs.of(
            [unit[0].prompt for unit in self.units],
            [unit[0].tokens for unit in self.units],
            [unit[1].tokens for unit in self.units],
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Discriminator:
    """The discriminator in the panel's form, with the properties that decide the measurements."""

    score: Callable[[Pairs], np.ndarray]  # float[pairs, 2], teacher's and student's
    count: Callable[[Pairs], np.ndarray] | None  # float[L, A, E] router's choices; None: dense
    sees_images: bool
    keeps_apart: bool  # the kind of a segment changes its score
    spatial_merge_size: int


def measure(
    pairs: Pairs,
    discriminator: Discriminator,
    *,
    known: np.ndarray | None,
    fitted: Mapping[str, probes.Pairs] | None,
    num_pairs: int,
) -> dict[str, float]:
    """Return the panel.

    Args:
      known: float[pairs, 2], the scores of all pairs; None scores the first `num_pairs` and leaves
        the others out.
      fitted: by segment, the pairs on which probes are fitted; None fits them on one half of the
        prompts for the other.
      num_pairs: responses whose pairs are scored again with a change.
    """
    is_few = pairs.first(num_pairs)
    few = pairs.at(is_few)
    if not few.units:
        return {}
    if known is None:
        pairs, known = few, discriminator.score(few)
        is_few = np.ones(len(few.units), bool)
    logged = {"honesty/num_pairs": len(pairs.units) / len(pairs.segments)}
    gaps = known[:, 0] - known[:, 1]
    for name in pairs.segments:
        of_name = pairs.of(name)
        if of_name.any():
            logged |= _of_segment(pairs.at(of_name), gaps[of_name], fitted)
    logged |= _against_the_other(pairs, known)
    logged |= _with_other_pictures(few, discriminator, known[is_few])
    logged |= _swapped(few, discriminator, known[is_few])
    if discriminator.count is not None:
        logged |= _of_router(discriminator.count(few), few)
    return logged


def warnings(panel: Mapping[str, float], segments: Sequence[str]) -> list[str]:
    """Return a warning for each segment whose accuracy a probe explains alone."""
    lines = []
    for name in segments:
        if panel.get(f"honesty/{name}_probe_explains") != 1:
            continue
        accuracies = {
            probe: panel[f"honesty/{name}_{probe}_probe_accuracy"]
            for probe in probes.PROBES
            if f"honesty/{name}_{probe}_probe_accuracy" in panel
        }
        best = max(accuracies, key=lambda probe: accuracies[probe])
        lines.append(
            f"WARNING: {name}: the {best.replace('_', ' ')} alone tells teacher from student in "
            f"{100 * accuracies[best]:.0f} % of pairs, the discriminator in "
            f"{100 * panel[f'honesty/{name}_pair_accuracy']:.0f} %: it may look at nothing else"
        )
    return lines


def explains(probe_accuracy: float, accuracy: float) -> bool:
    """Return whether a probe's accuracy alone explains the discriminator's."""
    has_learned = accuracy > 0.5
    is_near = probe_accuracy >= accuracy - _EXPLAINS_WITHIN
    return has_learned and is_near and probe_accuracy >= _EXPLAINS_FROM


def _of_segment(
    pairs: Pairs, gaps: np.ndarray, fitted: Mapping[str, probes.Pairs] | None
) -> dict[str, float]:
    """Return the accuracies of the discriminator and of the probes on one segment's pairs."""
    name = pairs.segments[pairs.names[0]]
    right = probes.accuracy(gaps)
    logged = {
        f"honesty/{name}_pair_accuracy": right,
        f"honesty/{name}_teacher_cut_fraction": float(np.mean(pairs.is_cut)),
    }
    probed, accuracies = pairs.probed(), []
    by_length = strata.measure(probed, gaps)
    logged |= {f"honesty/{name}_{key}": value for key, value in by_length.items()}
    for probe, fit in probes.PROBES.items():
        if fitted is None:
            value = probes.across_prompts(fit, probed)
        else:
            value = probes.accuracy(fit(fitted[name], probed))
        if value is not None:
            logged[f"honesty/{name}_{probe}_probe_accuracy"] = value
            accuracies.append(value)
    if accuracies:
        logged[f"honesty/{name}_probe_explains"] = float(explains(max(accuracies), right))
    return logged


def _against_the_other(pairs: Pairs, scores: np.ndarray) -> dict[str, float]:
    """Return the accuracies of captions against cots, and of cots against captions.

    A discriminator that knows who wrote a segment is right in both. One that scores captions and
    cots at different heights is right in one of them. Nothing is scored again.
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


def _with_other_pictures(
    few: Pairs, discriminator: Discriminator, scores: np.ndarray
) -> dict[str, float]:
    """Return the effect of other pictures on the scores of the segment that describes them."""
    name = few.segments[0]  # the caption where there is one
    mask = few.of(name)
    if discriminator.sees_images:
        mask &= np.array([bool(few.prompts[unit[0].prompt].grids) for unit in few.units])
    if not mask.any():
        return {}
    pairs, before = few.at(mask), scores[mask]
    logged = {f"honesty/{name}_score_std": float(np.std(before))}
    used = sorted({unit[0].prompt for unit in pairs.units})
    for change in other_pictures.CHANGES:
        if change == "shuffled" and len(used) < 2:
            continue
        after = before  # where pictures are not read at all
        if discriminator.sees_images:
            others = other_pictures.changed(
                [few.prompts[n] for n in used],
                change,
                spatial_merge_size=discriminator.spatial_merge_size,
            )
            prompts = list(few.prompts)
            for n, other in zip(used, others, strict=True):
                prompts[n] = other
            after = discriminator.score(dataclasses.replace(pairs, prompts=prompts))
        logged |= _changes(f"{name}_{change}_image", before, after)
    return logged


def _swapped(few: Pairs, discriminator: Discriminator, scores: np.ndarray) -> dict[str, float]:
    """Return the effect of scoring captions as cots and cots as captions.

    Nothing is returned where the discriminator does not see the kind: 0 would not be a measurement.
    """
    other = {kinds.CAPTION: kinds.COT, kinds.COT: kinds.CAPTION}
    if not discriminator.keeps_apart or not set(other) <= set(few.kinds):
        return {}
    swapped = tuple(other.get(kind, kind) for kind in few.kinds)
    after = discriminator.score(dataclasses.replace(few, kinds=swapped))
    logged = {}
    for name, kind in zip(few.segments, few.kinds, strict=True):
        of_name = few.of(name)
        if kind in other and of_name.any():
            logged |= _changes(f"{name}_swapped", scores[of_name], after[of_name])
    return logged


def _changes(name: str, before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    return {
        f"honesty/{name}_change": float(np.mean(np.abs(after - before))),
        f"honesty/{name}_pair_accuracy": probes.accuracy(after[:, 0] - after[:, 1]),
    }


def _of_router(choices: np.ndarray, pairs: Pairs) -> dict[str, float]:
    """Return the use of the experts by captions and cots."""
    parts = {kind: name for name, kind in zip(pairs.segments, pairs.kinds, strict=True)}
    logged = {}
    share = honesty_router.loads(choices).mean(0)  # [A, E]
    if choices.shape[-1] <= _MAX_EXPERTS_LOGGED:
        for kind, name in parts.items():
            for expert, value in enumerate(share[kind]):
                if np.isfinite(value):
                    logged[f"honesty/{name}_expert_{expert}_load"] = float(value)
    if {kinds.CAPTION, kinds.COT} <= set(parts):
        # Whole responses are left out: the question is whether the two parts are kept apart.
        bits = honesty_router.information_bits(choices[:, [kinds.CAPTION, kinds.COT]])
        logged["honesty/router_information_bits_mean"] = float(bits.mean())
        logged["honesty/router_information_bits_max"] = float(bits.max())
    return logged
