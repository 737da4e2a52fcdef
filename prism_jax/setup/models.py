"""The models of a stage and the beginnings of their states; `running.run` is the wiring around."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from models import config as config_lib
from models import lora as adapters
from models import qwen3_vl
from prism_jax import configuration, errors, progress
from prism_jax import mesh as mesh_lib
from prism_jax.checkpoints import checkpoint, mirror, model_files, pretrained
from prism_jax.setup import agreement, fresh
from prism_jax.setup import devices as devices_lib
from prism_jax.training import optim, optim_kinds, schedules, train_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model that is not yet in memory."""

    config: config_lib.Qwen3VLConfig
    values: Mapping[str, Any]  # its config.json
    graphdef: nnx.GraphDef
    params: nnx.State  # abstract
    build: Callable[[nnx.Rngs], nnx.Module]
    source: configuration.Model
    is_discriminator: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """The beginning of a state: its abstract form, and the function that makes it.

    A state is a `TrainState`, or of several models a dict of them, see `together`.
    """

    abstract: Any  # shapes, types and shardings
    make: Callable[[], Any]
    shardings: Any


def together(starts: Mapping[str, Start]) -> Start:
    """Return the beginning of a state that holds the states of several models by name."""
    return Start(
        abstract={name: start.abstract for name, start in starts.items()},
        make=lambda: {name: start.make() for name, start in starts.items()},
        shardings={name: start.shardings for name, start in starts.items()},
    )


def say_once() -> Callable[[str], None]:
    """Return a `say` that leaves out a line which is the same as the one before."""
    last = [""]

    def say_if_new(line: str) -> None:
        if line != last[0]:
            last[0] = line
            progress.say(line)

    return say_if_new


def keep_files(
    model: configuration.Model,
    workdir: pathlib.Path,
    *,
    name: str = model_files.FOLDER,
    is_discriminator: bool = False,
) -> pathlib.Path:
    """Copy the model's small files into the run's folder and return their folder.

    With `init="random"` the `config.json` is made from the sizes and the tokenizer.

    Args:
      name: the folder, `model_files.DISCRIMINATOR_FOLDER` for the second model of a run.
      is_discriminator: take the second model of a source that is a run of two models.
    """
    target = workdir / name

    def keep() -> None:
        if model.init == "random":
            with fresh.folder(model.folder, model.sizes) as made:
                model_files.copy(made, target)
        else:
            source = model_files.of(model.folder, is_discriminator=is_discriminator)
            model_files.copy(source, target)
        mirror.upload()

    # A resumed run has its files already, and its source may be gone by then.
    has_files = agreement.on_first(f"has_files_{name}", (target / "config.json").exists)
    if model.init != "random" and not has_files:
        # Sizes that the weights do not have are refused before anything is built for them. Orbax
        # opens the source when all processes do.
        pretrained.Source.of(model.folder, step=model.step)
    agreement.on_first(f"keep_files_{name}", keep)
    if jax.process_index() != 0:
        mirror.fetch(target)
    return target


def open_model(
    source: configuration.Model,
    devices: devices_lib.Devices,
    *,
    files: pathlib.Path,
    is_discriminator: bool,
) -> Model:
    """Return the model of `files` (from `keep_files`), nothing of it in memory yet."""
    if is_discriminator and source.lora.rank is not None:
        raise errors.InputError(
            f"a discriminator is trained whole: lora.rank must be None for it, got "
            f"{source.lora.rank}"
        )
    values, config = pretrained.config_of(files)
    if not is_discriminator:
        pretrained.check_policy(source.folder, config)
    build = builder(config, devices, is_discriminator=is_discriminator, lora=source.lora)
    graphdef, params = train_state.abstract_params(build, param_dtype=devices.param_dtype)
    return Model(
        config=config,
        values=values,
        graphdef=graphdef,
        params=params,
        build=build,
        source=source,
        is_discriminator=is_discriminator,
    )


