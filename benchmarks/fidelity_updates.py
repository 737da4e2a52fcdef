"""Effects of docs/fidelity.md that are seen in updates: advantages, losses, steps, weight decay."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.losses import advantage
from prism_jax.rewards import score, symbolic, tags
from prism_jax.stages.rlvr import config as rlvr_config
from prism_jax.stages.rlvr import groups as rlvr_groups
from prism_jax.training import optim, optim_kinds, schedules

Json = Any
_GROUPS, _RESPONSES = 1000, 16
_SEGMENTS = ("caption", "cot")
# The numbers of configs/align.py: `advantage` and `discriminator.regulariser`.
_ALIGN = {"eps": 1e-6, "weights": dict.fromkeys(_SEGMENTS, 0.5), "format_penalty": 1.5}
_JUDGED = _ALIGN | {"align_coef": 1.0, "wrong_penalty": 1.0}
_REGULARISER = 1e-3


def head_bias() -> dict[str, Json]:
    """Item 12: what adding the same number to all scores changes, and a bias's gradient."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2, _RESPONSES)).astype(np.float32)
    values = []
    for bias in (0.0, 0.3):
        alignment_scores = _alignment_scores(
            scores + bias, np.ones(_RESPONSES, bool), None, num_groups=1
        )
        values.append(advantage.align(alignment_scores, num_groups=1, **_ALIGN))
    sums = {}
    for regulariser in (0.0, _REGULARISER):
        back = _score_gradients(scores, np.ones(2), True, "none", regulariser)
        sums[regulariser] = float(sum(one.teacher.sum() + one.student.sum() for one in back))
    return {
        "advantages_change_at_most": float(jnp.abs(values[1] - values[0]).max()),
        "gradient_of_a_bias_from_pairs": sums[0.0],
        "gradient_of_a_bias_from_regulariser": sums[_REGULARISER] - sums[0.0],
    }


def no_pair() -> dict[str, Json]:
    """Item 23: where a step of 16 responses without a pair drives the teacher's two scores.

    The scores are free numbers here, not those of a model, and begin at 0, as the students' stay.
    """
    students = np.zeros((2, _RESPONSES), np.float32)

    @jax.jit
    def gradient(teacher: jax.Array) -> jax.Array:
        back = _score_gradients(students, teacher, False, "released", _REGULARISER)
        return jnp.stack([one.teacher[0] for one in back])

    teacher = jnp.zeros(2)
    first = gradient(teacher)
    for _ in range(300):
        teacher -= 200.0 * gradient(teacher)
    pairs = _score_gradients(students, np.zeros(2), True, "released", _REGULARISER)
    ours = _score_gradients(students, np.zeros(2), False, "none", _REGULARISER)
    return {
        "released_gradient_of_a_teacher": float(first[0]),
        "our_gradient_of_a_teacher": float(ours[0].teacher[0]),
        "gradient_with_16_pairs": float(pairs[0].teacher[0]),
        "released_score_at_rest": float(teacher[0]),
        "gradient_at_rest": float(gradient(teacher)[0]),
    }


def _score_gradients(
    students: np.ndarray, teachers: Any, is_pair: bool, all_invalid: str, regulariser: float
) -> list[discriminator_loss.Scores]:
    """Return the gradients of a prompt's caption and cot; all its responses are pairs, or none."""
    rule = discriminator_loss.PairRule(
        score_clip=10.0,
        regulariser=regulariser,
        router=0.0,
        length_beta=(),
        microbatch_pairs=None,
        all_invalid=all_invalid,
        score_dtype="float32",
    )
    scores = {
        name: discriminator_loss.Scores(
            teacher=jnp.asarray(teachers, jnp.float32)[number : number + 1],
            student=jnp.asarray(students[number]),
            is_pair=jnp.full(_RESPONSES, is_pair),
            teacher_tokens=jnp.zeros(1, jnp.int32),
            student_tokens=jnp.zeros(_RESPONSES, jnp.int32),
        )
        for number, name in enumerate(_SEGMENTS)
    }
    gradients, _ = discriminator_loss.gradients_by_name(scores, rule)
    return [gradients[name] for name in _SEGMENTS]


