"""How every training stage opens devices, models and the beginning of its state.

A stage reads its configuration, opens what it needs and runs, top to bottom; `running` is the
second half:

    config, workdir = configuration.read(argv, command="sft")
    options = configuration.parse(Config, config)
    devices = setup.open_devices(options.mesh, options.model)
    with running.hold(workdir) as folder, jax.set_mesh(devices.mesh):
        files = setup.keep_files(options.model, folder)
        model = setup.open_model(options.model, devices, files=files, is_discriminator=False)
        identity = running.identity("sft", config, [model], may_differ=())
        if running.is_finished(folder, identity):
            return
        optimizer = setup.make_optimizer(options.optim, model.params, num_steps=num_steps)
        start = setup.start_of(model, optimizer, devices, key=keys.init)
        stage = loop.Stage(…)
        data = running.OnDevices(steps, devices)
        running.run(running.Run(…), stage, data, abstract_state=start.abstract, …)
"""

import dataclasses
import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models import attention, discriminator, qwen3_vl, sharding
from models import config as config_lib
from prism_jax import (
    checkpoint,
    configuration,
    errors,
    model_files,
    optim,
    pretrained,
    train_state,
)
from prism_jax import mesh as mesh_lib
from prism_jax.stages import fresh, generate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
    """Hold how everything of a run is computed; "auto" is decided here, once."""

    mesh: Mesh
    rules: sharding.Rules
    dtype: jnp.dtype  # of activations and matmuls
    param_dtype: jnp.dtype  # of the master weights
    attention: attention.Implementation
    decode_attention: attention.Implementation

    @property
    def replicated(self) -> NamedSharding:
        """Return the sharding of what every device holds."""
        return NamedSharding(self.mesh, PartitionSpec())

    def row_parts(self) -> int:
        """Return over how many parts of the mesh the rows of a batch are spread."""
        axes = self.rules.mesh_axes("batch")
        names = (axes,) if isinstance(axes, str) else axes or ()
        return math.prod(self.mesh.shape[name] for name in names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """Hold a model that is not yet in memory."""

    config: config_lib.Qwen3VLConfig
    values: Mapping[str, Any]  # its config.json
    graphdef: nnx.GraphDef
    params: nnx.State  # abstract
    build: Callable[[nnx.Rngs], nnx.Module]
    source: configuration.Model
    is_discriminator: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """Hold how a state begins: what it will be, and the function that makes it."""

    abstract: train_state.TrainState  # shapes, types and shardings
    make: Callable[[], train_state.TrainState]
    shardings: train_state.TrainState


def say(line: str) -> None:
    """Tell the user on standard error; one process of a job speaks."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


def say_once() -> Callable[[str], None]:
    """Return a `say` that leaves out a line which is the same as the one before."""
    last = [""]

    def say_if_new(line: str) -> None:
        if line != last[0]:
            last[0] = line
            say(line)

    return say_if_new


def open_devices(
    mesh: configuration.Mesh,
    model: configuration.Model,
    *,
    section: str = "model",
    place: str = "config",
) -> Devices:
    """Join the processes of the job, build the mesh and decide the implementations; tell them.

    Args:
      section: of the configuration that says type and attention, for messages.
      place: what holds it and the section `mesh`, for messages.

    Raises:
      InputError: the axes do not fit the devices, or the attention does not run on them.
    """
    if mesh.is_distributed:
        jax.distributed.initialize()
    dtype = jnp.dtype(model.dtype)
    if dtype == jnp.float32:
        # Accelerators would multiply float32 with fewer bits.
        jax.config.update("jax_default_matmul_precision", "highest")
    found = jax.devices()
    if mesh.num_devices is not None and mesh.num_devices > len(found):
        raise errors.InputError(
            f"{place}.mesh.num_devices = {mesh.num_devices}, but there are {len(found)} devices"
        )
    prefill, decode = generate.implementations(
        model.attention, dtype, place=f"{place}.{section}.attention"
    )
    devices = Devices(
        mesh=mesh_lib.make(dataclasses.asdict(mesh.axes), found[: mesh.num_devices]),
        rules=mesh_lib.rules(mesh_lib.DEFAULT_RULES | dict(mesh.rules)),
        dtype=dtype,
        param_dtype=jnp.dtype(model.param_dtype),
        attention=prefill,
        decode_attention=decode,
    )
    axes = " x ".join(f"{name} {size}" for name, size in devices.mesh.shape.items() if size > 1)
    say(
        f"{devices.mesh.size} x {found[0].device_kind}" + (f" ({axes})" if axes else "")
        + f", {model.dtype} with {model.param_dtype} weights, attention {prefill}"
    )  # fmt: skip
    return devices


def keep_files(
    model: configuration.Model, workdir: pathlib.Path, *, name: str = model_files.FOLDER
) -> pathlib.Path:
    """Copy the model's small files into the run's folder and return where they are.

    With `init="random"` its `config.json` is made of the sizes and the tokenizer.

    Args:
      name: the folder, `model_files.DISCRIMINATOR_FOLDER` for the second model of a run.
    """
    target = workdir / name
    if jax.process_index() == 0:
        if model.init == "random":
            with fresh.folder(model.folder, model.sizes) as made:
                model_files.copy(made, target)
        else:
            is_second = name == model_files.DISCRIMINATOR_FOLDER
            model_files.copy(model_files.of(model.folder, is_discriminator=is_second), target)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"keep_files_{name}")
    return target


def open_model(
    source: configuration.Model, devices: Devices, *, files: pathlib.Path, is_discriminator: bool
) -> Model:
    """Return the model of `files` (from `keep_files`), nothing of it in memory yet."""
    values, config = pretrained.config_of(files)
    if not is_discriminator:
        pretrained.check_policy(source.folder, config)
    build = builder(config, devices, is_discriminator=is_discriminator)
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
    config: config_lib.Qwen3VLConfig, devices: Devices, *, is_discriminator: bool
) -> Callable[[nnx.Rngs], nnx.Module]:
    """Return the function that makes a policy or a discriminator of these sizes."""
    shared = {
        "moe_implementation": pretrained.moe_implementation(config),
        "rules": devices.rules,
        "dtype": devices.dtype,
        "param_dtype": devices.param_dtype,
    }
    if is_discriminator:
        return lambda rngs: discriminator.Discriminator(config, rngs=rngs, **shared)
    return lambda rngs: qwen3_vl.Qwen3VL(config, has_head=True, rngs=rngs, **shared)


def load_params(model: Model, devices: Devices) -> nnx.State:
    """Read the model's parameters from where its configuration says, directly in their shards.

    Raises:
      InputError: the folder is not whole, of another model, or holds no such parameters.
    """
    folder = model.source.folder
    places = mesh_lib.param_shardings(model.params, devices.mesh, devices.rules)
    if model_files.is_run(folder) and checkpoint.finished(folder) is None:
        raise errors.InputError(f"{folder}: this run has not finished; start it again first")
    role = "discriminator" if model.is_discriminator else "policy"
    source = pretrained.Source.of(folder, role=role)
    return source.load(model.params, shardings=places, param_dtype=devices.param_dtype)


def make_optimizer(
    options: configuration.Optim, params: nnx.State, *, num_steps: int
) -> optim.Optimizer:
    """Return AdamW as configured: frozen groups first, then those with a factor, then the rest."""
    frozen = tuple((pattern, None) for pattern in options.frozen)
    return optim.adamw(
        params,
        schedule=optim.learning_rate_schedule(
            options.schedule,
            peak=options.peak,
            num_steps=num_steps,
            warmup_steps=options.warmup_steps,
            warmup_fraction=options.warmup_fraction,
            end_factor=options.end_factor,
        ),
        b1=options.b1,
        b2=options.b2,
        eps=options.eps,
        weight_decay=options.weight_decay,
        no_decay=options.no_decay,
        groups=(*frozen, *options.factors, (".*", 1.0)),
        clip_norm=options.clip_norm,
        mu_dtype=jnp.dtype(options.mu_dtype),
        nu_dtype=jnp.dtype(options.nu_dtype),
    )


def start_of(
    model: Model, optimizer: optim.Optimizer, devices: Devices, *, key: jax.Array
) -> Start:
    """Return how the state of one model begins: from its checkpoint, or anew from the key."""
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
            state = train_state.from_params(params, optimizer, shardings=shardings)
        jax.block_until_ready(state)
        seconds = time.monotonic() - begun
        origin = "new" if model.source.init == "random" else f"read from {model.source.folder}"
        say(f"{qwen3_vl.num_parameters(model.params):,} parameters {origin} in {seconds:.1f} s")
        return state

    return Start(
        abstract=train_state.with_shardings(abstract, shardings), make=make, shardings=shardings
    )
