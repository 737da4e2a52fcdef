"""The first half of a step of RLVR: respond, judge, choose, compare, pack."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import numpy as np
from flax import nnx

from models.inputs import Example
from prism_jax import batches, metrics
from prism_jax.policy import batch as policy_batch
from prism_jax.policy import loss as policy_loss
from prism_jax.policy import responses, rollouts
from prism_jax.policy import update as policy_update
from prism_jax.rewards import score
from prism_jax.rows import Continuation, RowShape
from prism_jax.running import dump as running_dump
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.rlvr import advantages as rlvr_advantages
from prism_jax.stages.rlvr import config as rlvr_config
from prism_jax.stages.rlvr import feed as rlvr_feed
from prism_jax.stages.rlvr import groups as rlvr_groups
from prism_jax.stages.rlvr import updates as rlvr_updates
from prism_jax.stages.rlvr.groups import Group
from prism_jax.training import train_state

Draw = Callable[[Sequence[Example], jax.Array], rollouts.Responses]


class Sampler(Protocol):
    """Draw responses from parameters; see `policy.rollouts.Sampler`."""

    def prepare(self, params: nnx.State) -> Draw: ...


class Judge(Protocol):
    """Reward responses; see `rewards.workers.JudgePool`."""

    def grade(self, tasks: Sequence[score.Task]) -> list[score.Reward]: ...


class Experience:
    """Turn prompts into rows to learn from, a batch for each part of the rollout."""

    def __init__(
        self,
        options: rlvr_config.Config,
        devices: devices_lib.Devices,
        model: setup_models.Model,
        *,
        sampler: Sampler,
        judge: Judge,
        shape: RowShape,
        reference: nnx.State | None,
        dump: running_dump.Dump,
    ):
        """Compile nothing yet.

        Args:
          shape: of the rows of a part, see `stages.rlvr.updates.shape_of`.
          reference: parameters of the reference policy; None: there is none.
        """
        self._options, self._devices, self._model = options, devices, model
        self._sampler, self._judge, self._shape = sampler, judge, shape
        self._reference, self._dump = reference, dump
        self._compare = rlvr_advantages.Comparison(options.advantage, options.reference)
        self._logprobs = policy_loss.make_logprobs(
            model.graphdef,
            policy_update.settings(options.train, options.rollout, options.model, devices),
        )

    def __call__(
        self, state: train_state.TrainState, asked: rlvr_feed.Asked, key: jax.Array
    ) -> tuple[rlvr_updates.Batches, metrics.Metrics]:
        """Return the rows on the devices, and what the responses were like."""
        step = int(state.step) // self._options.train.num_updates + 1
        filled, told = self._fill(state.params, asked, key, step)
        begun = time.monotonic()
        learned, coefficient, own = self._learn(
            state.params, filled.groups, asked.feed.coefficient, step
        )
        asked.feed.keep(surplus=filled.surplus, coefficient=coefficient)
        told = told | own
        told["time/pack_seconds"] = metrics.mean([time.monotonic() - begun])
        return learned, told

    def _fill(
        self, params: nnx.State, asked: rlvr_feed.Asked, key: jax.Array, step: int
    ) -> tuple[rlvr_groups.Filled, metrics.Metrics]:
        """Return the groups that the step learns from, drawn until there are enough."""
        prepare = functools.cache(lambda: self._sampler.prepare(params))
        told: list[metrics.Metrics] = []

        def draw(number: int) -> list[Group]:
            prompts = asked.first if number == 0 else asked.feed.more()
            own_key = key if options.keep == "all" else jax.random.fold_in(key, number)
            groups, own = self._draw(prepare(), prompts, own_key, step)
            told.append(own)
            return groups

        options = self._options.groups
        if options.keep == "all":
            groups = draw(0)
            filled = rlvr_groups.Filled(
                groups=groups,
                surplus=[],
                num_drawn=len(groups),
                num_varying=len(groups),
                num_generations=1,
            )
            return filled, _sum_up(told)
        filled = rlvr_groups.fill(
            asked.feed.surplus,
            draw,
            options,
            num_prompts=self._options.rollout.num_prompts,
            step=step,
        )
        return filled, _sum_up(told) | rlvr_groups.told_of(filled, step=step)

    def _draw(
        self, draw: Draw, asked: rlvr_groups.Prompts, key: jax.Array, step: int
    ) -> tuple[list[Group], metrics.Metrics]:
        """Draw responses to prompts and judge them."""
        drawn = draw(asked.prompts, key)
        begun = time.monotonic()
        each = self._options.rollout.num_responses
        rewards = self._judge.grade(responses.tasks(asked.rows, drawn.segments, num_responses=each))
        told = drawn.metrics() | rlvr_advantages.told_of(rewards, num_responses=each)
        told["time/judge_seconds"] = metrics.mean([time.monotonic() - begun])
        return rlvr_groups.make(asked, drawn, rewards, step=step), told

    def _learn(
        self, params: nnx.State, groups: Sequence[Group], coefficient: float | None, step: int
    ) -> tuple[rlvr_updates.Batches, float | None, metrics.Metrics]:
        """Return the batches of the rollout's parts, and the next coefficient of the KL."""
        options = self._options
        found = [one for group in groups for one in group.responses]
        lengths = np.array([len(one.tokens) for one in found], np.int32)
        is_older = np.array([group.step < step for group in groups for _ in group.responses], bool)
        max_tokens = options.rollout.max_response_tokens
        penalties = rlvr_advantages.overlong_penalties(
            lengths, options.overlong, max_response_tokens=max_tokens
        )
        rewards = np.array([one.reward.total for one in found], np.float32) + penalties
        per_part = options.rollout.num_prompts // options.train.num_minibatches
        laid = [
            self._lay(groups[number * per_part : (number + 1) * per_part])
            for number in range(options.train.num_minibatches)
        ]
        parts = self._with_logprobs(params, [self._to_devices(one.batch) for one in laid])
        distance = None
        if options.reference.reward_coefficient is not None:
            given = options.reference.reward_coefficient if coefficient is None else coefficient
            distance = _distance(laid, parts, given, max_tokens, is_older=is_older)
        each = options.rollout.num_responses
        advantages, next_coefficient, told = self._compare(
            rewards,
            np.repeat(np.arange(len(groups), dtype=np.int32), each),
            lengths,
            num_groups=options.rollout.num_prompts,
            max_response_tokens=max_tokens,
            distance=distance,
        )
        told = told | self._told_of_length(found, penalties)
        columns = _columns(found, advantages, penalties, options.overlong)
        segments = [one.segments for one in found]
        self._dump.write(step, [group.row for group in groups], segments, columns)
        is_kept = np.array([one.segments.ended for one in found], bool)
        if not options.overlong.is_filtered:
            is_kept = np.ones(len(found), bool)
        learned = self._finish(laid, parts, advantages, is_kept, is_older)
        return learned, None if coefficient is None else next_coefficient, told

    def _lay(self, groups: Sequence[Group]) -> policy_batch.Laid:
        """Pack one part of a rollout; a step that found too few groups may leave it empty."""
        numbered = [(number, one) for number, group in enumerate(groups) for one in group.responses]
        return policy_batch.lay(
            [group.prompt for group in groups],
            [Continuation(prompt=number, tokens=one.tokens) for number, one in numbered],
            [one.logprobs for _, one in numbered],
            self._shape,
            self._model.config,
        )

    def _with_logprobs(
        self, params: nnx.State, parts: Sequence[policy_batch.PolicyBatch]
    ) -> list[policy_batch.PolicyBatch]:
        """Add what the trainer and the reference policy think of the responses, where needed."""
        options = self._options
        is_old = options.train.num_updates > 1 or options.reference.reward_coefficient is not None
        found = []
        for part in parts:
            old = self._to_devices(self._logprobs(params, part)) if is_old else None
            reference = None
            if self._reference is not None:
                reference = self._to_devices(self._logprobs(self._reference, part))
            found.append(dataclasses.replace(part, old_logprobs=old, reference_logprobs=reference))
        return found

    def _finish(
        self,
        laid: Sequence[policy_batch.Laid],
        parts: Sequence[policy_batch.PolicyBatch],
        advantages: np.ndarray,
        is_kept: np.ndarray,
        is_older: np.ndarray,
    ) -> rlvr_updates.Batches:
        """Add advantages; responses that are not kept count nowhere.

        Groups kept from an earlier step are marked: they learn with the log-probs that drew them.
        """
        finished, done = [], 0
        for one, part in zip(laid, parts, strict=True):
            own = slice(done, done + len(one.places))
            done += len(one.places)
            changes = {"advantages": one.spread(advantages[own])}
            if self._options.overlong.is_filtered:
                changes["lengths"] = one.lengths(is_kept[own])
            if self._options.groups.keep != "all":
                changes["is_older"] = one.mark(is_older[own])
            if self._options.train.num_updates == 1:
                # No update lies between drawing and learning, except for older groups.
                part = dataclasses.replace(part, old_logprobs=None)
            finished.append(dataclasses.replace(part, **self._to_devices(changes)))
        return tuple(finished)

    def _told_of_length(
        self, found: Sequence[rlvr_groups.Response], penalties: np.ndarray
    ) -> metrics.Metrics:
        told = {}
        if self._options.overlong.buffer_tokens is not None:
            told["reward/overlong_penalty_mean"] = metrics.mean(penalties)
        if self._options.overlong.is_filtered:
            cut = [not one.segments.ended for one in found]
            told["rollout/filtered_fraction"] = metrics.mean(cut)
        return told

    def _to_devices(self, tree):
        return self._devices.put(tree, num_rows=self._shape.microbatch_rows)


