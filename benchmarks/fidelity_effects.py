"""Measure, at small size, what the released behaviour does that docs/fidelity.md lists.

    python -m benchmarks.fidelity_effects --out=benchmarks/results/fidelity_effects.json

Every figure is computed here, by this project's functions or by the formula that is named, from
seeds; nothing is read but the recorded cases of `tests/oracles`. A CPU is enough; torch is needed.
"""

import argparse
import itertools
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import fidelity_models, fidelity_scores, fidelity_texts, fidelity_updates
from prism_jax.data import images
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.losses import advantage, reduce
from prism_jax.rewards import answer, answer_official, symbolic, tags

Json = Any
_WIDE = {"min_pixels": 1, "max_pixels": 1 << 40}
_EPS = 1e-6


def judge(oracles: pathlib.Path) -> dict[str, Json]:
    """Item 43: count the recorded cases that each judge gets wrong."""
    cases = json.loads((oracles / "answers.json").read_text(encoding="utf-8"))
    counts = {"cases": len(cases)}
    for name, is_correct in (("released", answer_official.is_correct), ("ours", answer.is_correct)):
        verdicts = [
            bool(case["answer"])
            and is_correct(case["answer"], case["ground_truth"], symbolic.verify)
            for case in cases
        ]
        pairs = list(zip(verdicts, (case["correct"] for case in cases), strict=True))
        counts[f"{name}_right_called_wrong"] = sum(
            right and not is_paid for is_paid, right in pairs
        )
        counts[f"{name}_wrong_called_right"] = sum(
            is_paid and not right for is_paid, right in pairs
        )
        if name == "released":
            recorded = [case["official_accuracy"] > 0 for case in cases]
            counts["released_equals_record"] = sum(np.equal(verdicts, recorded).tolist())
    return counts


def formats(oracles: pathlib.Path) -> dict[str, Json]:
    """Item 19: count the recorded texts that each gate lets pass though they are malformed."""
    cases = json.loads((oracles / "formats.json").read_text(encoding="utf-8"))
    malformed = [case["text"] for case in cases if not case["format_ok"]]
    proper = [case["text"] for case in cases if case["format_ok"]]
    paid = [case for case in cases if not case["format_ok"] and case["official"]["score"] == 1.0]
    return {
        "cases": len(cases),
        "malformed": len(malformed),
        "malformed_with_full_released_reward": len(paid),
        **{
            f"{gate}_passes_malformed": sum(tags.format_ok(text, gate=gate) for text in malformed)
            for gate in ("official", "strict")
        },
        **{
            f"{gate}_refuses_proper": sum(not tags.format_ok(text, gate=gate) for text in proper)
            for gate in ("official", "strict")
        },
    }


def misread_scores(
    teacher: np.ndarray, student: np.ndarray, *, batch: int, num_batches: int, seed: int
) -> dict[str, float]:
    """Item 6: share of scores that the released warm-up reads at a wrong token.

    Teachers and students of a batch are padded on the left to the longest of all of them. Each side
    is taken for padded on the right when its first sequence has no padding; then every shorter
    sequence of that side is read at its length minus one, which is within it or its padding.
    """
    rng = np.random.default_rng(seed)
    wrong = np.zeros(2)
    for _ in range(num_batches):
        rows = rng.integers(len(teacher), size=batch)
        sides = teacher[rows], student[rows]
        longest = max(side.max() for side in sides)
        for number, side in enumerate(sides):
            if side[0] == longest:
                wrong[number] += np.sum(side < longest)
    shares = wrong / (batch * num_batches)
    return {
        "teacher": float(shares[0]),
        "student": float(shares[1]),
        "all": float(shares.mean()),
    }