def _alignment_scores(
    by_segment: np.ndarray, format_ok: np.ndarray, accuracy: Any, *, num_groups: int
) -> advantage.AlignmentScores:
    return advantage.AlignmentScores(
        prompt_id=jnp.repeat(jnp.arange(num_groups), _RESPONSES),
        by_segment=dict(zip(_SEGMENTS, map(jnp.asarray, by_segment), strict=True)),
        format_ok=jnp.asarray(format_ok),
        accuracy=None if accuracy is None else jnp.asarray(accuracy, jnp.float32),
    )


def nobody_judges() -> dict[str, Json]:
    """Item 24: advantages of wrong answers, with scores that know nothing of the answer.

    Groups of 16; 9 of 10 responses are well-formed, 6 of 10 right.
    """
    rng = np.random.default_rng(0)
    total = _GROUPS * _RESPONSES
    scores = rng.normal(size=(2, total)).astype(np.float32)
    format_ok, right = rng.random(total) < 0.9, rng.random(total) < 0.6
    wrong = format_ok & ~right
    result: dict[str, Json] = {"responses": total, "wrong": int(wrong.sum())}
    for name, accuracy in (("released", np.ones(total)), ("ours", right)):
        values = advantage.gated_align(
            _alignment_scores(scores, format_ok, accuracy, num_groups=_GROUPS),
            num_groups=_GROUPS,
            **_JUDGED,
        )
        of_wrong = np.asarray(values)[wrong]
        result[f"{name}_share_of_wrong_above_0"] = float(np.mean(of_wrong > 0))
        result[f"{name}_mean_of_wrong"] = float(of_wrong.mean())
    return result


def looser_format(oracles: pathlib.Path) -> dict[str, Json]:
    """Item 25 and the format of geo3k: whom the reward calls well-formed, and what that pays.

    Texts: the recorded ones, as of `hiyouga/geometry3k`. Advantages: groups of 16 right answers of
    which the released gate refuses 3 and the reward none; those have scores of 0.
    """
    cases = json.loads((oracles / "formats.json").read_text(encoding="utf-8"))
    unscored, paid = 0, {"strict": 0, "official": 0}
    for case in cases:
        task = score.Task(
            response=case["text"],
            ended=True,
            ground_truth=case["ground_truth"],
            equivalent_answers=(),
            data_source=score.GEOMETRY_SOURCE,
        )
        for judge in paid:
            rule = score.Rule(judge=judge, accuracy_weight=0.8, format_weight=0.2)
            reward = score.grade(task, rule, symbolic.verify)
            paid[judge] += not case["format_ok"] and reward.total > 0
        # `reward` is of the official judge now.
        unscored += reward.format > 0 and not tags.format_ok(case["text"], gate="official")
    result: dict[str, Json] = {
        "malformed": sum(not case["format_ok"] for case in cases),
        "valid_without_scores": unscored,
        **{f"malformed_that_earn_{judge}": number for judge, number in paid.items()},
        "mean_advantage_by_mean_score": {},
    }
    rng = np.random.default_rng(0)
    total = _GROUPS * _RESPONSES
    refused = np.arange(total) % _RESPONSES < 3
    noise = rng.normal(size=(2, total)).astype(np.float32)
    for mean in (-2, 0, 2):
        scores = np.where(refused, 0.0, noise + mean).astype(np.float32)
        means = {}
        for name, format_ok in (("released", np.ones(total, bool)), ("ours", ~refused)):
            values = advantage.acc_gating(
                _alignment_scores(scores, format_ok, np.ones(total), num_groups=_GROUPS),
                num_groups=_GROUPS,
                **_JUDGED,
            )
            means[name] = float(np.asarray(values)[refused].mean())
        result["mean_advantage_by_mean_score"][str(mean)] = means
    return result


def fruitful_steps() -> dict[str, Json]:
    """Item 39: steps that 620 generations of 96 prompts reach, by the share that varies."""
    generations = 620
    result: dict[str, Json] = {"generations": generations, "by_varying_share": {}}
    for share in (0.2, 0.4, 0.6, 0.8):
        by_rule = {}
        for name, surplus in (("released", 0), ("ours", 1)):
            by_rule[name] = _reach(share, generations, surplus_steps=surplus)
        result["by_varying_share"][str(share)] = by_rule
    return result


