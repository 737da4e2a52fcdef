"""From the judge's rewards to advantages: length, distance from the reference, comparison."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from prism_jax import metrics
from prism_jax.losses import advantage, kl
from prism_jax.rewards import score
from prism_jax.stages.rlvr import config as rlvr_config


def told_of(rewards: Sequence[score.Reward], *, num_responses: int) -> metrics.Metrics:
    """Return the rewards' means, why they are what they are, and how many prompts teach nothing."""
    groups = np.array([reward.total for reward in rewards]).reshape(-1, num_responses)
    counts = score.count_reasons(rewards)
    return {
        "reward/total_mean": metrics.mean(groups),
        "reward/accuracy_mean": metrics.mean([reward.accuracy for reward in rewards]),
        "reward/format_mean": metrics.mean([reward.format for reward in rewards]),
        "reward/flat_groups_fraction": metrics.mean(np.ptp(groups, axis=1) == 0),
        **{
            f"reward/reason_{reason}_fraction": metrics.mean([count / len(rewards)])
            for reason, count in counts.items()
        },
    }


def overlong_penalties(
    lengths: np.ndarray, options: rlvr_config.Overlong, *, max_response_tokens: int
) -> np.ndarray:
    """Return what is added to the reward of each response, at most 0: float32[N]."""
    if options.buffer_tokens is None:
        return np.zeros(len(lengths), np.float32)
    found = advantage.overlong_penalty(
        jnp.asarray(lengths, jnp.int32),
        max_response_tokens=max_response_tokens,
        buffer_tokens=options.buffer_tokens,
        factor=options.penalty_factor,
    )
    return np.asarray(found)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Distance:
    """Hold what the KL in the reward is made of."""

    old_logprobs: np.ndarray  # float32[N, T]
    reference_logprobs: np.ndarray  # float32[N, T]
    coefficient: float


class Comparison:
    """Compare rewards, whole or token by token; compiled once."""

    def __init__(self, options: rlvr_config.Advantage, reference: rlvr_config.Reference):
        self._options, self._reference = options, reference

    def __call__(
        self,
        rewards: np.ndarray,
        prompt_id: np.ndarray,
        lengths: np.ndarray,
        *,
        num_groups: int,
        max_response_tokens: int,
        distance: Distance | None,
    ) -> tuple[np.ndarray, float | None, metrics.Metrics]:
        """Return advantages, the next coefficient of the KL in the reward, and metrics.

        Advantages are float32[N], one a response, or of "reinforce++" float32[N, T].

        Args:
          rewards: float32[N].
          prompt_id: int32[N] in [0, num_groups).
          lengths: int32[N], tokens of the responses.
        """
        coefficient, told = None if distance is None else distance.coefficient, {}
        if not len(rewards):
            return np.zeros(0, np.float32), coefficient, told
        mask = np.arange(max_response_tokens) < lengths[:, None]
        token_rewards = None
        if distance is not None:
            token_rewards, mean_kl, told = _penalise(
                rewards, mask, distance, estimator=self._reference.reward_estimator
            )
            coefficient = self._adapt(distance.coefficient, float(mean_kl), num_rows=len(rewards))
            told["reward/reference_kl_coefficient"] = metrics.mean([distance.coefficient])
        if self._options.kind == "reinforce++":
            if token_rewards is None:
                is_last = np.arange(max_response_tokens) == lengths[:, None] - 1
                token_rewards = np.where(is_last, rewards[:, None], np.float32(0))
            found = _plus_plus(
                token_rewards, mask, discount=self._options.discount, eps=self._options.eps
            )
        else:
            if token_rewards is not None:
                rewards = np.asarray(token_rewards).sum(-1)
            found = make_advantage(self._options, num_groups=num_groups)(rewards, prompt_id)
        return np.asarray(found), coefficient, told

    def _adapt(self, coefficient: float, mean_kl: float, *, num_rows: int) -> float:
        """Return the next coefficient, the same one where it is fixed."""
        if self._reference.reward_target is None:
            return coefficient
        found = kl.adapt(
            coefficient,
            mean_kl,
            num_rows=num_rows,
            target=self._reference.reward_target,
            horizon=self._reference.reward_horizon,
        )
        return float(found)


@functools.partial(jax.jit, static_argnames=("estimator",))
def _penalise(rewards, mask, distance, *, estimator):
    return kl.penalised_rewards(
        rewards,
        distance.old_logprobs,
        distance.reference_logprobs,
        mask,
        coefficient=distance.coefficient,
        estimator=estimator,
    )


_plus_plus = jax.jit(advantage.reinforce_plus_plus, static_argnames=("discount", "eps"))


@functools.cache
def make_advantage(
    options: rlvr_config.Advantage, *, num_groups: int
) -> Callable[[np.ndarray, np.ndarray], jax.Array]:
    """Return the jitted (rewards, prompt_id) -> advantages of groups: where it is chosen."""
    if options.kind == "rloo":
        found = functools.partial(advantage.rloo, num_groups=num_groups)
    elif options.kind == "dr_grpo":
        found = functools.partial(advantage.dr_grpo, num_groups=num_groups)
    elif options.kind == "grpo":
        found = functools.partial(advantage.grpo, num_groups=num_groups, eps=options.eps)
    else:
        raise ValueError(f"{options.kind} compares no groups")
    return jax.jit(found)
