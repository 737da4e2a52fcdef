"""White-box distillation: an open teacher is loaded, and reads what the policy learns from.

It counts beside any algorithm and any discriminator, or with `has_reward=False` alone. How it
enters the loss is told in `policy.teaching`. The teacher may be larger than the policy: it needs
the same tokens and the same pictures, and for the kinds that compare whole distributions as many
places in the vocabulary. It stays in memory, laid out by its own shapes, and is never trained. Its
forward pass is part of each update.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from flax import nnx

from prism_jax import configuration, errors, metrics
from prism_jax.checkpoints import checksum, pretrained
from prism_jax.data import processor
from prism_jax.policy import batch as policy_batch
from prism_jax.policy import teaching as teaching_lib
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.training import train_step

_KEY = "teacher"  # in the position of a run's data


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill(configuration.Section):
    """An open teacher beside the reward, or in its place."""

    # Hugging Face folder, converted folder, or workdir of a stage; None: there is no teacher.
    folder: str | None = configuration.free()
    kind: teaching_lib.Kind  # see `policy.teaching`
    teacher_share: float | None  # of the mixture of "jsd", in (0, 1); None for other kinds
    coefficient: float | None  # in the first step; given exactly with `folder`
    end_coefficient: float | None  # from the step after `decay_steps` on; both or none are given
    decay_steps: int | None
    has_reward: bool  # False: the policy learns from the teacher alone

    def coefficient_at(self, step: int) -> float:
        """Return the coefficient of a step, counted from 1."""
        if self.decay_steps is None:
            return self.coefficient
        done = min(1.0, (step - 1) / self.decay_steps)
        return (1.0 - done) * self.coefficient + done * self.end_coefficient

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = configuration.at_least(self, 0, "coefficient", "end_coefficient")
        problems += configuration.at_least(self, 1, "decay_steps")
        share = self.teacher_share
        if (share is None) == (self.kind == "jsd"):
            problems.append(
                "teacher_share must be given for jsd and be None for others, got "
                f"{share} for {self.kind}"
            )
        if share is not None and not 0 < share < 1:
            problems.append(f"teacher_share must be in (0, 1), got {share}")
        if (self.coefficient is None) != (self.folder is None):
            problems.append(
                f"coefficient must be given exactly with folder, got {self.coefficient}"
            )
        if (self.end_coefficient is None) != (self.decay_steps is None):
            problems.append("end_coefficient and decay_steps: both or none must be given")
        if self.decay_steps is not None and self.folder is None:
            problems.append("decay_steps must be None without folder")
        if not self.has_reward and self.folder is None:
            problems.append("has_reward must be True without folder")
        return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """A policy that is not trained, of any size."""

    graphdef: nnx.GraphDef
    params: nnx.State
    fingerprint: str  # changes when a parameter does


def open_teacher(
    options: Distill,
    model: setup_models.Model,
    devices: devices_lib.Devices,
    words: processor.Processor,
) -> Teacher | None:
    """Load the teacher; None where there is none.

    Args:
      model: the policy, whose rows the teacher reads; `words` are its.

    Raises:
      InputError: the folder holds no policy, or one that reads tokens or pictures differently.
    """
    if options.folder is None:
        return None
    source = dataclasses.replace(
        model.source,
        folder=options.folder,
        init="pretrained",
        sizes=None,
        lora=configuration.NO_LORA,
        step=None,
    )
    files = pretrained.Source.of(options.folder, role="policy").files
    teacher = setup_models.open_model(source, devices, files=files, is_discriminator=False)
    place = f"config.distill.folder: {options.folder}"
    teacher_words = processor.Processor.from_folder(
        files, min_pixels=None, max_pixels=None, place=place
    )
    vocabularies = [each.tokenizer.get_vocab() for each in (words, teacher_words)]
    if vocabularies[0] != vocabularies[1] or words.ids != teacher_words.ids:
        raise errors.InputError(f"{place} has other tokens than the policy")
    sizes = [each.config.text.vocab_size for each in (model, teacher)]
    # A tokenizer may leave places at the end unused; softmax counts them all.
    if options.kind != "k1" and sizes[0] != sizes[1]:
        raise errors.InputError(
            f"{place} has {sizes[1]} places in its vocabulary, the policy {sizes[0]}: "
            f"config.distill.kind must be 'k1', got {options.kind!r}"
        )
    if _geometry(teacher) != _geometry(model):
        raise errors.InputError(f"{place} reads pictures or positions differently from the policy")
    params = setup_models.load_params(teacher, devices)
    return Teacher(
        graphdef=teacher.graphdef, params=params, fingerprint=checksum.fingerprint(params)
    )


def _geometry(model: setup_models.Model) -> tuple:
    """Return what the packed rows of a model depend on."""
    vision, text = model.config.vision, model.config.text
    if vision is None:
        return (None, text.mrope_section)
    return (
        vision.patch_dim,
        vision.spatial_merge_size,
        vision.num_position_embeddings,
        text.mrope_section,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation:
    """The teacher's part in each update."""

    options: Distill
    teacher: Teacher

    @property
    def has_reward(self) -> bool:
        """Return whether rewards count beside the teacher."""
        return self.options.has_reward

    def __call__(
        self, step: int, batches: tuple[policy_batch.PolicyBatch, ...]
    ) -> tuple[tuple[train_step.WithShared, ...], metrics.Metrics]:
        """Return the batches with the teacher, and metrics, of the step counted from 1."""
        coefficient = self.options.coefficient_at(step)
        lesson = teaching_lib.Lesson(
            params=self.teacher.params, coefficient=np.float32(coefficient)
        )
        taught = tuple(train_step.WithShared(rows=batch, shared=lesson) for batch in batches)
        return taught, {"policy/teacher_coefficient": metrics.mean([coefficient])}


def make(options: Distill, teacher: Teacher | None) -> Distillation | None:
    """Return the distillation; None without a teacher."""
    return None if teacher is None else Distillation(options=options, teacher=teacher)


def teaching_of(options: Distill, teacher: Teacher | None) -> teaching_lib.Teaching | None:
    """Return how the teacher enters the loss; None without a teacher."""
    if teacher is None:
        return None
    return teaching_lib.Teaching(
        graphdef=teacher.graphdef, kind=options.kind, teacher_share=options.teacher_share
    )


class _Data(Protocol):
    def __next__(self) -> Any: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


def with_teacher(data: _Data, teacher: Teacher | None) -> _Data:
    """Return data whose position names the teacher; without one the data as they are."""
    return data if teacher is None else _OfTeacher(data, teacher)


class _OfTeacher:
    """The data of a run with a teacher."""

    def __init__(self, data: _Data, teacher: Teacher):
        """Take the data of a run."""
        self._data, self._fingerprint = data, teacher.fingerprint

    def __next__(self) -> Any:
        return next(self._data)

    def get_state(self) -> dict[str, Any]:
        """Return the position as JSON values."""
        return self._data.get_state() | {_KEY: self._fingerprint}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue at a position.

        Raises:
          InputError: the run had another teacher.
        """
        # The folder may have moved; a pull towards another teacher is another training.
        if state.get(_KEY) != self._fingerprint:
            raise errors.InputError(
                f"cannot resume: the teacher was {state.get(_KEY)} when the checkpoint was written "
                f"and is {self._fingerprint} now"
            )
        self._data.set_state({name: value for name, value in state.items() if name != _KEY})
