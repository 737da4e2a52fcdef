"""Responses and their rewards, generation by generation, until a step has enough groups."""

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
from flax import nnx

from models.inputs import Example
from prism_jax import metrics
from prism_jax.policy import responses as policy_responses
from prism_jax.policy import rollouts
from prism_jax.stages.rlvr import config as rlvr_config
from prism_jax.stages.rlvr import feed as rlvr_feed
from prism_jax.stages.rlvr import groups as rlvr_groups
from prism_jax.stages.rlvr import report as rlvr_report

Respond = Callable[[Sequence[Example], jax.Array], rollouts.Responses]


class Sampler(Protocol):
    """The policy's sampler, see `policy.rollouts.Sampler`."""

    def prepare(self, params: nnx.State) -> Respond:
        """Return (prompts, key) -> responses of these parameters."""


class Sampling:
    """The sampler, the judge, and the rule by which their groups fill a step."""

    def __init__(
        self, options: rlvr_config.Config, sampler: Sampler, judge: policy_responses.Judge
    ):
        self._options, self._sampler, self._judge = options, sampler, judge

    def __call__(
        self,
        params: nnx.State,
        prompts: rlvr_groups.Prompts | None,
        feed: rlvr_feed.Feed,
        key: jax.Array,
        *,
        step: int,
    ) -> tuple[rlvr_groups.Filled, metrics.Metrics]:
        """Return the groups that the step learns from, and metrics about all that were drawn.

        Args:
          prompts: of the first generation; None where the carry fills the step.
          feed: gives the prompts of further generations.
        """
        options = self._options
        # Laying parameters out for decoding takes time and memory: once a step, and not at all in
        # a step that draws nothing.
        prepare = functools.cache(lambda: self._sampler.prepare(params))
        generations: list[metrics.Metrics] = []

        def generate(number: int) -> list[rlvr_groups.Group]:
            batch = prompts if number == 0 else feed.more()
            # A step of one generation has the key to itself; several must not share a key, or
            # equal prompts would get equal responses.
            is_refilled = options.groups.keep != "all"
            generation_key = jax.random.fold_in(key, number) if is_refilled else key
            groups, logged = self._generate(prepare(), batch, generation_key, step=step)
            generations.append(logged)
            return groups

        if options.groups.keep == "all":
            filled = rlvr_groups.take_all(generate(0))
        else:
            filled = rlvr_groups.fill(
                feed.carry.groups,
                generate,
                options.groups,
                num_prompts=options.rollout.num_prompts,
                step=step,
            )
        return filled, rlvr_report.merge_generations(generations)

    def _generate(
        self, respond: Respond, prompts: rlvr_groups.Prompts, key: jax.Array, *, step: int
    ) -> tuple[list[rlvr_groups.Group], metrics.Metrics]:
        """Return the rewarded responses to prompts, and metrics about them."""
        responses = respond(prompts.prompts, key)
        rewards, judge_metrics = policy_responses.judge(
            self._judge, prompts.rows, responses.segments
        )
        logged = responses.metrics() | judge_metrics
        logged |= rlvr_report.of_rewards(rewards, num_responses=self._options.rollout.num_responses)
        return rlvr_groups.make(prompts, responses, rewards, step=step), logged
