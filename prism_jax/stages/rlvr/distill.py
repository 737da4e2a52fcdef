"""White-box distillation: the log-probs of an open teacher on the policy's responses.

    advantage of token t   +=  coefficient × (log p_teacher(t) − log p_policy(t))

That is the negative k1 estimate of KL(policy || teacher), token by token and without discount; its
policy gradient has the mean of the gradient of the KL at each place of the response. It is added to
the advantages of any algorithm and to those of an adversary, or with `has_reward=False` stands
alone. The teacher may be larger than the policy: it needs the same tokens and the same pictures.
Its log-probs cost a forward pass of each step, and the policy's another.
Source: arXiv 2306.13649 (on-policy distillation); 2306.08543 (reverse KL).
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from prism_jax import batches, configuration, errors, metrics
from prism_jax.checkpoints import pretrained
from prism_jax.data import processor
from prism_jax.policy import batch as policy_batch
from prism_jax.policy import loss as policy_loss
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.rlvr import distill_config
from prism_jax.stages.rlvr import groups as rlvr_groups
from prism_jax.stages.rlvr import packing as rlvr_packing
from prism_jax.stages.rlvr import reference as rlvr_reference

Logprobs = Callable[[nnx.State, policy_batch.PolicyBatch], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """A policy that is not trained, of any size."""

    graphdef: nnx.GraphDef
    params: nnx.State
    fingerprint: str  # changes when a parameter does


def open_teacher(
    options: distill_config.Distill,
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
    if _geometry(teacher) != _geometry(model):
        raise errors.InputError(f"{place} reads pictures or positions differently from the policy")
    params = setup_models.load_params(teacher, devices)
    return Teacher(
        graphdef=teacher.graphdef,
        params=params,
        fingerprint=rlvr_reference.fingerprint(params),
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


class Distillation:
    """The advantages of tokens by a teacher's log-probs."""

    def __init__(
        self,
        options: distill_config.Distill,
        params: nnx.State,
        logprobs: Logprobs,
        *,
        max_response_tokens: int,
    ):
        """Store the parts.

        Args:
          logprobs: of the teacher, see `policy.loss.make_logprobs`.
        """
        self._options, self._params, self._logprobs = options, params, logprobs
        self._max_tokens = max_response_tokens

    @property
    def has_reward(self) -> bool:
        """Return whether the reward's advantages count beside the teacher's."""
        return self._options.has_reward

    def __call__(
        self, step: int, packed: rlvr_packing.PackedStep, responses: rlvr_groups.StepResponses
    ) -> tuple[np.ndarray | None, metrics.Metrics]:
        """Return float32[N, T] advantages, None for 0, and metrics, of the step counted from 1."""
        coefficient = self._options.coefficient_at(step)
        logged = {"reward/distill_coefficient": metrics.mean([coefficient])}
        if coefficient == 0 or not len(responses.lengths):
            return None, logged
        by_response = []
        for part, batch in zip(packed.parts, packed.batches, strict=True):
            # Taken as the packer left them, with the policy's log-probs before its update.
            teacher = self._logprobs(self._params, batch)
            arrays = (batch.old_logprobs, batch.sampler_logprobs, teacher)
            host = batches.to_host(arrays)
            by_response.append([part.read(x, self._max_tokens) for x in host])
        old, sampler, teacher = (np.concatenate(x) for x in zip(*by_response, strict=True))
        # Older responses are those of the policy that drew them.
        old = np.where(responses.is_older[:, None], sampler, old)
        mask = np.arange(self._max_tokens) < responses.lengths[:, None]
        distances = np.where(mask, teacher - old, np.float32(0))
        logged["reward/teacher_kl"] = metrics.mean(-distances[mask])
        return (coefficient * distances).astype(np.float32), logged


def make(
    options: distill_config.Distill,
    teacher: Teacher | None,
    settings: policy_loss.Settings,
) -> Distillation | None:
    """Return the distillation, not compiled before the first step; None without a teacher."""
    if teacher is None:
        return None
    return Distillation(
        options,
        teacher.params,
        policy_loss.make_logprobs(teacher.graphdef, settings),
        max_response_tokens=settings.max_response_tokens,
    )