def _sum_up(told: Sequence[metrics.Metrics]) -> metrics.Metrics:
    """Merge the metrics of a step's generations; times are added up. Of none there are none."""
    if not told:
        return {}
    merged = told[0]
    for one in told[1:]:
        merged = {name: merged[name].merge(one[name]) for name in merged}
    return {
        name: metrics.Mean(total=one.total, weight=np.float32(1)) if "time/" in name else one
        for name, one in merged.items()
    }


def _distance(
    laid: Sequence[policy_batch.Laid],
    parts: Sequence[policy_batch.PolicyBatch],
    coefficient: float,
    max_response_tokens: int,
    *,
    is_older: np.ndarray,
) -> rlvr_advantages.Distance:
    """Lay the log-probs of all parts out response by response, on the host.

    Those of older responses are the sampler's, of the policy that drew them.
    """
    arrays = batches.to_host(
        [(part.old_logprobs, part.reference_logprobs, part.sampler_logprobs) for part in parts]
    )
    by_response = [
        [one.read(values, max_response_tokens) for values in of_part]
        for one, of_part in zip(laid, arrays, strict=True)
    ]
    old, reference, sampler = (np.concatenate(values) for values in zip(*by_response, strict=True))
    old = np.where(is_older[:, None], sampler, old)
    return rlvr_advantages.Distance(
        old_logprobs=old, reference_logprobs=reference, coefficient=coefficient
    )


def _columns(
    found: Sequence[rlvr_groups.Response],
    advantages: np.ndarray,
    penalties: np.ndarray,
    overlong: rlvr_config.Overlong,
) -> dict[str, list]:
    """Return what a dump tells of each response; of token advantages their mean."""
    if advantages.ndim == 2:
        lengths = np.array([len(one.tokens) for one in found])
        advantages = advantages.sum(-1) / np.maximum(lengths, 1)
    columns = {
        "reward": [np.float32(one.reward.total) for one in found],
        "accuracy": [one.reward.accuracy for one in found],
        "reason": [one.reward.reason.value for one in found],
        "advantage": list(advantages),
    }
    if overlong.buffer_tokens is not None:
        columns["overlong_penalty"] = list(penalties)
    return columns