def padding_side() -> dict[str, Json]:
    """Item 6 with lengths of no side's own, and with those of the embedded corpus."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(300, 8000, size=(2, 100_000))
    corpus = fidelity_texts.lengths(num_pairs=200)
    return {
        "batch": 4,
        "random_lengths": misread_scores(*lengths, batch=4, num_batches=20_000, seed=1),
        "corpus_lengths": misread_scores(*corpus, batch=4, num_batches=20_000, seed=1),
    }


def pair_normalisation() -> dict[str, Json]:
    """Item 22: the discriminator's loss and gradient over orders of the same 16 responses."""
    rng = np.random.default_rng(0)
    student = rng.normal(0.0, 2.0, 16).astype(np.float32)
    ok = rng.random(16) < 0.7
    orders = [rng.permutation(16) for _ in range(100)]
    result = {"responses": 16, "well_formed": int(ok.sum()), "orders": len(orders)}
    for size in (None, 2, 4):
        rule = discriminator_loss.PairRule(
            score_clip=10.0,
            regulariser=1e-3,
            router=0.0,
            length_beta=(),
            microbatch_pairs=size,
            all_invalid="none",
            score_dtype="float32",
        )
        losses, shares = [], []
        for order in orders:
            one = discriminator_loss.Scores(
                teacher=jnp.full(1, 1.0),
                student=jnp.where(ok[order], student[order], 0.0),
                is_pair=jnp.asarray(ok[order]),
                teacher_tokens=jnp.zeros(1, jnp.int32),
                student_tokens=jnp.zeros(16, jnp.int32),
            )
            gradients, metrics = discriminator_loss.gradients_by_name({"cot": one}, rule)
            losses.append(float(metrics["discriminator/cot_loss"].value))
            back = np.empty(16)
            back[order] = np.asarray(gradients["cot"].student)
            shares.append(back[ok])
        shares = np.stack(shares)
        result["whole_batch" if size is None else f"microbatches_of_{size}"] = {
            "loss_least": min(losses),
            "loss_most": max(losses),
            "gradient_of_a_score_most_over_least": float(np.max(shares.max(0) / shares.min(0))),
        }
    return result


def _partitions(members: Sequence[int], size: int) -> list[list[list[int]]]:
    """Return all ways to split the members into unordered parts of the size."""
    if not members:
        return [[]]
    first, *rest = members
    partitions = []
    for others in itertools.combinations(rest, size - 1):
        left = [one for one in rest if one not in others]
        partitions += [[[first, *others], *more] for more in _partitions(left, size)]
    return partitions


def token_mean() -> dict[str, Json]:
    """Item 36: the policy's loss over all splits of the same 8 responses.

    Released: each microbatch's mean over its tokens, times its share of the responses. Ours:
    `reduce.aggregate`, totals of microbatches over the weight of the whole batch.
    """
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(1000), 0.8, 8), 50, 8192).astype(int)
    score = rng.normal(size=8)
    losses = -(score - score.mean()) / score.std(ddof=1)  # of every token, at ratio 1
    mask = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.where(mask, losses[:, None], 0.0).astype(np.float32)
    how = {"aggregation": "token-mean", "norm_tokens": None}
    whole = float(reduce.weight(jnp.asarray(mask), **how))
    released, ours, weights = [], [], []
    for size in (1, 2, 4, 8):
        for split in _partitions(range(8), size):
            means = [np.dot(losses[p], lengths[p]) / lengths[p].sum() for p in split]
            released.append(sum(m * size / 8 for m in means))
            weight = np.empty(8)
            for part in split:
                weight[part] = size / 8 / lengths[part].sum()
            weights.append(weight * whole)
    for split in _partitions(range(8), 4):
        parts = [reduce.aggregate(jnp.asarray(tokens[p]), mask[p], **how) for p in split]
        ours.append(sum(float(part.total) for part in parts) / whole)
    weights = np.stack(weights)
    return {
        "response_tokens": lengths.tolist(),
        "splits": len(released),
        "released_loss_least": min(released),
        "released_loss_most": max(released),
        "our_loss": ours[0],
        "our_spread": max(ours) - min(ours),
        "released_weight_of_a_token_over_ours_least": float(weights.min()),
        "released_weight_of_a_token_over_ours_most": float(weights.max()),
    }


def equal_scores() -> dict[str, Json]:
    """Advantages of a group of equal values: as released, by torch's float32 mean and deviation.

    Rewards of 0.2 (right format, wrong answer) and scores of 0.7 beside 200 values from -10 to 10.
    """
    rng = np.random.default_rng(0)
    values = np.concatenate([[0.2, 0.7], rng.uniform(-10, 10, 200)]).astype(np.float32)
    largest: dict[str, Json] = {"released": {}, "ours_most": 0.0}
    for size in (2, 4, 6, 7, 8, 11, 16):
        groups = torch.tensor(values)[:, None].repeat(1, size)
        left = [float(_released_advantage(group).abs().max()) for group in groups.unbind()]
        largest["released"][str(size)] = {
            "of_0.2": left[0],
            "of_0.7": left[1],
            "most": max(left),
            "share_not_0": float(np.mean(np.array(left[2:]) > 0)),
        }
        ours = advantage.group_normalise(
            jnp.repeat(values, size),
            jnp.repeat(jnp.arange(len(values)), size),
            num_groups=len(values),
            eps=_EPS,
        )
        largest["ours_most"] = max(largest["ours_most"], float(jnp.abs(ours).max()))
    return largest


