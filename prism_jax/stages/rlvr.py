"""Stage 3, RL with verifiable rewards: `python -m prism_jax rlvr --config=configs/rlvr.py:4b …`.

Each step draws responses to some prompts, rewards them by their answers (0.8) and their format
(0.2), compares each reward with those of the other responses to its prompt, and takes one update
of the policy. The update is strictly on-policy: there is no reference policy and no KL term.

`config.model.folder` is the aligned policy: the workdir of `align` (or `sft`), or a Hugging Face
folder. Runs on TPU, GPU or CPU; configs/rlvr.py names sizes, hardware and sources.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import numpy as np

from models.inputs import Example
from prism_jax import (
    batches,
    configuration,
    loop,
    metrics,
    optim,
    policy_update,
    train_state,
    train_step,
)
from prism_jax.continuations import RowShape
from prism_jax.data import encode, processor, records, steps
from prism_jax.losses import advantage
from prism_jax.rewards import score, workers
from prism_jax.stages import (
    asking,
    evaluate,
    policy_rows,
    responses,
    rollouts,
    running,
    sampled,
    setup,
)

# May change between a run and its continuation; the prompts themselves are compared.
_MAY_DIFFER = (
    "prompts.path",
    "prompts.image_root",
    "prompts.cache_dir",
    "rewards.num_workers",
    "rollout.chunk_tokens",
    "rollout.dump_every_steps",
    "train.num_threads",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advantage(configuration.Section):
    """Name how rewards of one prompt's responses are compared; see `losses.advantage`."""

    kind: Literal["grpo", "dr_grpo", "rloo"]
    eps: float | None  # of "grpo" alone

    def problems(self) -> list[str]:
        """See `Section`."""
        if (self.eps is not None) == (self.kind == "grpo"):
            return []
        return [f"eps must be given for grpo and be None for others, got {self.eps}"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(configuration.Section):
    """Hold the configuration of the stage."""

    seed: int
    model: configuration.Model
    prompts: sampled.Prompts
    rollout: rollouts.Rollout
    rewards: evaluate.Rewards
    advantage: Advantage
    algorithm: policy_update.Algorithm
    rows: rollouts.Rows
    train: policy_rows.Train
    optim: configuration.Optim
    mesh: configuration.Mesh
    checkpoint: configuration.Checkpoint
    resume: configuration.Resume
    log: configuration.Log

    def problems(self) -> list[str]:
        """See `Section`."""
        return configuration.at_least(self, 0, "seed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """Hold the prompts of a step."""

    rows: list[records.PromptRow]
    prompts: list[Example]


def main(argv: Sequence[str]) -> None:
    """Train a policy on verifiable rewards."""
    begun = time.monotonic()
    config, workdir = configuration.read(argv, command="rlvr")
    options = configuration.parse(Config, config)
    devices = setup.open_devices(options.mesh, options.model)
    rollouts.require_one_process("rlvr")
    keys = running.keys(options.seed)
    with running.hold(workdir) as folder, jax.set_mesh(devices.mesh):
        files = setup.keep_files(options.model, folder)
        model = setup.open_model(options.model, devices, files=files, is_discriminator=False)
        identity = running.identity("rlvr", config, [model], may_differ=_MAY_DIFFER)
        if running.is_finished(folder, identity):
            return
        words, opened = open_prompts(options, files)
        shape = policy_rows.shape_of(options.rows, options.rollout, opened.sizes, devices)
        num_steps = options.train.num_steps
        optimizer = setup.make_optimizer(options.optim, model.params, num_steps=num_steps)
        start = setup.start_of(model, optimizer, devices, key=keys.init)
        update = make_update(options, devices, model, optimizer, start, shape)
        with options.rewards.open_judge() as judge:
            experience = Experience(
                options,
                devices,
                model,
                words=words,
                sizes=opened.sizes,
                judge=judge,
                shape=shape,
                dump=rollouts.Dump(folder, options.rollout.dump_every_steps),
            )
            running.run(
                running.Run(
                    identity=identity,
                    workdir=folder,
                    seed=options.seed,
                    key=keys.run,
                    begun=begun,
                    num_steps=num_steps,
                    evaluate_every_steps=None,
                    max_skipped_in_row=options.train.max_skipped_in_row,
                    watched=(
                        "reward/total_mean",
                        "reward/accuracy_mean",
                        "rollout/format_fraction",
                    ),
                    checkpoint=options.checkpoint,
                    resume=options.resume,
                    log=options.log,
                ),
                loop.Stage(
                    experience=experience,
                    update=update,
                    evaluate=None,
                    skip_counters=("optim/skipped_in_row",),
                ),
                prompt_steps(options, words, opened),
                abstract_state=start.abstract,
                make_state=start.make,
                summary={},
            )


def open_prompts(options: Config, files: pathlib.Path) -> tuple[processor.Processor, asking.Opened]:
    """Return the processor and the validated prompts, each with a ground truth."""
    words = rollouts.processor_of(
        files, min_pixels=options.prompts.min_pixels, max_pixels=options.prompts.max_pixels
    )
    return words, sampled.open_prompts(options.prompts, words, need_teacher=False, need_answer=True)


def prompt_steps(options: Config, words: processor.Processor, opened: asking.Opened) -> steps.Steps:
    """Return the prompts of the run, step by step."""
    return rollouts.prompt_steps(
        opened,
        lambda rows: Asked(rows=list(rows), prompts=rollouts.encode_prompts(rows, words)),
        num_prompts=options.rollout.num_prompts,
        num_steps=options.train.num_steps,
        seed=options.seed,
        num_threads=options.train.num_threads,
    )


class Experience:
    """Turn a step's prompts into rows to learn from: respond, judge, compare, pack."""

    def __init__(
        self,
        options: Config,
        devices: setup.Devices,
        model: setup.Model,
        *,
        words: processor.Processor,
        sizes: Sequence[encode.Size],
        judge: workers.JudgePool,
        shape: RowShape,
        dump: rollouts.Dump,
    ):
        self._options, self._devices, self._model = options, devices, model
        self._judge, self._shape, self._dump = judge, shape, dump
        self._sampler = rollouts.Sampler(
            options.rollout,
            model,
            devices,
            words=words,
            sizes=sizes,
            gate=options.rewards.judge,
        )
        self._compare = make_advantage(options.advantage, num_groups=options.rollout.num_prompts)

    def __call__(
        self, state: train_state.TrainState, asked: Asked, key: jax.Array
    ) -> tuple[policy_update.PolicyBatch, metrics.Metrics]:
        """Return the rows on the devices, and what the responses were like."""
        drawn = self._sampler(state.params, asked.prompts, key)
        begun = time.monotonic()
        each = self._options.rollout.num_responses
        rewards = self._judge.grade(responses.tasks(asked.rows, drawn.segments, num_responses=each))
        judged = time.monotonic()
        totals = np.array([reward.total for reward in rewards], np.float32)
        prompt_id = np.repeat(np.arange(len(asked.rows), dtype=np.int32), each)
        advantages = np.asarray(self._compare(totals, prompt_id))
        columns = {
            "reward": totals,
            "accuracy": [reward.accuracy for reward in rewards],
            "reason": [reward.reason.value for reward in rewards],
            "advantage": advantages,
        }
        self._dump.write(int(state.step) + 1, asked.rows, drawn, columns)
        batch = policy_rows.pack(asked.prompts, drawn, advantages, self._shape, self._model)
        batch = batches.to_devices(batch, self._devices.mesh, self._devices.rules)
        told = drawn.told() | told_of_rewards(rewards, num_responses=each)
        told["time/judge_seconds"] = rollouts.mean([judged - begun])
        told["time/pack_seconds"] = rollouts.mean([time.monotonic() - judged])
        return batch, told


def told_of_rewards(rewards: Sequence[score.Reward], *, num_responses: int) -> metrics.Metrics:
    """Return the rewards' means, why they are what they are, and how many prompts teach nothing."""
    groups = np.array([reward.total for reward in rewards]).reshape(-1, num_responses)
    counts = score.count_reasons(rewards)
    return {
        "reward/total_mean": rollouts.mean(groups),
        "reward/accuracy_mean": rollouts.mean([reward.accuracy for reward in rewards]),
        "reward/format_mean": rollouts.mean([reward.format for reward in rewards]),
        "reward/flat_groups_fraction": rollouts.mean(np.ptp(groups, axis=1) == 0),
        **{
            f"reward/reason_{reason}_fraction": rollouts.mean([count / len(rewards)])
            for reason, count in counts.items()
        },
    }


def make_advantage(
    options: Advantage, *, num_groups: int
) -> Callable[[np.ndarray, np.ndarray], jax.Array]:
    """Return the jitted (rewards, prompt_id) -> advantages: the one place where it is chosen."""
    if options.kind == "rloo":
        found = functools.partial(advantage.rloo, num_groups=num_groups)
    elif options.kind == "dr_grpo":
        found = functools.partial(advantage.dr_grpo, num_groups=num_groups)
    else:
        found = functools.partial(advantage.grpo, num_groups=num_groups, eps=options.eps)
    return jax.jit(found)


def make_update(
    options: Config,
    devices: setup.Devices,
    model: setup.Model,
    optimizer: optim.Optimizer,
    start: setup.Start,
    shape: RowShape,
) -> train_step.TrainStep:
    """Return the update of the policy."""
    settings = policy_rows.settings(options.train, options.rollout, options.model, devices)
    return policy_rows.make_update(options.algorithm, settings, model, optimizer, start, shape)
