"""From scores to advantages: the mode is chosen here, and answers are judged where it counts."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from prism_jax import metrics
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.losses import advantage, credit
from prism_jax.policy import credit as policy_credit
from prism_jax.policy import responses as policy_responses
from prism_jax.policy import rollouts
from prism_jax.stages.align import config as align_config
from prism_jax.stages.align import feed as align_feed

# float32[responses] by the part of a response whose tokens learn from it, see `weights_by_part`.
Advantages = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """The advantages of a step's responses, and the accuracies that entered them."""

    by_part: dict[str, np.ndarray]  # "response", and with `advantage.credit` "caption" and "cot"
    by_token: np.ndarray  # float32[responses], or float32[responses, longest response]
    accuracy: np.ndarray | None  # float32[responses]; None: the mode does not read it
    is_judged: bool  # the accuracy is the judge's
    metrics: metrics.Metrics


class Comparison:
    """The comparison of each response with the others to its prompt."""

    def __init__(self, options: align_config.Config, judge: policy_responses.Judge | None):
        """Store the parts.

        Args:
          judge: None where `advantage.accuracy` does not need it.
        """
        self._options, self._judge = options, judge
        self._compare = make_advantages(options)

    def __call__(
        self,
        scores: discriminator_loss.ByName,
        prompts: align_feed.Prompts,
        responses: rollouts.Responses,
        is_trusted: np.ndarray | None = None,
    ) -> Compared:
        """Return the advantage of each response: how far its score lies above the others'.

        Args:
          is_trusted: bool[prompts], whether the teacher is right; None: it is not judged.
        """
        format_ok, accuracy, logged = verdicts(self._options, self._judge, prompts, responses)
        by_part = jax.device_get(self._compare(scores, format_ok, accuracy, is_trusted))
        for part, values in by_part.items():
            name = "reward/advantage" if part == "response" else f"reward/{part}_advantage"
            logged[f"{name}_mean"] = metrics.mean(values)
            logged[f"{name}_absolute_mean"] = metrics.mean(np.abs(values))
        return Compared(
            by_part=by_part,
            by_token=policy_credit.of_parts(by_part, responses),
            accuracy=accuracy,
            is_judged=self._options.advantage.asks_judge and accuracy is not None,
            metrics=logged,
        )


def verdicts(
    options: align_config.Config,
    judge: policy_responses.Judge | None,
    prompts: align_feed.Prompts,
    responses: rollouts.Responses,
) -> tuple[np.ndarray, np.ndarray | None, metrics.Metrics]:
    """Return whether each format is valid, the accuracy that the mode reads, and metrics."""
    format_ok = np.array([segments.format_ok for segments in responses.segments])
    if options.advantage.accuracy == "off" and options.advantage.teacher_gate != "verify":
        return format_ok, None, {}
    # As in the released run of gated_align, which never received an accuracy.
    if options.advantage.accuracy == "nobody":
        return format_ok, np.ones(len(format_ok), np.float32), {}
    # All of them, also malformed ones: the judge's format may be looser than the gate's.
    rewards, logged = policy_responses.judge(judge, prompts.rows, responses.segments)
    accuracy = np.array([reward.accuracy for reward in rewards], np.float32)
    if options.advantage.format_of == "judge":
        format_ok = np.array([reward.format > 0 for reward in rewards])
    return format_ok, accuracy, logged | {"reward/accuracy_mean": metrics.mean(accuracy)}


def make_advantages(
    options: align_config.Config,
) -> Callable[..., Advantages]:
    """Return the jitted (scores, format_ok, accuracy, is_trusted) -> advantages by part.

    Scores count as the pair loss reads them: corrected for length, then clipped. `is_trusted` is
    bool[prompts] or None, see `gate`.
    """
    rollout, discriminator = options.rollout, options.discriminator
    # Every step has the same groups, malformed responses included, so one program serves all.
    prompt_id = np.repeat(np.arange(rollout.num_prompts, dtype=np.int32), rollout.num_responses)
    compare = {
        part: choose(options.advantage, num_groups=rollout.num_prompts, weights=weights)
        for part, weights in weights_by_part(options.advantage).items()
    }
    scale = options.advantage.scores_scale

    def advantages(
        scores: discriminator_loss.ByName,
        format_ok: jax.Array,
        accuracy: jax.Array | None,
        is_trusted: jax.Array | None = None,
    ) -> Advantages:
        of_teacher, by_segment = discriminator.corrected_scores(scores)
        inputs = advantage.AlignmentScores(
            prompt_id=jnp.asarray(prompt_id),
            by_segment=by_segment,
            format_ok=format_ok,
            accuracy=accuracy,
            teacher=of_teacher if scale is not None and scale.kind == "teacher" else None,
            scale=scale,
        )
        by_part = {part: compare_part(inputs) for part, compare_part in compare.items()}
        if is_trusted is None:
            return by_part
        instead = gated(options.advantage, inputs, num_groups=rollout.num_prompts)
        return {
            part: jnp.where(is_trusted[inputs.prompt_id], values, instead)
            for part, values in by_part.items()
        }

    return jax.jit(advantages)


def gated(
    options: align_config.Advantage, inputs: advantage.AlignmentScores, *, num_groups: int
) -> jax.Array:
    """Return the advantages of responses to prompts whose teacher is wrong, see `gate`."""
    if options.teacher_gate != "verify":
        return jnp.zeros(inputs.format_ok.shape)
    valid = inputs.format_ok.astype(jnp.float32)
    verified = advantage.grpo(
        valid * inputs.accuracy, inputs.prompt_id, num_groups=num_groups, eps=options.eps
    )
    return verified - (options.format_penalty or 0.0) * (1.0 - valid)


def weights_by_part(options: align_config.Advantage) -> dict[str, dict[str, float]]:
    """Return the weights of segments in the advantage of each part; see `losses.credit`."""
    return credit.weights_by_part(options.credit, options.weights)


def choose(
    options: align_config.Advantage, *, num_groups: int, weights: Mapping[str, float]
) -> Callable[[advantage.AlignmentScores], jax.Array]:
    """Return the advantage of `config.advantage.mode`. This is the one place where it is chosen."""
    shared = {"num_groups": num_groups, "eps": options.eps, "weights": weights}
    if options.mode == "align":
        return functools.partial(advantage.align, **shared, format_penalty=options.format_penalty)
    # Every other mode adds terms to that of the scores, and weighs them against it.
    shared["align_coef"] = options.align_coef
    penalties = {
        "wrong_penalty": options.wrong_penalty,
        "format_penalty": options.format_penalty,
    }
    if options.mode == "acc_gating":
        return functools.partial(advantage.acc_gating, **shared, **penalties)
    if options.mode == "gated_align":
        return functools.partial(advantage.gated_align, **shared, **penalties)
    shared |= {
        "accuracy_weight": options.accuracy_weight,
        "format_weight": options.format_weight,
    }
    if options.mode == "rlvr":
        return functools.partial(advantage.rlvr, **shared)
    if options.mode == "rlvr_v2":
        return functools.partial(advantage.rlvr_v2, **shared, **penalties)
    return functools.partial(advantage.sign_align, **shared, **penalties)
