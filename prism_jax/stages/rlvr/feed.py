"""The prompts of a run of RLVR, step by step, with the carry from each step to the next."""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence

from prism_jax import errors
from prism_jax.data import encode as data_encode
from prism_jax.data import processor, steps
from prism_jax.discriminator import opening
from prism_jax.policy import responses as policy_responses
from prism_jax.setup import prompt_mixture
from prism_jax.setup import prompts as prompts_lib
from prism_jax.stages.rlvr import carry as rlvr_carry
from prism_jax.stages.rlvr import config as rlvr_config
from prism_jax.stages.rlvr import groups as rlvr_groups
from prism_jax.stages.rlvr import reference as rlvr_reference


class Feed:
    """The prompts of a run, and the carry, which is saved with their position."""

    def __init__(
        self,
        prompts: steps.Steps,
        *,
        num_prompts: int,
        is_refilled: bool,
        coefficient: float | None,
        is_adapted: bool,
        reference: str | None,
        decode: Callable[[rlvr_groups.Json], rlvr_groups.Group],
    ):
        """Start at the first prompts.

        Args:
          num_prompts: that a step learns from.
          is_refilled: a step draws until enough groups vary, and may leave some over.
          coefficient: of the KL in the reward; None: there is none.
          is_adapted: the coefficient changes from step to step.
          reference: names the parameters of the reference policy; another one is refused.
          decode: undoes `carry.encode`.
        """
        self._prompts, self._num_prompts, self._decode = prompts, num_prompts, decode
        self._is_refilled, self._is_adapted = is_refilled, is_adapted
        self._reference = reference
        self.carry = rlvr_carry.Carry(groups=(), coefficient=coefficient)

    def __next__(self) -> rlvr_groups.Prompts | None:
        """Return the first prompts of a step; None where the carry alone fills it."""
        # Prompts that are read and not drawn from would be lost: the position moves on.
        return None if len(self.carry.groups) >= self._num_prompts else self.more()

    def more(self) -> rlvr_groups.Prompts:
        """Return the next prompts."""
        return next(self._prompts)

    def get_state(self) -> dict[str, rlvr_groups.Json]:
        """Return the position of the prompts and the carry, as JSON values."""
        state = self._prompts.get_state()
        # The names are those of the checkpoint's format.
        if self._is_refilled:
            state["surplus"] = [rlvr_carry.encode(group) for group in self.carry.groups]
        if self._is_adapted:
            state["kl_coefficient"] = self.carry.coefficient
        if self._reference is not None:
            state["reference"] = self._reference
        return state

    def set_state(self, state: Mapping[str, rlvr_groups.Json]) -> None:
        """Continue at a position.

        Raises:
          InputError: it belongs to other prompts or to another reference policy.
        """
        self._prompts.set_state(dict(state))
        # A KL term towards another policy is another training, and nothing else would tell.
        if self._reference != state.get("reference"):
            raise errors.InputError(
                f"cannot resume: the reference policy was {state.get('reference')} when the "
                f"checkpoint was written and is {self._reference} now"
            )
        coefficient = self.carry.coefficient
        if self._is_adapted:
            # Absent where a run of another configuration is continued on purpose.
            coefficient = state.get("kl_coefficient", coefficient)
        self.carry = rlvr_carry.Carry(
            groups=tuple(self._decode(group) for group in state.get("surplus", ())),
            coefficient=coefficient,
        )


def open_prompts(
    options: rlvr_config.Config,
    files: pathlib.Path,
    *,
    folder: pathlib.Path | None,
    open_cutter: Callable[[processor.Processor], opening.Cutter] | None = None,
) -> tuple[processor.Processor, prompts_lib.Opened]:
    """Return the processor and the validated prompts, each with a ground truth for the judge.

    Args:
      files: small files of the policy.
      folder: gets the list of the prompts that are left out.
      open_cutter: of the adversary, whose prompts also need a teacher; None: there is none.

    Raises:
      InputError: for wrong data, or fewer prompts than a step takes.
    """
    words = processor.Processor.from_folder(
        files,
        min_pixels=options.prompts.min_pixels,
        max_pixels=options.prompts.max_pixels,
        place="config.prompts.",
    )
    opened = prompts_lib.open_prompts(
        options.prompts.path,
        options.prompts,
        words,
        need_teacher=open_cutter is not None,
        need_answer=options.rewards.custom is None,
        folder=folder,
        check=None if open_cutter is None else open_cutter(words).check_teacher,
    )
    prompt_mixture.require(opened, options.rollout.num_prompts, field="rollout.num_prompts")
    prompt_mixture.require(opened, options.generation_prompts, field="groups.generation_prompts")
    return words, opened


def open_feed(
    options: rlvr_config.Config,
    words: processor.Processor,
    opened: prompts_lib.Opened,
    reader: policy_responses.Reader,
    reference: rlvr_reference.Reference | None,
) -> Feed:
    """Return the prompts of the run, with the carry between its steps."""

    def make(indices: Sequence[int]) -> rlvr_groups.Prompts:
        rows = [opened.rows[index] for index in indices]
        return rlvr_groups.Prompts(
            indices=list(indices), rows=rows, prompts=data_encode.encode_prompts(rows, words)
        )

    is_refilled = options.groups.keep != "all"
    # No step takes more than that, so the prompts never end before the run does.
    num_generations = options.groups.max_generations if is_refilled else 1
    return Feed(
        prompt_mixture.index_steps(
            opened,
            make,
            weights=options.prompts.weights,
            num_prompts=options.generation_prompts,
            num_steps=options.train.num_steps * num_generations,
            seed=options.seed,
            num_threads=options.train.num_threads,
        ),
        num_prompts=options.rollout.num_prompts,
        is_refilled=is_refilled,
        coefficient=options.reference.reward_coefficient,
        is_adapted=options.reference.reward_target is not None,
        reference=None if reference is None else reference.fingerprint,
        decode=functools.partial(rlvr_carry.decode, opened=opened, words=words, reader=reader),
    )