def _released_advantage(group: torch.Tensor) -> torch.Tensor:
    return (group - torch.mean(group)) / (torch.std(group) + _EPS)


def invalid_group() -> dict[str, Json]:
    """Item 18: what a group without a well-formed response gets; the same in both."""
    scores = advantage.AlignmentScores(
        prompt_id=jnp.zeros(16, jnp.int32),
        by_segment={"caption": jnp.zeros(16), "cot": jnp.zeros(16)},
        format_ok=jnp.zeros(16, bool),
        accuracy=None,
    )
    advantages = advantage.align(
        scores,
        num_groups=1,
        eps=_EPS,
        weights={"caption": 0.5, "cot": 0.5},
        format_penalty=1.5,
    )
    return {"advantage": float(advantages[0]), "spread": float(jnp.ptp(advantages))}


def image_limits() -> dict[str, Json]:
    """Items 5 and 31: visual tokens of some pictures by stage, and of a doubled resize."""

    def tokens(height: int, width: int, limits: dict[str, int]) -> int:
        height, width = images.smart_resize(height, width, factor=32, **limits)
        return height * width // 32**2

    token_counts = {}
    for height, width in ((480, 640), (1200, 1600), (300, 1800), (1000, 1000)):
        scale = min(1.0, 560 / max(height, width))
        small = round(height * scale), round(width * scale)
        limit = {"min_pixels": 1, "max_pixels": 560 * 560}
        token_counts[f"{width}x{height}"] = {
            "released_warmup": tokens(*small, limit),
            "released_alignment": tokens(height, width, _WIDE),
            "ours_both": tokens(height, width, limit),
        }
    rng = np.random.default_rng(0)
    sizes = rng.integers(100, 1600, size=(5000, 2)).tolist()
    twice, once = [], []
    for height, width in sizes:
        first = images.smart_resize(height, width, factor=28, **_WIDE)
        twice.append(images.smart_resize(*first, factor=32, **_WIDE))
        once.append(images.smart_resize(height, width, factor=32, **_WIDE))
    changed = np.any(np.array(twice) != np.array(once), axis=1)
    return {"tokens": token_counts, "other_grid_when_resized_twice": float(changed.mean())}


def main() -> None:
    """Compute everything and write it."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--out", type=pathlib.Path, required=True)
    options.add_argument("--oracles", type=pathlib.Path, default=pathlib.Path("tests/oracles"))
    args = options.parse_args()
    begun = time.monotonic()
    effects = {
        "items_1_2_3_scored_token": fidelity_texts.scored_tokens(num_pairs=200),
        "item_1_teacher_cut": fidelity_texts.teacher_cut(),
        "item_4_positions_item_9_dropout": fidelity_models.scores(),
        "items_5_31_images": image_limits(),
        "item_6_padding_side": padding_side(),
        "item_10_router_term": fidelity_scores.router_term(),
        "item_11_upcycle_noise": fidelity_models.upcycle_noise(),
        "item_12_head_bias": fidelity_updates.head_bias(),
        "item_18_invalid_group": invalid_group(),
        "item_19_format": formats(args.oracles),
        "item_22_pair_normalisation": pair_normalisation(),
        "item_23_no_pair": fidelity_updates.no_pair(),
        "item_24_nobody_judges": fidelity_updates.nobody_judges(),
        "item_25_looser_format": fidelity_updates.looser_format(args.oracles),
        "item_36_token_mean": token_mean(),
        "item_39_fruitful_steps": fidelity_updates.fruitful_steps(),
        "item_43_judge": judge(args.oracles),
        "equal_scores": equal_scores(),
        "bfloat16_scores": fidelity_scores.bfloat16_scores(),
        "norm_decay": fidelity_updates.norm_decay(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(effects, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(effects, indent=2))
    print(f"{time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
