"""Stage 2, alignment: `python -m prism_jax align --config=configs/align.py:4b --workdir=…`.

    prompts ─→ policy ─→ responses ─→ caption, cot ─┐
                 ↑                                  ├─→ discriminator ─→ scores ─→ advantages ─┐
                 │        teacher ─→ caption, cot ──┘         ↑               │                │
                 │                                            └── teacher above student       │
                 └───────────────────────── policy gradient ←──────────────────────────────────┘

Each step draws responses from the policy, cuts them into caption and cot (or into what
`discriminator.view` says), and lets the discriminator score them. What a response scores above the
others to its prompt is its advantage; a malformed one pays a penalty. `advantage.mode` names one of
the six ways of `losses.advantage`; all but the default ask the judge for right and wrong. Then the
discriminator learns to put the teacher's segments above the policy's, and the policy learns from
the advantages. There is no reference policy and no KL term.

The discriminator scores before it learns, each of the teacher's segments once a prompt; those same
scores give the gradient of its update, see `discriminator_update`. Where it learns several times in
a step, or with dropout, each update has scores of its own. `pace` says how often each model learns.

`config.model.folder` is the policy: the workdir of `sft`, or a Hugging Face folder;
`config.discriminator.folder` the workdir of `warmup`, or a folder with a score head. Runs on TPU,
GPU or CPU; configs/align.py names sizes, hardware and sources.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from prism_jax import (
    batches,
    configuration,
    discriminator_update,
    loop,
    metrics,
    model_files,
)
from prism_jax.rewards import workers
from prism_jax.stages import (
    align_config,
    align_feed,
    align_honesty,
    align_segments,
    align_updates,
    policy_rows,
    rollouts,
    running,
    setup,
)

# May change between a run and its continuation; the prompts themselves are compared.
_MAY_DIFFER = (
    "discriminator.folder",
    "honesty",
    "prompts.path",
    "prompts.image_root",
    "prompts.cache_dir",
    "verifier.num_workers",
    "rollout.batch_responses",
    "rollout.tensor",
    "rollout.chunk_tokens",
    "rollout.dump_every_steps",
    "train.num_threads",
)


def main(argv: Sequence[str]) -> None:
    """Align a policy with a teacher it sees the texts of."""
    begun = time.monotonic()
    config, workdir = configuration.read(argv, command="align")
    options = configuration.parse(align_config.Config, config)
    devices = setup.open_devices(options.mesh, options.model)
    rollouts.require_one_process("align")
    keys = running.keys(options.seed)
    with running.hold(workdir) as folder, jax.set_mesh(devices.mesh):
        source = options.discriminator.model(options.model)
        files = setup.keep_files(options.model, folder)
        own_files = setup.keep_files(source, folder, name=model_files.DISCRIMINATOR_FOLDER)
        policy = setup.open_model(options.model, devices, files=files, is_discriminator=False)
        judge = setup.open_model(source, devices, files=own_files, is_discriminator=True)
        identity = running.identity("align", config, [policy, judge], may_differ=_MAY_DIFFER)
        if running.is_finished(folder, identity):
            return
        feed = align_feed.Feed(options, policy, judge, folder, files=files, own_files=own_files)
        shapes = feed.shapes(devices)
        starts, updates = align_updates.open_updates(
            options, devices, policy, judge, shapes, key=keys.init
        )
        gaps = (f"discriminator/{name}_gap" for name in options.discriminator.form.names)
        with contextlib.ExitStack() as stack:
            experience = Experience(
                options,
                devices,
                policy,
                judge,
                feed=feed,
                shapes=shapes,
                verifier=stack.enter_context(options.verifier.open_judge())
                if options.advantage.asks_judge
                else None,
                dump=rollouts.Dump(folder, options.rollout.dump_every_steps),
            )
            running.run(
                running.Run(
                    identity=identity,
                    workdir=folder,
                    seed=options.seed,
                    key=keys.run,
                    begun=begun,
                    num_steps=options.train.num_steps,
                    evaluate_every_steps=None,
                    max_skipped_in_row=options.train.max_skipped_in_row,
                    watched=(*gaps, "rollout/format_fraction", "rollout/response_tokens_mean"),
                    checkpoint=options.checkpoint,
                    resume=options.resume,
                    log=options.log,
                ),
                loop.Stage(
                    experience=experience,
                    update=functools.partial(align_updates.update, updates, options.pace),
                    evaluate=None,
                    skip_counters=tuple(f"optim/{name}_skipped_in_row" for name in starts),
                ),
                feed.train(),
                abstract_state={name: start.abstract for name, start in starts.items()},
                make_state=lambda: {name: start.make() for name, start in starts.items()},
                summary={},
            )


class Experience:
    """Turn a step's prompts into what both models learn from."""

    def __init__(
        self,
        options: align_config.Config,
        devices: setup.Devices,
        policy: setup.Model,
        judge: setup.Model,
        *,
        feed: align_feed.Feed,
        shapes: align_feed.Shapes,
        verifier: workers.JudgePool | None,
        dump: rollouts.Dump,
    ):
        self._options, self._devices, self._feed = options, devices, feed
        self._policy, self._judge, self._shapes, self._dump = policy, judge, shapes, dump
        self._verifier = verifier
        self._sampler = rollouts.Sampler(
            options.rollout,
            policy,
            devices,
            words=feed.words,
            sizes=feed.sizes,
            gate=options.gate,
        )
        self._score = discriminator_update.make_scorer(
            judge.graphdef, align_updates.score_settings(options, devices)
        )
        self._panel = align_honesty.Panel(
            options, devices, judge, feed=feed, shapes=shapes, score=self._score
        )
        self._advantages = align_segments.make_advantages(options)
        rule = options.discriminator.rule(judge)
        self._at = jax.jit(discriminator_update.at)
        self._pulls = jax.jit(functools.partial(discriminator_update.pulls, rule=rule))

    def __call__(
        self, state: align_updates.State, asked: align_feed.Asked, key: jax.Array
    ) -> tuple[align_updates.Learned, metrics.Metrics]:
        """Return what both models learn from, on the devices, and what the responses were like."""
        drawn = self._sampler(state["policy"].params, asked.prompts, key)
        begun = time.monotonic()
        packed, places = align_segments.pack(
            asked, drawn, self._feed, self._shapes.discriminator, self._judge
        )
        batch = self._to_devices(packed.batch)
        found = self._score(state["discriminator"].params, batch)
        scores = jax.device_get(self._at(found, places))
        scored = time.monotonic()
        format_ok, accuracy, verified = align_segments.verify(
            self._options, self._verifier, asked, drawn
        )
        advantages = np.asarray(self._advantages(scores, format_ok, accuracy))
        pulls, told = self._pulls(found, places)
        step = int(state["policy"].step)
        rows = None
        if self._options.pace.has_policy_update(step):
            rows = policy_rows.pack(
                asked.prompts, drawn, advantages, self._shapes.policy, self._policy
            )
        columns = align_segments.columns(scores, advantages)
        if self._options.advantage.asks_judge:
            columns["accuracy"] = accuracy
        self._dump.write(step + 1, asked.rows, drawn, columns)
        told = told | drawn.told() | told_of_advantages(advantages) | verified
        told |= self._panel(step + 1, state["discriminator"].params, asked, drawn, scores)
        told["time/score_seconds"] = rollouts.mean([scored - begun])
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
        "reward/advantage_mean": rollouts.mean(advantages),
        "reward/advantage_absolute_mean": rollouts.mean(np.abs(advantages)),
    }
