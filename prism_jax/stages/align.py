"""Stage 2, alignment: `python -m prism_jax align --config=configs/align.py:4b --workdir=…`.

    prompts ─→ policy ─→ responses ─→ caption, cot ─┐
                 ↑                                  ├─→ discriminator ─→ scores ─→ advantages ─┐
                 │        teacher ─→ caption, cot ──┘         ↑               │                │
                 │                                            └── teacher above student       │
                 └───────────────────────── policy gradient ←──────────────────────────────────┘

Each step draws responses from the policy, cuts them into caption and cot, and lets the
discriminator score both. What a response scores above the others to its prompt is its advantage; a
malformed one pays a penalty. Then the discriminator learns to put the teacher's segments above the
policy's, and the policy learns from the advantages. There is no reference policy and no KL term.

The discriminator scores before it learns, each of the teacher's segments once a prompt; those same
scores give the gradient of its update, see `discriminator_update`.

`config.model.folder` is the policy: the workdir of `sft`, or a Hugging Face folder;
`config.discriminator.folder` the workdir of `warmup`, or a folder with a score head. Runs on TPU,
GPU or CPU; configs/align.py names sizes, hardware and sources.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from prism_jax import (
    batches,
    configuration,
    discriminator_update,
    loop,
    metrics,
    model_files,
    train_state,
    train_step,
)
from prism_jax.stages import (
    align_config,
    align_feed,
    align_segments,
    policy_rows,
    rollouts,
    running,
    segments,
    setup,
)

State = dict[str, train_state.TrainState]  # "policy" and "discriminator"

# May change between a run and its continuation; the prompts themselves are compared.
_MAY_DIFFER = (
    "discriminator.folder",
    "prompts.path",
    "prompts.image_root",
    "prompts.cache_dir",
    "rollout.chunk_tokens",
    "rollout.dump_every_steps",
    "train.num_threads",
)
_GAPS = tuple(f"discriminator/{name}_gap" for name in segments.NAMES)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned:
    """Hold what both models learn from in a step."""

    policy: Any  # PolicyBatch
    discriminator: Any  # SegmentBatch, with the gradient of each score


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
        feed = align_feed.Feed(options, policy, judge, files=files, own_files=own_files)
        shapes = feed.shapes(devices)
        starts, updates = open_updates(options, devices, policy, judge, shapes, key=keys.init)
        experience = Experience(
            options,
            devices,
            policy,
            judge,
            feed=feed,
            shapes=shapes,
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
                watched=(*_GAPS, "rollout/format_fraction", "rollout/response_tokens_mean"),
                checkpoint=options.checkpoint,
                resume=options.resume,
                log=options.log,
            ),
            loop.Stage(
                experience=experience,
                update=functools.partial(update, updates),
                evaluate=None,
                skip_counters=tuple(f"optim/{name}_skipped_in_row" for name in updates),
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
        dump: rollouts.Dump,
    ):
        self._options, self._devices = options, devices
        self._policy, self._judge, self._shapes, self._dump = policy, judge, shapes, dump
        self._sampler = rollouts.Sampler(
            options.rollout,
            policy,
            devices,
            words=feed.words,
            sizes=feed.sizes,
            gate=options.gate,
        )
        self._score = discriminator_update.make_scorer(
            judge.graphdef, score_settings(options, devices)
        )
        self._advantages = align_segments.make_advantages(options)
        self._pair = jax.jit(
            functools.partial(
                discriminator_update.score_gradients, rule=options.discriminator.rule(judge)
            )
        )

    def __call__(
        self, state: State, asked: align_feed.Asked, key: jax.Array
    ) -> tuple[Learned, metrics.Metrics]:
        """Return what both models learn from, on the devices, and what the responses were like."""
        drawn = self._sampler(state["policy"].params, asked.prompts, key)
        begun = time.monotonic()
        packed = align_segments.pack(asked, drawn, self._shapes.discriminator, self._judge)
        on_devices = self._to_devices(packed.batch)
        scores = align_segments.by_name(
            packed.read(jax.device_get(self._score(state["discriminator"].params, on_devices))),
            drawn.segments,
            num_prompts=len(asked.rows),
        )
        scored = time.monotonic()
        advantages = np.asarray(self._advantages(scores))
        pulls, told = self._pair(scores)
        learned = Learned(
            policy=self._to_devices(
                policy_rows.pack(
                    asked.prompts, drawn, advantages, self._shapes.policy, self._policy
                )
            ),
            discriminator=dataclasses.replace(
                on_devices,
                pulls=self._to_devices(
                    packed.pulls(align_segments.in_order(jax.device_get(pulls), drawn.segments))
                ),
            ),
        )
        step = int(state["policy"].step) + 1
        self._dump.write(step, asked.rows, drawn, align_segments.columns(scores, advantages))
        told = told | drawn.told() | told_of_advantages(advantages)
        told["time/score_seconds"] = rollouts.mean([scored - begun])
        return learned, told

    def _to_devices(self, batch: Any) -> Any:
        return batches.to_devices(batch, self._devices.mesh, self._devices.rules)


def update(
    updates: Mapping[str, Callable], state: State, learned: Learned, key: jax.Array
) -> tuple[State, metrics.Metrics]:
    """Update the discriminator on (teacher, student) pairs, then the policy on its advantages."""
    discriminator, judged = updates["discriminator"](
        state["discriminator"], learned.discriminator, key
    )
    policy, told = updates["policy"](state["policy"], learned.policy, key)
    # The discriminator's loss is told with its pairs; this sum only carries their gradient.
    del judged["loss/total"]
    state = {"policy": policy, "discriminator": discriminator}
    return state, _named(judged, "discriminator") | _named(told, "policy")


def _named(told: metrics.Metrics, owner: str) -> metrics.Metrics:
    """Say in the names of a train step's own metrics of which model they are."""
    own = ("loss/", "optim/")
    return {
        name.replace("/", f"/{owner}_", 1) if name.startswith(own) else name: metric
        for name, metric in told.items()
    }


