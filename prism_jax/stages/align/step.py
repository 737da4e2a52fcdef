"""A step of alignment."""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prism_jax import batches, metrics
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.policy import rollouts
from prism_jax.policy import update as policy_update
from prism_jax.rewards import workers
from prism_jax.running import dump as running_dump
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.align import advantages as align_advantages
from prism_jax.stages.align import config as align_config
from prism_jax.stages.align import feed as align_feed
from prism_jax.stages.align import honesty as align_honesty
from prism_jax.stages.align import segments as align_segments
from prism_jax.stages.align import updates as align_updates


class Experience:
    """Turn a step's prompts into what both models learn from."""

    def __init__(
        self,
        options: align_config.Config,
        devices: devices_lib.Devices,
        policy: setup_models.Model,
        discriminator: setup_models.Model,
        *,
        feed: align_feed.Feed,
        shapes: align_feed.Shapes,
        judge: workers.JudgePool | None,
        dump: running_dump.Dump,
    ):
        self._options, self._devices, self._feed = options, devices, feed
        self._policy, self._discriminator, self._shapes, self._dump = (
            policy,
            discriminator,
            shapes,
            dump,
        )
        self._judge = judge
        self._sampler = rollouts.Sampler(
            options.rollout,
            policy,
            devices,
            words=feed.words,
            sizes=feed.sizes,
            gate=options.gate,
        )
        self._score = discriminator_loss.make_scorer(
            discriminator.graphdef, align_updates.score_settings(options, devices)
        )
        self._panel = align_honesty.Panel(
            options, devices, discriminator, feed=feed, shapes=shapes, score=self._score
        )
        self._advantages = align_advantages.make_advantages(options)
        rule = options.discriminator.rule(discriminator)
        self._at = jax.jit(discriminator_loss.at)
        self._pulls = jax.jit(functools.partial(discriminator_loss.pulls, rule=rule))

    def __call__(
        self, state: align_updates.State, asked: align_feed.Asked, key: jax.Array
    ) -> tuple[align_updates.Learned, metrics.Metrics]:
        """Return what both models learn from, on the devices, and what the responses were like."""
        drawn = self._sampler(state["policy"].params, asked.prompts, key)
        begun = time.monotonic()
        packed, places = align_segments.pack(
            asked, drawn, self._feed, self._shapes.discriminator, self._discriminator
        )
        batch = self._to_devices(packed.batch)
        found = self._score(state["discriminator"].params, batch)
        scores = jax.device_get(self._at(found, places))
        scored = time.monotonic()
        format_ok, accuracy, verified = align_advantages.verify(
            self._options, self._judge, asked, drawn
        )
        advantages = np.asarray(self._advantages(scores, format_ok, accuracy))
        pulls, told = self._pulls(found, places)
        step = int(state["policy"].step)
        rows = None
        if self._options.pace.has_policy_update(step):
            rows = policy_update.pack(
                asked.prompts, drawn, advantages, self._shapes.policy, self._policy
            )
        columns = align_segments.columns(scores, advantages)
        if self._options.advantage.asks_judge:
            columns["accuracy"] = accuracy
        self._dump.write(step + 1, asked.rows, drawn.segments, columns)
        told = told | drawn.told() | told_of_advantages(advantages) | verified
        told |= self._panel(step + 1, state["discriminator"].params, asked, drawn, scores)
        told["time/score_seconds"] = metrics.mean([scored - begun])
        learned = align_updates.Learned(
            policy=None if rows is None else self._to_devices(rows),
            discriminator=dataclasses.replace(batch, pulls=pulls),
            places=places,
        )
        return learned, told

    def _to_devices(self, batch: Any) -> Any:
        return batches.to_devices(batch, self._devices.mesh, self._devices.rules)


def told_of_advantages(advantages: np.ndarray) -> metrics.Metrics:
    """Return the spread of the advantages."""
    return {
        "reward/advantage_mean": metrics.mean(advantages),
        "reward/advantage_absolute_mean": metrics.mean(np.abs(advantages)),
    }


def update(
    updates: align_updates.Updates,
    pace: align_config.Pace,
    state: align_updates.State,
    learned: align_updates.Learned,
    key: jax.Array,
) -> tuple[align_updates.State, metrics.Metrics]:
    """Update the discriminator on (teacher, student) pairs, then the policy on its advantages."""
    discriminator, batch = state["discriminator"], learned.discriminator
    for number in range(pace.discriminator_updates):
        own_key = jax.random.fold_in(key, number)
        if number or updates.is_always_fresh:
            batch = updates.refresh(discriminator.params, batch, learned.places, own_key)
        discriminator, judged = updates.discriminator(discriminator, batch, own_key)
    # The discriminator's loss is told with its pairs; this sum only carries their gradient.
    del judged["loss/total"]
    told = _named(judged, "discriminator")
    policy = state["policy"]
    if learned.policy is None:
        skipped = jnp.copy(policy.opt_state.num_skipped_in_row)
        told["optim/policy_skipped_in_row"] = metrics.Mean(total=skipped, weight=jnp.ones(()))
        policy = dataclasses.replace(policy, step=policy.step + 1)
    else:
        policy, own = updates.policy(policy, learned.policy, key)
        told |= _named(own, "policy")
    return {"policy": policy, "discriminator": discriminator}, told


def _named(told: metrics.Metrics, owner: str) -> metrics.Metrics:
    """Say in the names of a train step's own metrics of which model they are."""
    own = ("loss/", "optim/")
    return {
        name.replace("/", f"/{owner}_", 1) if name.startswith(own) else name: metric
        for name, metric in told.items()
    }
