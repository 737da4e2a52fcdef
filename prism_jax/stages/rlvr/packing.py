"""The rows of a step, packed once, with the log-probs that the reward and the loss need.

    groups                a b c d          num_minibatches 2
    parts                 a b | c d

Each part is packed by itself and becomes the batch of one update.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx

from prism_jax import batches, metrics
from prism_jax.policy import batch as policy_batch
from prism_jax.policy import loss as policy_loss
from prism_jax.policy import update as policy_update
from prism_jax.rows import Continuation, RowShape
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.rlvr import advantages as rlvr_advantages
from prism_jax.stages.rlvr import config as rlvr_config
from prism_jax.stages.rlvr import groups as rlvr_groups
from prism_jax.stages.rlvr.updates import Batches


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedStep:
    """The packed responses of a step, part by part; advantages are still to come."""

    parts: list[policy_batch.PackedResponses]  # on the host
    batches: list[policy_batch.PolicyBatch]  # on the devices, with log-probs where needed
    metrics: metrics.Metrics


class Packer:
    """The packer of a step's responses, which also computes their log-probs."""

    def __init__(
        self,
        options: rlvr_config.Config,
        devices: devices_lib.Devices,
        model: setup_models.Model,
        *,
        shape: RowShape,
        reference: nnx.State | None,
    ):
        """Store the parts; nothing is compiled before the first step.

        Args:
          shape: of the rows of a part, see `stages.rlvr.updates.shape_of`.
          reference: parameters of the reference policy; None: there is none.
        """
        self._options, self._devices, self._model = options, devices, model
        self._shape, self._reference = shape, reference
        self._logprobs = policy_loss.make_logprobs(
            model.graphdef,
            policy_update.settings(options.train, options.rollout, options.model, devices),
        )

    def __call__(self, params: nnx.State, groups: Sequence[rlvr_groups.Group]) -> PackedStep:
        """Return the rows of the step, with the log-probs of these parameters where needed."""
        begun = time.monotonic()
        # All lengths are known here, those of every part: one place decides the rows of a step.
        num_parts = self._options.train.num_minibatches
        part_prompts = self._options.rollout.num_prompts // num_parts
        parts = [
            self._pack(groups[number * part_prompts : (number + 1) * part_prompts])
            for number in range(num_parts)
        ]
        on_devices = [self._with_logprobs(params, self._to_devices(part.batch)) for part in parts]
        seconds = {"time/pack_seconds": metrics.mean([time.monotonic() - begun])}
        return PackedStep(parts=parts, batches=on_devices, metrics=seconds)

    def distance(
        self, packed: PackedStep, responses: rlvr_groups.StepResponses, coefficient: float | None
    ) -> rlvr_advantages.Distance | None:
        """Return the distance from the reference response by response, on the host.

        The log-probs of older responses are the sampler's, of the policy that drew them.

        Args:
          coefficient: of the KL in the reward; None: the distance does not count, nor exists.
        """
        if coefficient is None:
            return None
        by_response = []
        for part, batch in zip(packed.parts, packed.batches, strict=True):
            arrays = (batch.old_logprobs, batch.reference_logprobs, batch.sampler_logprobs)
            max_tokens = self._options.rollout.max_response_tokens
            by_response.append([part.read(x, max_tokens) for x in batches.to_host(arrays)])
        old, reference, sampler = (np.concatenate(x) for x in zip(*by_response, strict=True))
        return rlvr_advantages.Distance(
            old_logprobs=np.where(responses.is_older[:, None], sampler, old),
            reference_logprobs=reference,
            coefficient=coefficient,
        )

    def finish(
        self, packed: PackedStep, responses: rlvr_groups.StepResponses, advantages: np.ndarray
    ) -> Batches:
        """Return the batches of the updates, one a part, with these advantages."""
        options, finished, start = self._options, [], 0
        for part, batch in zip(packed.parts, packed.batches, strict=True):
            within = slice(start, start + len(part.places))
            start = within.stop
            arrays: dict[str, np.ndarray] = {"advantages": part.spread(advantages[within])}
            if options.overlong.is_filtered:
                # A length of 0 takes a response out of every sum of the loss and of its weights.
                arrays["lengths"] = part.lengths(responses.ended[within])
            if options.groups.keep != "all":
                # Older groups learn with the log-probs that drew them. Without refilling there are
                # none, and the field stays None: another field would be another program.
                arrays["is_older"] = part.mark(responses.is_older[within])
            if options.train.num_updates == 1:
                # No update lies between the log-probs and this one, so the loss computes the old
                # log-probs itself.
                batch = dataclasses.replace(batch, old_logprobs=None)
            finished.append(dataclasses.replace(batch, **self._to_devices(arrays)))
        return tuple(finished)

    def _pack(self, groups: Sequence[rlvr_groups.Group]) -> policy_batch.PackedResponses:
        """Pack a part of the step; it may be empty where too few groups varied."""
        numbered = [(number, r) for number, group in enumerate(groups) for r in group.responses]
        return policy_batch.packed_responses(
            [group.prompt for group in groups],
            [Continuation(prompt=number, tokens=r.tokens) for number, r in numbered],
            [r.logprobs for _, r in numbered],
            self._shape,
            self._model.config,
        )

    def _with_logprobs(
        self, params: nnx.State, batch: policy_batch.PolicyBatch
    ) -> policy_batch.PolicyBatch:
        """Add the log-probs of the policy before its updates, and of the reference policy."""
        options = self._options
        old = reference = None
        # With one update a step the ratio is 1 by definition, and a forward pass is saved. With
        # several, each has its ratio to the policy before the first; and the KL in the reward
        # must use the trainer's log-probs, since the sampler's are rounded differently.
        if options.train.num_updates > 1 or options.reference.reward_coefficient is not None:
            old = self._to_devices(self._logprobs(params, batch))
        if self._reference is not None:
            reference = self._to_devices(self._logprobs(self._reference, batch))
        return dataclasses.replace(batch, old_logprobs=old, reference_logprobs=reference)

    def _to_devices(self, tree: Any) -> Any:
        return self._devices.put(tree, num_rows=self._shape.microbatch_rows)
