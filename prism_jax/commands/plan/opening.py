"""A stage for a machine that is not there: its options, devices and programs, all abstract."""

import dataclasses
import importlib
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import ml_collections
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh

from models import presets
from models.config import Qwen3VLConfig
from prism_jax import configuration, errors
from prism_jax import mesh as mesh_lib
from prism_jax.checkpoints import pretrained
from prism_jax.commands.plan import machines, sampled
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import programs

MODELS = {
    "2b": presets.QWEN3_VL_2B,
    "4b": presets.QWEN3_VL_4B,
    "8b": presets.QWEN3_VL_8B,
    "32b": presets.QWEN3_VL_32B,
    "30b_a3b": presets.QWEN3_VL_30B_A3B,
    "discriminator": presets.DISCRIMINATOR_2B_MOE4X,
}
STAGES = ("sft", "warmup", "align", "rlvr", "evaluate", "pairs")
ASKING = ("evaluate", "pairs")
# What a run needs and a plan does not: named in the message if it were read after all.
_UNSET = "-"
# Sections that are off where they name no file.
_OPTIONAL = ("held_out", "distill")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A job to plan; JSON values alone, so that another process can open the same."""

    stage: str
    config: Mapping[str, Any]
    machine: str  # topology, or number of GPUs
    num_slices: int
    hbm_gigabytes: float | None  # of a GPU; None: a TPU
    # "policy", "discriminator", "teacher": a name of `MODELS` or a folder
    models: Mapping[str, str]
    bounds: Mapping[str, int]

    def open_machine(self) -> machines.Machine:
        """Return the machine."""
        if self.hbm_gigabytes is not None:
            return machines.gpus(int(self.machine), self.hbm_gigabytes)
        return machines.tpu(self.machine, num_slices=self.num_slices)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """A stage on a machine."""

    options: Any  # the stage's Config
    devices: devices_lib.Devices
    machine: machines.Machine
    programs: list[programs.Program]


def open_job(job: Job, *, is_compiled: bool) -> Opened:
    """Return the stage's programs for the machine.

    Args:
      is_compiled: the programs are to be compiled: libtpu describes the devices. Otherwise they
        only have shapes and shardings, which need no library.

    Raises:
      InputError: the configuration is wrong, or does not go on this number of devices.
    """
    machine = job.open_machine()
    options = configuration.parse(_kind(job.stage), ml_collections.ConfigDict(_fill(job.config)))
    source = sampled.model_of(options) if job.stage in ASKING else options.model
    devices = _devices(options.mesh, source, machine, is_compiled=is_compiled)
    if job.stage not in ASKING:
        problems = options.problems_on(devices.layout())
        if problems:
            raise errors.InputError("; ".join(f"config.{problem}" for problem in problems))
    models = {
        role: programs.open_model(
            model_config(model),
            _source_of(role, job.stage, options, source),
            devices,
            is_discriminator=role == "discriminator",
        )
        for role, model in job.models.items()
    }
    listed = _programs_of(job.stage)(options, devices, models, programs.Bounds(**job.bounds))
    return Opened(options=options, devices=devices, machine=machine, programs=listed)


def _source_of(
    role: str, stage: str, options: Any, source: configuration.Model
) -> configuration.Model:
    """Return the section of a model as the stage opens it."""
    if role == "teacher":
        return dataclasses.replace(source, lora=configuration.NO_LORA)
    if role == "discriminator" and stage != "warmup":
        section = options if stage == "align" else options.adversary
        return section.discriminator.model(source)
    return source


def model_config(model: str) -> Qwen3VLConfig:
    """Return the sizes of a model by its name, or those of a folder."""
    return MODELS[model] if model in MODELS else pretrained.config_of(model)[1]


def sections(stage: str, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the models that a stage holds, and the dotted section that names each."""
    named = {"policy": "policy" if stage in ASKING else "model"}
    if stage == "warmup":
        return {"discriminator": "model"}
    if stage == "align":
        named["discriminator"] = "discriminator"
    if stage == "rlvr" and config["adversary"] is not None:
        named["discriminator"] = "adversary.discriminator"
    if stage in ("align", "rlvr") and config["distill"]["folder"]:
        named["teacher"] = "distill"
    return named


