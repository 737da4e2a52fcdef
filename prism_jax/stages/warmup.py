"""Discriminator warm-up: `python -m prism_jax warmup --config=configs/warmup.py:4b --workdir=…`.

The discriminator learns to score a teacher's segment above a student's: the mean of
−log σ(teacher − student) over the pairs of captions and of cots (or of what `data.view` says), with
a term that keeps the router's experts in use. Held-out pairs tell how often it is right. Alignment
goes on from its workdir.

`config.model.folder` is the trunk: a mixture of experts that `upcycle` wrote (the method), a dense
model, or the workdir of a stage, each with a new score head; or a discriminator to train further,
also that of an alignment's workdir. With `data.sees_images = False` it reads texts alone (the
paper's ablation). Runs on TPU, GPU or CPU; configs/warmup.py names sizes, hardware and sources.

Source: PRISM moe/train_moe_vl_warmup_fast.py.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence

import jax
from flax import nnx

from prism_jax import (
    configuration,
    discriminator_update,
    errors,
    loop,
    model_files,
    optim,
    pretrained,
    segment_rows,
    train_state,
    train_step,
)
from prism_jax.continuations import RowShape
from prism_jax.stages import (
    honesty,
    honesty_asker,
    pair_feed,
    rollouts,
    running,
    segments,
    setup,
    warmup_honesty,
)

# May change between a run and its continuation; the pairs themselves are compared.
_MAY_DIFFER = (
    "data.train",
    "data.image_root",
    "data.words",
    "data.cache_dir",
    "data.num_threads",
    "evaluate",
    "honesty",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs(configuration.Section):
    """Hold the numbers of the loss; see `discriminator_update.PairRule`."""

    score_clip: float | None
    regulariser: float
    router: float  # of no effect without experts
    length_beta: tuple[tuple[str, float], ...]  # segment, coefficient: see `correct_length`
    head_dropout: float  # while learning

    def problems(self) -> list[str]:
        """See `Section`."""
        found = configuration.at_least(self, 0, "regulariser", "router")
        if self.score_clip is not None and not self.score_clip > 0:
            found.append(f"score_clip must be > 0 or None, got {self.score_clip}")
        if not 0 <= self.head_dropout < 1:
            found.append(f"head_dropout must be in [0, 1), got {self.head_dropout}")
        return found

    def rule(self, model: setup.Model) -> discriminator_update.PairRule:
        """Return the rule for this discriminator."""
        has_router = model.config.text.moe is not None
        return discriminator_update.PairRule(
            score_clip=self.score_clip,
            regulariser=self.regulariser,
            router=self.router if has_router else 0.0,
            length_beta=self.length_beta,
            microbatch_pairs=None,
            all_invalid="none",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(configuration.Section):
    """Say how long."""

    num_steps: int | None  # exactly one of the two is given
    num_epochs: int | None
    num_pairs: int  # of responses in a step; each gives a pair of every segment of the view
    max_skipped_in_row: int  # updates that are not finite before the run is given up

    def problems(self) -> list[str]:
        """See `Section`."""
        found = configuration.at_least(
            self, 1, "num_steps", "num_epochs", "num_pairs", "max_skipped_in_row"
        )
        if (self.num_steps is None) == (self.num_epochs is None):
            found.append("num_steps and num_epochs: exactly one must be given")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(configuration.Section):
    """Say when held-out pairs are scored."""

    every_steps: int | None  # None: never
    num_batches: int | None  # of `train.num_pairs`; None: all

    def problems(self) -> list[str]:
        """See `Section`."""
        return configuration.at_least(self, 1, "every_steps", "num_batches")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(configuration.Section):
    """Hold the configuration of the stage."""

    seed: int
    model: configuration.Model
    data: pair_feed.Data
    pairs: Pairs
    rows: rollouts.Rows
    train: Train
    evaluate: Evaluate
    honesty: honesty.Options
    optim: configuration.Optim
    mesh: configuration.Mesh
    checkpoint: configuration.Checkpoint
    resume: configuration.Resume
    log: configuration.Log

    def problems(self) -> list[str]:
        """See `Section`."""
        found = configuration.at_least(self, 0, "seed")
        return found + segments.problems_of_length(
            "pairs.length_beta", self.pairs.length_beta, self.data.view
        )


def main(argv: Sequence[str]) -> None:
    """Train a discriminator on pairs."""
    begun = time.monotonic()
    config, workdir = configuration.read(argv, command="warmup")
    options = configuration.parse(Config, config)
    devices = setup.open_devices(options.mesh, options.model)
    rollouts.require_one_process("warmup")
    keys = running.keys(options.seed)
    with running.hold(workdir) as folder, jax.set_mesh(devices.mesh):
        # Of a run that trained two models, the files of the discriminator.
        own = str(model_files.of(options.model.folder, is_discriminator=True))
        files = setup.keep_files(dataclasses.replace(options.model, folder=own), folder)
        model = setup.open_model(options.model, devices, files=files, is_discriminator=True)
        options.rows.check_router(model.config, place="config.rows")
        identity = running.identity("warmup", config, [model], may_differ=_MAY_DIFFER)
        if running.is_finished(folder, identity):
            return
        feed = pair_feed.Feed(
            options.data,
            model,
            files=files,
            num_pairs=options.train.num_pairs,
            seed=options.seed,
            folder=folder,
        )
        shape = options.rows.shape(feed.largest(), devices, shared_units=1, place="config.rows")
        num_steps = options.train.num_steps or feed.num_steps(options.train.num_epochs)
        optimizer = setup.make_optimizer(options.optim, model.params, num_steps=num_steps)
        start = start_of(model, optimizer, devices, key=keys.init)
        names = options.data.form.names
        running.run(
            running.Run(
                identity=identity,
                workdir=folder,
                seed=options.seed,
                key=keys.run,
                begun=begun,
                num_steps=num_steps,
                evaluate_every_steps=warmup_honesty.every_steps(
                    options.evaluate.every_steps, options.honesty.every_steps
                ),
                max_skipped_in_row=options.train.max_skipped_in_row,
                watched=("loss/total", *(f"eval/{name}_pair_accuracy" for name in names)),
                checkpoint=options.checkpoint,
                resume=options.resume,
                log=options.log,
            ),
            make_stage(options, devices, model, feed, optimizer, start, shape, num_steps=num_steps),
            running.OnDevices(feed.train(shape, num_steps=num_steps), devices),
            abstract_state=start.abstract,
            make_state=start.make,
            summary={},
        )


def make_evaluation(
    options: Config,
    feed: pair_feed.Feed,
    model: setup.Model,
    devices: setup.Devices,
    settings: discriminator_update.Settings,
    shape: RowShape,
    *,
    num_steps: int,
) -> warmup_honesty.Evaluate | None:
    """Return what is measured on held-out pairs: accuracies, and the honesty panel."""
    score = discriminator_update.make_scorer(model.graphdef, settings)
    layout = honesty_asker.Layout(
        shape=shape,
        positions="mrope",
        is_paired=True,
        batch_pairs=options.train.num_pairs * len(feed.names),
        sees_images=options.data.sees_images,
    )
    return warmup_honesty.beside(
        feed.evaluation(score, shape, devices, num_batches=options.evaluate.num_batches),
        feed,
        honesty_asker.Asker(model, devices, settings, score, layout),
        options.honesty,
        evaluate_every_steps=options.evaluate.every_steps,
        num_steps=num_steps,
    )


def make_stage(
    options: Config,
    devices: setup.Devices,
    model: setup.Model,
    feed: pair_feed.Feed,
    optimizer: optim.Optimizer,
    start: setup.Start,
    shape: RowShape,
    *,
    num_steps: int,
) -> loop.Stage:
    """Return what is done in a step, and how held-out pairs are measured."""
    settings = discriminator_update.Settings(
        implementation=devices.attention,
        remat=options.model.remat,
        head_dropout=options.pairs.head_dropout,
    )
    names = options.data.form.names
    return loop.Stage(
        experience=loop.learn_from_data,
        update=make_update(
            options.pairs.rule(model), names, settings, model, optimizer, start, shape
        ),
        evaluate=make_evaluation(
            options, feed, model, devices, settings, shape, num_steps=num_steps
        ),
        skip_counters=("optim/skipped_in_row",),
    )


def make_update(
    rule: discriminator_update.PairRule,
    names: Sequence[str],
    settings: discriminator_update.Settings,
    model: setup.Model,
    optimizer: optim.Optimizer,
    start: setup.Start,
    shape: RowShape,
) -> train_step.TrainStep:
    """Return the update of the discriminator: its loss is a mean over pairs of any name.

    Source: PRISM moe/train_moe_vl_warmup_fast.py:465-475.
    """

    def loss(model: nnx.Module, batch: segment_rows.SegmentBatch, key: jax.Array):
        return discriminator_update.pair_loss(model, batch, names, rule, settings, key)

    return train_step.make_train_step(
        model.graphdef,
        loss,
        optimizer,
        weights_fn=functools.partial(discriminator_update.pair_weights, names=names, rule=rule),
        coefficients=rule.coefficients(names, of_segment=1 / len(names)),
        num_microbatches=shape.num_microbatches,
        shardings=start.shardings,
    )


def start_of(
    model: setup.Model, optimizer: optim.Optimizer, devices: setup.Devices, *, key: jax.Array
) -> setup.Start:
    """Return how the state begins; a folder without a score head gives the trunk alone."""
    start = setup.start_of(model, optimizer, devices, key=key)
    folder = model.source.folder
    if model.source.init == "random" or _holds_discriminator(folder):
        return start

    def make() -> train_state.TrainState:
        trunk = _open_policy(model, devices)
        params = {
            ("trunk", *path): leaf
            for path, leaf in nnx.to_flat_state(setup.load_params(trunk, devices))
            if path[:2] != ("text", "head")
        }
        places = dict(nnx.to_flat_state(start.shardings.params))
        path = ("score", "kernel")
        params[path] = jax.jit(
            lambda key: model.build(nnx.Rngs(key)).score.kernel, out_shardings=places[path]
        )(key)
        setup.say(f"trunk read from {folder}, the score head is new")
        return train_state.from_params(
            nnx.from_flat_state(sorted(params.items())), optimizer, shardings=start.shardings
        )

    return dataclasses.replace(start, make=make)


def _holds_discriminator(folder: str) -> bool:
    """Tell whether there is a discriminator to train further; a run of two models has one."""
    if not model_files.is_run(folder):
        return pretrained.Source.of(folder).is_discriminator
    try:
        return pretrained.Source.of(folder, role="discriminator").is_discriminator
    except errors.InputError:
        # A run of a policy alone, unless this raises.
        return pretrained.Source.of(folder, role="policy").is_discriminator


def _open_policy(model: setup.Model, devices: setup.Devices) -> setup.Model:
    """Return the policy of which the trunk is made."""
    build = setup.builder(model.config, devices, is_discriminator=False, lora=None)
    graphdef, params = train_state.abstract_params(build, param_dtype=devices.param_dtype)
    return dataclasses.replace(
        model, build=build, graphdef=graphdef, params=params, is_discriminator=False
    )
