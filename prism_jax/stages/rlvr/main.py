"""Stage 3, RL with verifiable rewards: `python -m prism_jax rlvr --config=configs/rlvr.py:4b …`.

Each step draws responses to some prompts, rewards them by their answers (0.8) and their format
(0.2), compares each reward with those of the other responses to its prompt, and updates the policy:
once, strictly on-policy, or several times. The configuration chooses the algorithm, see
`stages.rlvr.config`. `step.py` is the step itself.

`config.model.folder` is the aligned policy: the workdir of `align` (or `sft`), or a Hugging Face
folder. Runs on TPU, GPU or CPU; configs/rlvr.py names sizes, hardware and sources.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from prism_jax.checkpoints import meta as checkpoint_meta
from prism_jax.data import processor
from prism_jax.policy import distill as policy_distill
from prism_jax.policy import held_out, rollouts
from prism_jax.policy import responses as policy_responses
from prism_jax.rows import RowShape
from prism_jax.running import best as best_lib
from prism_jax.running import dump as running_dump
from prism_jax.running import loop
from prism_jax.running import run as run_lib
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.setup import prompts as prompts_lib
from prism_jax.stages.rlvr import advantages as rlvr_advantages
from prism_jax.stages.rlvr import adversary as rlvr_adversary
from prism_jax.stages.rlvr import adversary_opening
from prism_jax.stages.rlvr import config as rlvr_config
from prism_jax.stages.rlvr import feed as rlvr_feed
from prism_jax.stages.rlvr import packing as rlvr_packing
from prism_jax.stages.rlvr import reference as rlvr_reference
from prism_jax.stages.rlvr import report as rlvr_report
from prism_jax.stages.rlvr import sampling as rlvr_sampling
from prism_jax.stages.rlvr import step as rlvr_step
from prism_jax.stages.rlvr import updates as rlvr_updates

_WATCHED = ("reward/total_mean", "reward/accuracy_mean", "rollout/format_fraction")


def main(argv: Sequence[str]) -> None:
    """Train a policy on verifiable rewards."""
    with run_lib.opened(argv, "rlvr", rlvr_config.Config) as run:
        options, devices = run.options, run.devices
        # The small files are kept in the run: it can be resumed and exported without the folder
        # that it started from.
        files = setup_models.keep_files(options.model, run.folder)
        model = setup_models.open_model(options.model, devices, files=files, is_discriminator=False)
        adversary = adversary_opening.open_model(options, devices, run.folder)
        models = (model,) if adversary is None else (model, adversary.model)
        identity = run.identity(*models, digests=options.rewards.digests())
        # Before data and weights are read, which a finished run does not need.
        if run.is_finished(identity):
            return
        open_cutter = None if adversary is None else functools.partial(adversary.cutter, options)
        words, opened = rlvr_feed.open_prompts(
            options, files, folder=run.folder, open_cutter=open_cutter
        )
        shape = rlvr_updates.shape_of(options, opened.sizes, devices)
        # The learning-rate schedule counts updates, of which a step has several.
        num_updates = options.train.num_steps * options.train.num_updates
        optimizer = setup_models.make_optimizer(options.optim, model.params, num_steps=num_updates)
        start = setup_models.start_of(model, optimizer, devices, key=run.keys.init)
        # Without a folder the reference is the start of the run, also when it is resumed.
        reference = rlvr_reference.open_reference(options.reference, model, devices, start)
        sampler = open_sampler(options, model, devices, words, opened)
        teacher = policy_distill.open_teacher(options.distill, model, devices, words)
        feed = rlvr_feed.open_feed(options, words, opened, sampler.reader, reference)
        update = functools.partial(
            rlvr_step.update,
            rlvr_updates.make_update(options, devices, model, optimizer, start, shape, teacher),
            num_epochs=options.train.num_epochs,
        )
        scoring = None
        if adversary is not None:
            scoring, update, start = adversary_opening.open_parts(
                options,
                devices,
                adversary,
                open_cutter(words),
                opened,
                start,
                update,
                key=jax.random.fold_in(run.keys.init, 1),
            )
        dump = running_dump.opened(run, options.rollout.dump_every_steps)
        with options.rewards.open_judge() as judge:
            experience = open_experience(
                options,
                devices,
                model,
                feed=feed,
                sampler=sampler,
                judge=judge,
                shape=shape,
                reference=None if reference is None else reference.params,
                dump=dump,
                scoring=scoring,
                teacher=teacher,
            )
            evaluation = open_evaluation(run, model, words=words, judge=judge)
            train(run, identity, experience, update, teacher, start, evaluation)


def train(
    run: run_lib.Run[rlvr_config.Config],
    identity: checkpoint_meta.RunIdentity,
    experience: rlvr_step.Experience,
    update: adversary_opening.PolicyUpdate,
    teacher: policy_distill.Teacher | None,
    start: setup_models.Start,
    evaluation: tuple[Any, best_lib.Best | None],
) -> None:
    """Train to the end of the run."""
    options = run.options
    evaluate, best = evaluation
    counters, watched = ("optim/skipped_in_row",), (*_WATCHED, *held_out.WATCHED)
    if experience.adversary is not None:
        counters += ("optim/discriminator_skipped_in_row",)
        names = options.adversary.discriminator.form.names
        watched += tuple(f"discriminator/{name}_gap" for name in names)
    run.train(
        identity,
        loop.Stage(
            experience=experience,
            update=update,
            evaluate=evaluate,
            best=best,
            skip_counters=counters,
        ),
        policy_distill.with_teacher(experience.feed, teacher),
        start,
        limits=loop.Limits(
            num_steps=options.train.num_steps,
            evaluate_every_steps=options.held_out.every_steps,
            max_skipped_in_row=options.train.max_skipped_in_row,
        ),
        watched=watched,
    )


def open_evaluation(
    run: run_lib.Run[rlvr_config.Config],
    model: setup_models.Model,
    *,
    words: processor.Processor,
    judge: policy_responses.Judge,
) -> tuple[Callable[[Any, int], dict[str, float]] | None, best_lib.Best | None]:
    """Return the evaluation on held-out prompts and the comparison of steps; None without any."""
    options = run.options
    if not options.held_out.path:
        return None, None
    evaluation = held_out.Evaluation(
        options.held_out,
        options.rollout,
        options.prompts,
        model,
        run.devices,
        words=words,
        gate=options.rewards.judge,
        judge=judge,
        key=run.keys.run,
    )
    has_two = options.adversary is not None

    def evaluate(state: Any, step: int) -> dict[str, float]:
        del step
        return evaluation((state["policy"] if has_two else state).params)

    return evaluate, best_lib.Best(
        run.folder,
        metric=held_out.METRIC,
        is_kept=options.held_out.is_best_kept,
        patience=options.held_out.patience,
    )


def open_experience(
    options: rlvr_config.Config,
    devices: devices_lib.Devices,
    model: setup_models.Model,
    *,
    feed: rlvr_feed.Feed,
    sampler: rlvr_sampling.Sampler,
    judge: policy_responses.Judge,
    shape: RowShape,
    reference: nnx.State | None,
    dump: running_dump.Dump,
    scoring: rlvr_adversary.Scoring | None = None,
    teacher: policy_distill.Teacher | None = None,
) -> rlvr_step.Experience:
    """Return the parts of a step; nothing is compiled before the first one."""
    return rlvr_step.Experience(
        adversary=scoring,
        distill=policy_distill.make(options.distill, teacher),
        options=options,
        feed=feed,
        sampling=rlvr_sampling.Sampling(options, sampler, judge),
        packer=rlvr_packing.Packer(options, devices, model, shape=shape, reference=reference),
        comparison=rlvr_advantages.Comparison(
            options.advantage,
            options.reference,
            options.overlong,
            num_groups=options.rollout.num_prompts,
            max_response_tokens=options.rollout.max_response_tokens,
        ),
        report=rlvr_report.Report(
            dump=dump, overlong=options.overlong, is_refilled=options.groups.keep != "all"
        ),
    )


def open_sampler(
    options: rlvr_config.Config,
    model: setup_models.Model,
    devices: devices_lib.Devices,
    words: processor.Processor,
    opened: prompts_lib.Opened,
) -> rollouts.Sampler:
    """Return the sampler for the prompts of a generation."""
    # A generation may have more prompts than a step learns from.
    return rollouts.Sampler(
        dataclasses.replace(options.rollout, num_prompts=options.generation_prompts),
        model,
        devices,
        words=words,
        sizes=opened.sizes,
        gate=options.rewards.judge,
    )
