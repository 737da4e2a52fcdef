"""Configurations: a file of `configs/` with overrides becomes checked, frozen structs.

    python -m prism_jax sft --config=configs/sft.py:4b,train_vision --config.optim.peak=2e-5

The file gives a locked ConfigDict, so that an override of a field that does not exist is refused.
`parse` turns it into the dataclass of a stage: every field must be given and have its type, no
other may be, and each struct checks its values in `problems`. One error lists all problems.
"""

import dataclasses
import functools
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import ml_collections
from absl import flags
from ml_collections import config_flags

from prism_jax import config_usage, config_values, errors, row_layout

_FREE = "is_free"
_NONE = re.compile(r"--config\.([\w.]+)=None")

Dtype = Literal["float32", "bfloat16"]
MomentDtype = Literal["float32", "bfloat16", "8bit"]
Attention = Literal["auto", "xla", "splash", "cudnn"]
# Of a run's folder: a number, or the step that `best.json` names; None: the newest complete one.
Step = int | Literal["best"] | None
# As `models.text.Remat`, which a command without a model does not load.
Remat = Literal["none", "full", "save_attention", "save_attention_and_dots"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a configuration; `problems` is called when all types are right."""

    def problems(self) -> list[str]:
        """Return the problems with the values, each beginning with the field's name."""
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
    """Sizes of the mesh; one of them may be -1, for all remaining devices.

    With both `data` and `fsdp` -1, `fsdp` takes as many as `max_fsdp` allows: a power of two of the
    devices of a slice. Rows are spread over data x fsdp, the "parts" of the mesh.
    """

    data: int
    fsdp: int
    # Over which the length of each row is split, and weights as over fsdp; `sft` alone can.
    sequence: int
    tensor: int
    expert: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh(Section):
    """The layout of arrays on devices."""

    axes: Axes
    # Most devices over which a weight is spread where data and fsdp are -1; None: no limit.
    max_fsdp: int | None
    num_devices: int | None  # use only the first N; None: all
    is_distributed: bool | None  # several processes; None: where a cluster is detected
    rules: tuple[tuple[str, str | tuple[str, ...] | None], ...]  # changes to the default ones

    def problems(self) -> list[str]:
        """See `Section`."""
        return at_least(self, 1, "num_devices", "max_fsdp")

    def problems_of_whole_rows(self) -> list[str]:
        """Return the problems of a command that computes whole rows on each device."""
        why = "since only sft splits rows along their length"
        problems, axes = [], dict(self.rules).get("act_length")
        if self.axes.sequence != 1:
            problems.append(f"mesh.axes.sequence must be 1, {why}, got {self.axes.sequence}")
        if axes and axes != "sequence":
            problems.append(f"mesh.rules must not split act_length, {why}, got {axes!r}")
        return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes(Section):
    """Sizes of a model that is trained from scratch; the vocabulary is the tokenizer's."""

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
        problems = at_least(self, 1, *numbers)
        if self.head_dim % 8:
            problems.append(f"head_dim must be a multiple of 8 for M-RoPE, got {self.head_dim}")
        return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora(Section):
    """Low-rank adapters that are trained instead of the model, see `models.lora`."""

    rank: int | None  # None: the model itself is trained
    alpha: float  # an adapter's output is multiplied by alpha / rank
    targets: tuple[str, ...]  # regular expressions of whole paths of linear maps

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = at_least(self, 1, "rank")
        if self.rank is not None and not self.targets:
            problems.append("targets must name the maps to adapt, got none")
        return problems if self.alpha > 0 else [*problems, f"alpha must be > 0, got {self.alpha}"]


NO_LORA = Lora(rank=None, alpha=1.0, targets=())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained(Section):
    """A trained model: its origin, and the memory that its gradient takes."""

    # Hugging Face folder, converted folder or the workdir of a stage; with init="random" a folder
    # with tokenizer, chat template and image settings.
    folder: str = free()
    init: Literal["pretrained", "random"]
    sizes: Sizes | None  # given exactly when init is "random"
    remat: Remat

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = not_empty(self, "folder")
        if (self.sizes is not None) != (self.init == "random"):
            problems.append("sizes must be given exactly when init is 'random'")
        return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model(Trained):
    """The trained model of a stage, with the types and the attention of all its models."""

    dtype: Dtype  # of activations and matmuls
    param_dtype: Dtype  # of the master weights
    attention: Attention = free()
    lora: Lora
    # Of the workdir that `folder` is. The run begins with it, and reads it no more.
    step: Step = free()

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = super().problems()
        if self.step is not None and self.init == "random":
            problems.append(f"step must be None when init is 'random', got {self.step}")
        if self.dtype == "float32" and self.param_dtype == "bfloat16":
            problems.append("param_dtype must be float32 when dtype is float32, got bfloat16")
        return problems


# Which numbers a kind of optimizer reads; all others must be None. The second ones may be None.
_NUMBERS = {
    "adamw": ("b1 b2 eps mu_dtype nu_dtype", ""),
    "muon": ("b1 b2 eps mu_dtype nu_dtype", ""),
    "lion": ("b1 b2 mu_dtype", ""),
    "adafactor": ("eps", "b1 mu_dtype"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim(Section):
    """The optimizer; see `training.optim.make` and `training.optim_kinds`."""

    kind: Literal["adamw", "adafactor", "muon", "lion"]
    schedule: Literal["constant", "linear", "cosine"]
    peak: float
    warmup_steps: int | None
    warmup_fraction: float | None
    end_factor: float
    b1: float | None
    b2: float | None
    eps: float | None
    weight_decay: float
    no_decay: tuple[str, ...]  # regular expressions of whole parameter paths
    frozen: tuple[str, ...]  # the same; these get neither gradients nor moments
    factors: tuple[tuple[str, float], ...]  # the same, with a factor of the learning rate
    clip_norm: float | None
    mu_dtype: MomentDtype | None  # storage of the first moment; 8bit: see `training.eight_bit`
    # Of the second; with few bits it follows slow changes only if rounded stochastically.
    nu_dtype: MomentDtype | None
    rounding: Literal["nearest", "stochastic"]  # of weights and moments that are kept in bfloat16
    memory: Literal["device", "host"]  # of the states of stacked layers between steps

    def problems(self) -> list[str]:
        """See `Section`; `training.optim.make` checks the rest, with the parameters at hand."""
        problems = [] if self.peak > 0 else [f"peak must be > 0, got {self.peak}"]
        if (self.warmup_steps is None) == (self.warmup_fraction is None):
            problems.append("warmup_steps and warmup_fraction: exactly one must be given")
        needed, optional = (set(names.split()) for names in _NUMBERS[self.kind])
        for name in ("b1", "b2", "eps", "mu_dtype", "nu_dtype"):
            value = getattr(self, name)
            if value is None and name in needed:
                problems.append(f"{name} must be given for kind={self.kind}, got None")
            if value is not None and name not in needed | optional:
                problems.append(f"{name} must be None for kind={self.kind}, got {value}")
            if value is not None and name in ("b1", "b2") and not 0 <= value < 1:
                problems.append(f"{name} must be in [0, 1), got {value}")
        if self.kind == "adafactor" and (self.b1 is None) != (self.mu_dtype is None):
            problems.append("b1 and mu_dtype: for kind=adafactor give both or neither")
        return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint(Section):
    """The checkpoints that a run saves."""

    save_every_steps: int
    # The time after which a state is saved besides, at the end of its step; None: never. A machine
    # that can be taken away at any moment loses no more than that.
    save_every_minutes: float | None
    num_kept: int

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = at_least(self, 1, "save_every_steps", "num_kept")
        if self.save_every_minutes is not None and not self.save_every_minutes > 0:
            problems.append(
                f"save_every_minutes must be > 0 or None, got {self.save_every_minutes}"
            )
        return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resume(Section):
    """How a run resumes in a workdir that holds checkpoints."""

    step: int | None  # an older checkpoint to go back to; None: the newest
    allow_mismatch: bool  # resume even a run of another configuration


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log(Section):
    """Logs besides metrics.jsonl and TensorBoard, which are always written."""

    line_every_steps: int  # between progress lines where standard error is no terminal
    wandb_project: str  # empty: no Weights & Biases

    def problems(self) -> list[str]:
        """See `Section`."""
        return at_least(self, 1, "line_every_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRun(Section):
    """The fields that the configurations of all training stages share."""

    seed: int
    model: Model
    mesh: Mesh = free()
    checkpoint: Checkpoint = free()
    resume: Resume = free()
    log: Log = free()

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = at_least(self, 0, "seed")
        return problems if self.splits_length else problems + self.mesh.problems_of_whole_rows()

    @property
    def splits_length(self) -> bool:
        """Return whether the stage runs with `mesh.axes.sequence` above 1."""
        return False

    def problems_on(self, layout: row_layout.RowLayout) -> list[str]:
        """Return the problems on these devices, as `problems` does; known before any data."""
        del layout
        return []


def at_least(section: Section, least: float, *names: str) -> list[str]:
    """Return a line for each of these numbers below `least`; None passes."""
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

    `--config.X=None` empties a field, whatever its type; `parse` reports where that is wrong.

    Raises:
      InputError: an argument is unknown or missing, or the file is not there or raises.
      SystemExit: with code 0, after printing the help.
    """
    if config_usage.is_help(argv):
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
    # Raised by the flags and the configuration file for wrong names, values and types.
    except (flags.Error, OSError, ValueError, TypeError, AttributeError) as error:
        # An error inside the configuration file comes with a traceback, the message at its end.
        last = str(error).strip().rpartition("\n")[2]
        message = last if "Traceback" in str(error) else error
        raise errors.InputError(f"{command}: {message}") from error
    return config, values["workdir"].value


def parse(kind: type[T], config: ml_collections.ConfigDict) -> T:
    """Return the configuration as the struct of a stage.

    Raises:
      InputError: names every field that is unknown, missing, or of a wrong type or value.
    """
    wrong: list[str] = []
    parsed = config_values.section(kind, config.to_dict(), "config", wrong)
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