def _reach(share: float, generations: int, *, surplus_steps: int) -> dict[str, Json]:
    """Return the steps that are filled, and the share of varying groups that is thrown away."""
    options = rlvr_config.Groups(
        keep="accuracy",
        generation_prompts=96,
        max_generations=10,
        when_short="error",
        surplus_steps=surplus_steps,
    )
    rng = np.random.default_rng(0)
    step, num_drawn, varying, learned, surplus = 0, 0, 0, 0, []

    def draw(number: int) -> list[rlvr_groups.Group]:
        del number
        varies = rng.random(options.generation_prompts) < share
        return [_group(step, bool(one)) for one in varies]

    while True:
        filled = rlvr_groups.fill(surplus, draw, options, num_prompts=32, step=step)
        num_drawn += filled.num_generations
        if num_drawn > generations:
            return {"steps": step, "thrown_away": 1.0 - learned / (varying - len(surplus))}
        varying += filled.num_varying
        learned += len(filled.groups)
        surplus, step = filled.surplus, step + 1


def _group(step: int, varies: bool) -> rlvr_groups.Group:
    """Return a group of two responses that are told apart by their accuracy alone."""
    return rlvr_groups.Group(
        index=0,
        row=None,
        prompt=None,
        responses=tuple(
            rlvr_groups.Response(
                tokens=None,
                logprobs=None,
                segments=None,
                reward=score.Reward(
                    total=right, accuracy=right, format=1.0, reason=score.Reason.CORRECT
                ),
            )
            for right in (1.0, float(not varies))
        ),
        step=step,
    )


def norm_decay() -> dict[str, Json]:
    """Weight decay: what is left of a norm's scale of 1 after a run in which nothing else moves it.

    Schedules, decays and steps of the published sizes' `official`; a warm-up of 1000 steps.
    """
    constant = {"kind": "constant", "end_factor": 1.0, "warmup_steps": 0, "warmup_fraction": None}
    cosine = {"kind": "cosine", "end_factor": 0.0, "warmup_steps": None, "warmup_fraction": 0.1}
    runs = {
        "warmup": (0.01, {"peak": 1e-5, "num_steps": 1000} | cosine),
        "align": (0.01, {"peak": 1e-6, "num_steps": 500} | constant),
        "grpo": (0.01, {"peak": 1e-6, "num_steps": 1500} | constant),
        "dapo": (0.1, {"peak": 1e-6, "num_steps": 1500} | constant | {"warmup_steps": 10}),
    }
    return {
        name: {
            "steps": options["num_steps"],
            "released_lost": 1.0 - _left(decay, options, no_decay=()),
            "ours_lost": 1.0 - _left(decay, options, no_decay=(".*/scale",)),
        }
        for name, (decay, options) in runs.items()
    }


def _left(weight_decay: float, options: dict[str, Any], *, no_decay: tuple[str, ...]) -> float:
    params = nnx.from_flat_state([(("norm", "scale"), nnx.Param(jnp.ones(1)))])
    optimizer = optim.make(
        params,
        kind="adamw",
        numbers=optim_kinds.Numbers(
            b1=0.9, b2=0.999, eps=1e-8, mu_dtype="float32", nu_dtype="float32"
        ),
        schedule=schedules.learning_rate_schedule(**options),
        weight_decay=weight_decay,
        no_decay=no_decay,
        groups=((".*", 1.0),),
        clip_norm=1.0,
        rounding="nearest",
        memory="device",
    )
    nothing = jax.tree.map(jnp.zeros_like, params)

    def one(carry, step):
        moved, state, _ = optimizer.update(
            nothing, carry[1], carry[0], step=step, is_finite=jnp.ones((), bool), key=None
        )
        return (moved, state), None

    (params, _), _ = jax.lax.scan(
        one, (params, optimizer.init(params)), jnp.arange(options["num_steps"])
    )
    return float(jax.tree.leaves(params)[0][0])
