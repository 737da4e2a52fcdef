"""Configurations: a file of `configs/` with overrides becomes frozen structs, checked once.

    python -m prism_jax sft --config=configs/sft.py:4b,train_vision --config.optim.peak=2e-5

The file gives a locked ConfigDict, so that an override of a field that does not exist is refused.
`parse` turns it into the dataclass of a stage: every field must be there, nothing else may be, each
has its type, and each struct says what is wrong with its values. All that is wrong is told at once.
"""

import dataclasses
import functools
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import ml_collections
from absl import flags
from ml_collections import config_flags

from prism_jax import config_usage, errors, row_layout

_FREE = "is_free"
_NONE = re.compile(r"--config\.([\w.]+)=None")

Dtype = Literal["float32", "bfloat16"]
Attention = Literal["auto", "xla", "splash", "cudnn"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a configuration; `problems` is asked when all types are right."""

    def problems(self) -> list[str]:
        """Return what is wrong with the values, each beginning with the field's name."""
        return []


T = TypeVar("T", bound=Section)


def free() -> Any:
    """Declare a field, or a whole section, that may change between a run and its continuation."""
    return dataclasses.field(metadata={_FREE: True})


def free_fields(kind: type[Section]) -> tuple[str, ...]:
    """Return the names of the fields declared `free`, dotted from this struct."""
    names = []
    kinds = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if _FREE in field.metadata:
            names.append(field.name)
            continue
        for option in typing.get_args(kinds[field.name]) or (kinds[field.name],):
            if isinstance(option, type) and issubclass(option, Section):
                names += [f"{field.name}.{name}" for name in free_fields(option)]
    return tuple(names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axes(Section):
    """Sizes of the mesh; one of them may be -1, all the devices that are left.

    With both `data` and `fsdp` -1, `fsdp` takes as many as `max_fsdp` allows: a power of two of the
    devices of a slice. Rows are spread over data x fsdp, the "parts" of the mesh.
    """

    data: int
    fsdp: int
    tensor: int
    expert: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh(Section):
    """Say how arrays lie on devices."""

    axes: Axes
    # Most devices that a weight is spread over where data and fsdp are -1; None: no limit.
    max_fsdp: int | None
    num_devices: int | None  # the first so many; None: all
    is_distributed: bool | None  # several processes; None: where a cluster is detected
    rules: tuple[tuple[str, str | tuple[str, ...] | None], ...]  # instead of the usual ones

    def problems(self) -> list[str]:
        """See `Section`."""
        return at_least(self, 1, "num_devices", "max_fsdp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes(Section):
    """Sizes of a model that is made anew; the vocabulary is the tokenizer's."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    tie_word_embeddings: bool
    vision_hidden_size: int
    vision_intermediate_size: int
    vision_num_layers: int
    vision_num_heads: int
    vision_num_position_embeddings: int  # a square
    vision_deepstack_layers: tuple[int, ...]
    initializer_range: float

    def problems(self) -> list[str]:
        """See `Section`."""
        numbers = [f.name for f in dataclasses.fields(self) if f.type is int]
        found = at_least(self, 1, *numbers)
        if self.head_dim % 8:
            found.append(f"head_dim must be a multiple of 8 for M-RoPE, got {self.head_dim}")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model(Section):
    """Say which model is trained and how it is computed."""

    # Hugging Face folder, converted folder or the workdir of a stage; with init="random" a folder
    # with tokenizer, chat template and image settings.
    folder: str = free()
    init: Literal["pretrained", "random"]
    sizes: Sizes | None  # exactly when init is "random"
    dtype: Dtype  # of activations and matmuls
    param_dtype: Dtype  # of the master weights
    attention: Attention = free()
    remat: Literal["none", "full", "save_attention", "save_attention_and_dots"]

    def problems(self) -> list[str]:
        """See `Section`."""
        found = not_empty(self, "folder")
        if (self.sizes is not None) != (self.init == "random"):
            found.append("sizes must be given exactly when init is 'random'")
        if self.dtype == "float32" and self.param_dtype == "bfloat16":
            found.append("param_dtype must be float32 when dtype is float32, got bfloat16")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim(Section):
    """The optimiser; see `training.optim.adamw` and `learning_rate_schedule` beside it."""

    schedule: Literal["constant", "linear", "cosine"]
    peak: float
    warmup_steps: int | None
    warmup_fraction: float | None
    end_factor: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    no_decay: tuple[str, ...]  # regular expressions of whole parameter paths
    frozen: tuple[str, ...]  # the same; neither gradients nor moments
    factors: tuple[tuple[str, float], ...]  # the same, with a factor of the learning rate
    clip_norm: float | None
    mu_dtype: Dtype
    nu_dtype: Dtype

    def problems(self) -> list[str]:
        """See `Section`; `training.optim.adamw` checks the rest, with the parameters at hand."""
        found = [] if self.peak > 0 else [f"peak must be > 0, got {self.peak}"]
        if (self.warmup_steps is None) == (self.warmup_fraction is None):
            found.append("warmup_steps and warmup_fraction: exactly one must be given")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint(Section):
    """Say what is saved."""

    save_every_steps: int
    num_kept: int

    def problems(self) -> list[str]:
        """See `Section`."""
        return at_least(self, 1, "save_every_steps", "num_kept")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resume(Section):
    """Say how a workdir that holds checkpoints is continued."""

    step: int | None  # an older checkpoint to go back to; None: the newest
    allow_mismatch: bool  # continue a run of another configuration all the same


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log(Section):
    """Say what a user sees besides metrics.jsonl and TensorBoard, which are always there."""

    line_every_steps: int  # between progress lines where standard error is no terminal
    wandb_project: str  # empty: no Weights & Biases

    def problems(self) -> list[str]:
        """See `Section`."""
        return at_least(self, 1, "line_every_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRun(Section):
    """The part of a stage's configuration that every training run has."""

    seed: int
    model: Model
    mesh: Mesh = free()
    checkpoint: Checkpoint = free()
    resume: Resume = free()
    log: Log = free()

    def problems(self) -> list[str]:
        """See `Section`."""
        return at_least(self, 0, "seed")

    def problems_on(self, layout: row_layout.RowLayout) -> list[str]:
        """Return what does not go on these devices, as `problems` does; known before any data."""
        del layout
        return []


def at_least(section: Section, least: float, *names: str) -> list[str]:
    """Return a line for each of these numbers that is below `least`; None is right."""
    values = dataclasses.asdict(section)
    return [
        f"{name} must be >= {least}, got {values[name]}"
        for name in names
        if values[name] is not None and values[name] < least
    ]


def not_empty(section: Section, *names: str) -> list[str]:
    """Return a line for each of these texts or tuples that is empty."""
    values = dataclasses.asdict(section)
    return [f"{name} must not be empty" for name in names if not values[name]]


def read(argv: Sequence[str], *, command: str) -> tuple[ml_collections.ConfigDict, str]:
    """Return the configuration with its overrides, locked, and the workdir.

    `--config.X=None` empties a field, whatever its type; `parse` says where that is wrong.

    Raises:
      InputError: an argument is unknown or missing, or the file is not there or raises.
      SystemExit: with code 0, help was asked for and is printed.
    """
    if config_usage.is_asked(argv):
        print(config_usage.of(command), end="", flush=True)
        sys.exit(0)
    name = f"python -m prism_jax {command}"
    values = flags.FlagValues()
    emptied = [_NONE.fullmatch(argument) for argument in argv]
    arguments = [name, *(a for a, none in zip(argv, emptied, strict=True) if none is None)]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    try:
        unknown = config_usage.unknown_fields(argv, command=command)
        if unknown:
            raise errors.InputError(f"{command}: {'; '.join(unknown)}")
        rest = values(arguments)[1:]
        if rest:
            raise errors.InputError(f"{command}: unknown arguments {' '.join(rest)}")
        for flag in ("config", "workdir"):
            if not values[flag].value:
                raise errors.InputError(f"{command}: --{flag}=… is missing")
        config = values["config"].value
        for none in filter(None, emptied):
            *path, last = none[1].split(".")
            section = functools.reduce(lambda node, part: node[part], path, config)
            section[last] = None
    except errors.InputError:
        raise
    except LookupError as error:
        kind = type(error).__name__
        raise errors.InputError(f"{command}: cannot be read: {kind}: {error}") from error
    # What the flags and the configuration file itself raise for wrong names, values and types.
    except (flags.Error, OSError, ValueError, TypeError, AttributeError) as error:
        # An error inside the configuration file comes with its whole traceback; its end says it.
        last = str(error).strip().rpartition("\n")[2]
        told = last if "Traceback" in str(error) else error
        raise errors.InputError(f"{command}: {told}") from error
    return config, values["workdir"].value


def parse(kind: type[T], config: ml_collections.ConfigDict) -> T:
    """Return the configuration as the struct of a stage.

    Raises:
      InputError: naming every field that is unknown, missing, or of a wrong type or value.
    """
    wrong: list[str] = []
    parsed = _section(kind, config.to_dict(), "config", wrong)
    if wrong:
        raise errors.InputError("; ".join(wrong))
    return parsed


def plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Return the configuration as JSON values, for the checkpoint's `meta`."""
    return _plain(config.to_dict())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _section(kind: type[T], values: Mapping[str, Any], place: str, wrong: list[str]) -> T | None:
    """Build one struct; what is wrong is added to `wrong`."""
    before = len(wrong)
    kinds = typing.get_type_hints(kind)
    for name in values:
        if name not in kinds:
            new = config_usage.RENAMED.get(name)
            wrong.append(f"{place}.{name} is " + (f"{place}.{new} now" if new else "no field"))
    wrong += [f"{place}.{name} is missing" for name in kinds if name not in values]
    built = {
        name: _value(kinds[name], values[name], f"{place}.{name}", wrong)
        for name in kinds
        if name in values
    }
    if len(wrong) > before:
        return None
    section = kind(**built)
    wrong += [f"{place}.{problem}" for problem in section.problems()]
    return section


def _value(kind: Any, value: Any, place: str, wrong: list[str]) -> Any:
    if isinstance(kind, type) and issubclass(kind, Section):
        if isinstance(value, Mapping):
            return _section(kind, value, place, wrong)
    elif isinstance(kind, types.UnionType):
        return _union(kind, value, place, wrong)
    elif typing.get_origin(kind) is Literal:
        if value in typing.get_args(kind):
            return value
    elif typing.get_origin(kind) is tuple:
        if isinstance(value, list | tuple):
            kinds = typing.get_args(kind)
            if kinds[-1] is Ellipsis:
                kinds = (kinds[0],) * len(value)
            if len(kinds) == len(value):
                pairs = enumerate(zip(kinds, value, strict=True))
                return tuple(_value(k, v, f"{place}[{i}]", wrong) for i, (k, v) in pairs)
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    wrong.append(f"{place} must be {_told(kind)}, got {value!r}")
    return None


def _union(kind: Any, value: Any, place: str, wrong: list[str]) -> Any:
    """Return the value in the first of the kinds that it fits."""
    tried: list[str] = []
    for option in typing.get_args(kind):
        if option is types.NoneType:
            if value is None:
                return None
            continue
        tried = []
        found = _value(option, value, place, tried)
        if not tried:
            return found
        if isinstance(option, type) and issubclass(option, Section) and value is not None:
            wrong += tried
            return None
    wrong.append(f"{place} must be {_told(kind)}, got {value!r}")
    return None


def _told(kind: Any) -> str:
    """Return how a message names a type."""
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(kind)))
    if isinstance(kind, types.UnionType):
        return " or ".join(
            "None" if k is types.NoneType else _told(k) for k in typing.get_args(kind)
        )
    if typing.get_origin(kind) is tuple:
        inner = ", ".join("…" if k is Ellipsis else _told(k) for k in typing.get_args(kind))
        return f"a tuple ({inner})"
    return {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}.get(
        kind, "a group of fields"
    )