def stage_of(config_file: str) -> str:
    """Return the stage that a configuration file is for, by its name."""
    name = re.sub(r"\.py.*", "", config_file).rpartition("/")[2]
    if name not in STAGES:
        raise errors.InputError(
            f"--config={config_file}: its name must be that of a stage, one of {', '.join(STAGES)}"
        )
    return name


def _kind(stage: str) -> type:
    folder = "commands" if stage in ASKING else "stages"
    inner = stage if stage in ASKING else f"{stage}.config"
    return importlib.import_module(f"prism_jax.{folder}.{inner}").Config


def _programs_of(stage: str) -> Callable[..., list[programs.Program]]:
    if stage in ASKING:
        return sampled.programs_of
    return importlib.import_module(f"prism_jax.stages.{stage}.programs").programs_of


def _fill(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration with something in the fields that must name files."""
    filled = {
        name: _fill(v) if isinstance(v, Mapping) and name not in _OPTIONAL else v
        for name, v in config.items()
    }
    for name in ("folder", "train", "path"):
        if filled.get(name) == "":
            filled[name] = _UNSET
        elif name in filled and filled[name] is not None and not filled[name]:
            filled[name] = (_UNSET,)
    return filled


def _devices(
    mesh: configuration.Mesh,
    model: configuration.Model,
    machine: machines.Machine,
    *,
    is_compiled: bool,
) -> devices_lib.Devices:
    """Return how everything is computed there, decided as `setup.devices.open_devices` does."""
    dtype = jnp.dtype(model.dtype)
    made = _mesh(mesh, machine, is_compiled=is_compiled)
    rules = mesh_lib.rules(mesh_lib.DEFAULT_RULES | dict(mesh.rules))
    splits_length = any(made.shape[axis] > 1 for axis in rules.mesh_axes("act_length"))
    name = model.attention
    if name == "auto":
        is_xla = dtype == jnp.float32 or splits_length
        name = "splash" if machine.is_tpu else "xla" if is_xla else "cudnn"
    if (name == "splash") != machine.is_tpu and name != "xla":
        raise errors.InputError(f"config.model.attention = {name!r} does not run on {machine.name}")
    if name == "cudnn" and splits_length:
        raise errors.InputError("config.model.attention = 'cudnn' needs whole rows")
    return devices_lib.Devices(
        mesh=made,
        rules=rules,
        dtype=dtype,
        param_dtype=jnp.dtype(model.param_dtype),
        attention=name,
        decode_attention="pallas" if name == "splash" else name,
        described=devices_lib.Described(
            platform="tpu" if machine.is_tpu else "gpu",
            memory_bytes=int(machine.generation.hbm_gib * 2**30),
        ),
    )


def _mesh(
    mesh: configuration.Mesh, machine: machines.Machine, *, is_compiled: bool
) -> Mesh | AbstractMesh:
    sizes = dataclasses.asdict(mesh.axes)
    number = mesh.num_devices or machine.num_devices
    if number > machine.num_devices:
        raise errors.InputError(
            f"config.mesh.num_devices = {number}, but {machine.name} has {machine.num_devices}"
        )
    if not is_compiled:
        axes = mesh_lib.axis_sizes(
            sizes, number, num_slices=machine.num_slices, max_fsdp=mesh.max_fsdp
        )
        return AbstractMesh(
            tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes)
        )
    # Both are read when libtpu is loaded: other processes may hold it, and there is no cloud.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    more: dict[str, Any] = {}
    if machine.num_slices > 1:
        more["num_slices"] = machine.num_slices
    if machine.num_chips < 4:
        more["chips_per_host_bounds"] = (1, 1, 1)
    described = topologies.get_topology_desc(machine.name, platform="tpu", **more)
    return mesh_lib.make(sizes, described.devices[:number], max_fsdp=mesh.max_fsdp)