def builder(
    config: config_lib.Qwen3VLConfig,
    devices: devices_lib.Devices,
    *,
    is_discriminator: bool,
    lora: configuration.Lora | None,
) -> Callable[[nnx.Rngs], nnx.Module]:
    """Return the function that makes a policy or a discriminator of these sizes.

    It raises InputError for adapters of maps that the model does not have.
    """
    plain = pretrained.builder(
        config,
        is_discriminator=is_discriminator,
        rules=devices.rules,
        dtype=devices.dtype,
        param_dtype=devices.param_dtype,
    )
    if lora is None or lora.rank is None:
        return plain

    def build(rngs: nnx.Rngs) -> nnx.Module:
        model = plain(rngs)
        try:
            adapters.add(model, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, rngs=rngs)
        except ValueError as error:
            raise errors.InputError(f"config.model.lora.targets: {error}") from error
        return model

    return build


def load_params(model: Model, devices: devices_lib.Devices) -> nnx.State:
    """Read the model's parameters from its configured folder, directly into their shards.

    Raises:
      InputError: the folder is incomplete, of another model, or lacks parameters.
    """
    folder = model.source.folder
    places = mesh_lib.param_shardings(model.params, devices.mesh, devices.rules)
    if model_files.is_run(folder) and checkpoint.finished(folder) is None:
        raise errors.InputError(f"{folder}: this run has not finished; start it again first")
    role = "discriminator" if model.is_discriminator else "policy"
    source = pretrained.Source.of(folder, role=role, step=model.source.step)
    base, places = (adapters.split(tree)[0] for tree in (model.params, places))
    return source.load(base, shardings=places, param_dtype=devices.param_dtype)


def make_optimizer(
    options: configuration.Optim, params: nnx.State, *, num_steps: int
) -> optim.Optimizer:
    """Return the optimizer as configured: frozen groups, those with a factor, then the rest."""
    frozen = tuple((pattern, None) for pattern in options.frozen)
    if adapters.split(params)[1]:
        frozen = (*frozen, (adapters.FROZEN, None))
    return optim.make(
        params,
        kind=options.kind,
        numbers=optim_kinds.Numbers(
            b1=options.b1,
            b2=options.b2,
            eps=options.eps,
            mu_dtype=options.mu_dtype,
            nu_dtype=options.nu_dtype,
        ),
        schedule=schedules.learning_rate_schedule(
            options.schedule,
            peak=options.peak,
            num_steps=num_steps,
            warmup_steps=options.warmup_steps,
            warmup_fraction=options.warmup_fraction,
            end_factor=options.end_factor,
        ),
        weight_decay=options.weight_decay,
        no_decay=options.no_decay,
        groups=(*frozen, *options.factors, (".*", 1.0)),
        clip_norm=options.clip_norm,
        rounding=options.rounding,
        memory=options.memory,
    )


def start_of(
    model: Model, optimizer: optim.Optimizer, devices: devices_lib.Devices, *, key: jax.Array
) -> Start:
    """Return the initial state of a model: from its checkpoint, or new from the key."""
    abstract = train_state.abstract_state(model.params, optimizer)
    shardings = train_state.shardings(
        abstract,
        of_params=lambda p: mesh_lib.param_shardings(p, devices.mesh, devices.rules),
        replicated=devices.replicated,
    )

    def make() -> train_state.TrainState:
        begun = time.monotonic()
        if model.source.init == "random":
            state = train_state.init(
                model.build, optimizer, key, param_dtype=devices.param_dtype, shardings=shardings
            )
        else:
            params = load_params(model, devices)
            if model.source.lora.rank is not None:
                places = adapters.split(shardings.params)[1]
                new = jax.jit(
                    lambda key: adapters.split(nnx.state(model.build(nnx.Rngs(key))))[1],
                    out_shardings=places,
                )
                params = nnx.merge_state(params, new(key))
            state = train_state.from_params(params, optimizer, shardings=shardings)
        jax.block_until_ready(state)
        seconds = time.monotonic() - begun
        origin = "new" if model.source.init == "random" else f"read from {model.source.folder}"
        step = "" if model.source.step is None else f", step {model.source.step},"
        progress.say(
            f"{qwen3_vl.num_parameters(model.params):,} parameters {origin}{step} in "
            f"{seconds:.1f} s"
        )
        return state

    return Start(
        abstract=train_state.with_shardings(abstract, shardings), make=make, shardings=shardings
    )
