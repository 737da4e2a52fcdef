"""From rewards to advantages: length, distance from the reference, comparison."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from prism_jax import metrics
from prism_jax.losses import advantage, kl
from prism_jax.policy import credit as policy_credit
from prism_jax.stages.rlvr import config as rlvr_config
from prism_jax.stages.rlvr import credit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Distance:
    """The log-probs and the coefficient of the KL in the reward."""

    old_logprobs: np.ndarray  # float32[responses, max_response_tokens]
    reference_logprobs: np.ndarray  # float32[responses, max_response_tokens]
    coefficient: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """The advantages of a step's responses."""

    # float32[responses]; of "reinforce++", and where parts differ, float32[responses,
    # max_response_tokens]
    advantages: np.ndarray
    next_coefficient: float | None  # of the KL in the reward; None: there is none
    metrics: metrics.Metrics


class Comparison:
    """The comparison of rewards, whole or token by token."""

    def __init__(
        self,
        advantage: rlvr_config.Advantage,
        reference: rlvr_config.Reference,
        overlong: rlvr_config.Overlong,
        *,
        num_groups: int,
        max_response_tokens: int,
    ):
        """Store the options; nothing is compiled before the first step.

        Args:
          num_groups: most groups of a step; with fewer the program stays the same.
        """
        self._advantage, self._reference, self._overlong = advantage, reference, overlong
        self._num_groups, self._max_response_tokens = num_groups, max_response_tokens

    def penalties(self, lengths: np.ndarray) -> np.ndarray:
        """Return the term, <= 0, added to each response's reward for its length."""
        if self._overlong.buffer_tokens is None:
            return np.zeros(len(lengths), np.float32)
        penalties = advantage.overlong_penalty(
            jnp.asarray(lengths, jnp.int32),
            max_response_tokens=self._max_response_tokens,
            buffer_tokens=self._overlong.buffer_tokens,
            factor=self._overlong.penalty_factor,
        )
        return np.asarray(penalties)

    def __call__(
        self,
        rewards: np.ndarray,
        prompt_id: np.ndarray,
        lengths: np.ndarray,
        *,
        distance: Distance | None,
        parts: credit.Parts | None = None,
    ) -> Compared:
        """Return the advantage of each response, or of each of its tokens.

        Args:
          rewards: float32[responses].
          prompt_id: int32[responses] in [0, num_groups).
          lengths: int32[responses], tokens of the responses.
          distance: from the reference, taken off the rewards token by token; None: it is not.
          parts: of the responses, see `credit`; None: all tokens of a response learn alike.
        """
        coefficient = None if distance is None else distance.coefficient
        # No group varied in this step. A mean over nothing would be NaN.
        if not len(rewards):
            none = np.zeros(0, np.float32)
            return Compared(advantages=none, next_coefficient=coefficient, metrics={})
        mask = np.arange(self._max_response_tokens) < lengths[:, None]
        token_rewards, logged = None, {}
        if distance is not None:
            token_rewards, mean_kl, logged = _penalise(
                rewards, mask, distance, estimator=self._reference.reward_estimator
            )
            # Of the next step: this step's rewards were made with the current one.
            coefficient = self._adapt(distance.coefficient, float(mean_kl), num_rows=len(rewards))
            logged["reward/reference_kl_coefficient"] = metrics.mean([distance.coefficient])
        if self._advantage.kind == "reinforce++":
            if token_rewards is None:
                # The whole reward is that of the last token.
                is_last = np.arange(self._max_response_tokens) == lengths[:, None] - 1
                token_rewards = np.where(is_last, rewards[:, None], np.float32(0))
            advantages = _plus_plus(
                token_rewards, mask, discount=self._advantage.discount, eps=self._advantage.eps
            )
        else:
            if token_rewards is not None:
                # Groups are compared response by response, so the KL counts by its sum.
                rewards = np.asarray(token_rewards).sum(-1)
            # A step may have fewer groups than that; another number would be another program.
            compare = make_advantage(self._advantage, num_groups=self._num_groups)
            advantages = compare(rewards, prompt_id)
            if parts is not None:
                withheld = credit.WITHHELD[self._advantage.credit] * parts.accuracy
                compare_part = make_part(self._advantage, num_groups=self._num_groups)
                caption = np.asarray(compare_part(rewards - withheld, rewards, prompt_id))
                logged["reward/caption_advantage_absolute_mean"] = metrics.mean(np.abs(caption))
                advantages = policy_credit.by_token(
                    caption, np.asarray(advantages), parts.segments, lengths
                )
        return Compared(
            advantages=np.asarray(advantages), next_coefficient=coefficient, metrics=logged
        )

    def _adapt(self, coefficient: float, mean_kl: float, *, num_rows: int) -> float:
        """Return the next coefficient, the same one where it is fixed."""
        if self._reference.reward_target is None:
            return coefficient
        adapted = kl.adapt(
            coefficient,
            mean_kl,
            num_rows=num_rows,
            target=self._reference.reward_target,
            horizon=self._reference.reward_horizon,
        )
        return float(adapted)


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
    """Return the jitted (rewards, prompt_id) -> advantages: the one place where it is chosen."""
    if options.kind == "rloo":
        compare = functools.partial(advantage.rloo, num_groups=num_groups)
    elif options.kind == "dr_grpo":
        compare = functools.partial(advantage.dr_grpo, num_groups=num_groups)
    elif options.kind == "grpo":
        compare = functools.partial(advantage.grpo, num_groups=num_groups, eps=options.eps)
    else:
        raise ValueError(f"{options.kind} compares no groups")
    return jax.jit(compare)


@functools.cache
def make_part(
    options: rlvr_config.Advantage, *, num_groups: int
) -> Callable[[np.ndarray, np.ndarray, np.ndarray], jax.Array]:
    """Return the jitted (part, rewards, prompt_id) -> advantages of a part of the rewards."""
    if options.kind == "grpo":
        compare = functools.partial(advantage.grpo_part, num_groups=num_groups, eps=options.eps)
        return jax.jit(compare)
    # The others divide by nothing that depends on the rewards: a part is compared as the whole.
    whole = make_advantage(options, num_groups=num_groups)
    return lambda part, rewards, prompt_id: whole(part, prompt_id)