def told_of_advantages(advantages: np.ndarray) -> metrics.Metrics:
    """Return the spread of the advantages."""
    return {
        "reward/advantage_mean": rollouts.mean(advantages),
        "reward/advantage_absolute_mean": rollouts.mean(np.abs(advantages)),
    }


def score_settings(
    options: align_config.Config, devices: setup.Devices
) -> discriminator_update.Settings:
    """Return how scores are computed."""
    return discriminator_update.Settings(
        implementation=devices.attention, remat=options.discriminator.remat
    )


def open_updates(
    options: align_config.Config,
    devices: setup.Devices,
    policy: setup.Model,
    judge: setup.Model,
    shapes: align_feed.Shapes,
    *,
    key: jax.Array,
) -> tuple[dict[str, setup.Start], dict[str, train_step.TrainStep]]:
    """Return how the state of each model begins, and its update."""
    num_steps = options.train.num_steps
    optimizers = {
        "policy": setup.make_optimizer(options.optim, policy.params, num_steps=num_steps),
        "discriminator": setup.make_optimizer(
            options.discriminator.optim, judge.params, num_steps=num_steps
        ),
    }
    starts = {
        name: setup.start_of(model, optimizers[name], devices, key=jax.random.fold_in(key, number))
        for number, (name, model) in enumerate((("policy", policy), ("discriminator", judge)))
    }
    router = options.discriminator.rule(judge).router
    settings = score_settings(options, devices)

    def loss(model: nnx.Module, batch: discriminator_update.SegmentBatch, key: jax.Array):
        del key
        return discriminator_update.pulled_loss(model, batch, router, settings)

    coefficients = {discriminator_update.PULLS: 1.0}
    updates = {
        "policy": policy_rows.make_update(
            options.algorithm,
            policy_rows.settings(options.train, options.rollout, options.model, devices),
            policy,
            optimizers["policy"],
            starts["policy"],
            shapes.policy,
        ),
        "discriminator": train_step.make_train_step(
            judge.graphdef,
            loss,
            optimizers["discriminator"],
            weights_fn=lambda batch: discriminator_update.pulled_weights(batch, router),
            coefficients=coefficients | ({discriminator_update.ROUTER: router} if router else {}),
            num_microbatches=shapes.discriminator.num_microbatches,
            shardings=starts["discriminator"].shardings,
        ),
    }
    return starts, updates
