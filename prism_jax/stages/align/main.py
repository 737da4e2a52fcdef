"""Stage 2, alignment: `python -m prism_jax align --config=configs/align.py:4b --workdir=…`.

Each step draws responses from the policy, cuts them into caption and cot (or into the segments of
`discriminator.view`), and lets the discriminator score them. A response's advantage is how far its
score lies above those of the other responses to the same prompt; a malformed one pays a penalty.
`advantage.mode` names one of the six ways of `losses.advantage`; all but the default ask the judge
whether answers are right. Then the discriminator learns to put the teacher's segments above the
policy's, and the policy learns from the advantages, without a reference policy or a KL term.

All segments are scored before the discriminator is updated. A teacher segment is scored once per
prompt, and the same scores give the gradient for the update, see `discriminator.loss`. With several
updates in a step, or with dropout, each update computes new scores. `pace` sets the number of
updates of each model. `step.py` is the step itself.

`config.model.folder` is the policy: the workdir of `sft`, or a Hugging Face folder;
`config.discriminator.folder` the workdir of `warmup`, or a folder with a score head. Runs on TPU,
GPU or CPU; configs/align.py names sizes, hardware and sources.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence

from prism_jax.checkpoints import model_files
from prism_jax.data import steps
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.discriminator import step_scores
from prism_jax.policy import distill as policy_distill
from prism_jax.policy import held_out, rollouts
from prism_jax.running import best as best_lib
from prism_jax.running import dump as running_dump
from prism_jax.running import loop
from prism_jax.running import run as run_lib
from prism_jax.setup import judging
from prism_jax.setup import models as setup_models
from prism_jax.stages.align import advantages as align_advantages
from prism_jax.stages.align import config as align_config
from prism_jax.stages.align import feed as align_feed
from prism_jax.stages.align import gate as align_gate
from prism_jax.stages.align import honesty as align_honesty
from prism_jax.stages.align import mean_weights
from prism_jax.stages.align import replay as align_replay
from prism_jax.stages.align import report as align_report
from prism_jax.stages.align import step as align_step
from prism_jax.stages.align import updates as align_updates

_WATCHED = ("rollout/format_fraction", "rollout/response_tokens_mean")


def main(argv: Sequence[str]) -> None:
    """Align a policy with a teacher of which only the texts are known."""
    with run_lib.opened(argv, "align", align_config.Config) as run, contextlib.ExitStack() as stack:
        options, devices = run.options, run.devices
        source = options.discriminator.model(options.model)
        # Both models' small files are kept in the run: it can be resumed and exported without the
        # folders that it started from.
        files = setup_models.keep_files(options.model, run.folder)
        discriminator_files = setup_models.keep_files(
            source, run.folder, name=model_files.DISCRIMINATOR_FOLDER, is_discriminator=True
        )
        policy = setup_models.open_model(
            options.model, devices, files=files, is_discriminator=False
        )
        discriminator = setup_models.open_model(
            source, devices, files=discriminator_files, is_discriminator=True
        )
        identity = run.identity(policy, discriminator)
        # Before data and weights are read, which a finished run does not need.
        if run.is_finished(identity):
            return
        feed = align_feed.Feed(
            options,
            policy,
            discriminator,
            run.folder,
            files=files,
            discriminator_files=discriminator_files,
        )
        shapes = feed.shapes(devices)
        teacher = policy_distill.open_teacher(options.distill, policy, devices, feed.words)
        starts, updates = align_updates.open_updates(
            options, devices, policy, discriminator, shapes, teacher, key=run.keys.init
        )
        # Its processes take memory, and the default mode has no use for them.
        judge = None
        if options.advantage.asks_judge or options.held_out.path:
            judge = stack.enter_context(options.judge.open())
        experience = open_experience(
            run, policy, discriminator, feed=feed, shapes=shapes, judge=judge, teacher=teacher
        )
        prompts = experience.replay or _data(options, discriminator, feed, shapes)
        start = setup_models.together(starts)
        if updates.average is not None:
            start = mean_weights.with_mean(start)
        evaluate, best = open_evaluation(run, policy, feed=feed, judge=judge)
        gaps = (f"discriminator/{name}_gap" for name in options.discriminator.form.names)
        run.train(
            identity,
            loop.Stage(
                experience=experience,
                update=functools.partial(align_step.update, updates, options.pace),
                evaluate=evaluate,
                best=best,
                # Either model may diverge while the other learns on, so each has a counter.
                skip_counters=tuple(f"optim/{name}_skipped_in_row" for name in starts),
            ),
            policy_distill.with_teacher(prompts, teacher),
            start,
            limits=_limits(options),
            watched=(*gaps, *_WATCHED, *held_out.WATCHED),
        )


def _data(
    options: align_config.Config,
    discriminator: setup_models.Model,
    feed: align_feed.Feed,
    shapes: align_feed.Shapes,
) -> steps.Steps:
    return feed.train(
        shapes.discriminator, is_split_seen=options.discriminator.is_split_seen(discriminator)
    )


def _limits(options: align_config.Config) -> loop.Limits:
    return loop.Limits(
        num_steps=options.train.num_steps,
        evaluate_every_steps=options.held_out.every_steps,
        max_skipped_in_row=options.train.max_skipped_in_row,
    )


def open_evaluation(
    run: run_lib.Run[align_config.Config],
    policy: setup_models.Model,
    *,
    feed: align_feed.Feed,
    judge: judging.SharedJudge | None,
) -> tuple[Callable[[align_updates.State, int], dict[str, float]] | None, best_lib.Best | None]:
    """Return the evaluation on held-out prompts and the comparison of steps; None without any."""
    options = run.options
    if not options.held_out.path:
        return None, None
    evaluation = held_out.Evaluation(
        options.held_out,
        options.rollout,
        options.prompts,
        policy,
        run.devices,
        words=feed.words,
        gate=options.gate,
        judge=judge,
        key=run.keys.run,
    )
    return lambda state, step: evaluation(state["policy"].params), best_lib.Best(
        run.folder,
        metric=held_out.METRIC,
        is_kept=options.held_out.is_best_kept,
        patience=options.held_out.patience,
    )


def open_experience(
    run: run_lib.Run[align_config.Config],
    policy: setup_models.Model,
    discriminator: setup_models.Model,
    *,
    feed: align_feed.Feed,
    shapes: align_feed.Shapes,
    judge: judging.SharedJudge | None,
    teacher: policy_distill.Teacher | None = None,
) -> align_step.Experience:
    """Return the parts of a step; nothing is compiled before the first one."""
    options, devices = run.options, run.devices
    score = discriminator_loss.make_scorer(
        discriminator.graphdef, align_updates.score_settings(options, devices)
    )
    panel = align_honesty.Panel(
        options, devices, discriminator, feed=feed, shapes=shapes, score=score
    )
    dump = running_dump.opened(run, options.rollout.dump_every_steps)
    sampler = rollouts.Sampler(
        options.rollout, policy, devices, words=feed.words, sizes=feed.sizes, gate=options.gate
    )
    has_gate = options.advantage.teacher_gate != "off"
    steadying, replay = options.discriminator.steadying, None
    if steadying.replay_prompts is not None:
        replay = align_replay.Replay(
            _data(options, discriminator, feed, shapes),
            num_prompts=steadying.replay_prompts,
            num_steps=steadying.replay_steps,
            read=feed.prompts_of,
            reader=sampler.reader,
        )
    return align_step.Experience(
        pace=options.pace,
        gate=align_gate.TeacherGate(judge) if has_gate else None,
        replay=replay,
        sampler=sampler,
        scorer=step_scores.Scorer(
            feed.cutter, devices, discriminator, shape=shapes.discriminator, score=score
        ),
        comparison=align_advantages.Comparison(options, judge),
        report=align_report.Report(dump=dump, panel=panel),
        distill=policy_distill.make(options.distill, teacher),
        policy=policy,
        shapes=shapes,
        devices=devices,
    )
