"""Alignment's data: prompts as both models read them, with the teacher's response to each."""

import dataclasses
import pathlib
from collections.abc import Sequence

from models.inputs import Example
from prism_jax.data import encode, processor, records, steps
from prism_jax.discriminator import opening, segments
from prism_jax.policy import update as policy_update
from prism_jax.rows import RowShape
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.setup import prompt_mixture
from prism_jax.setup import prompts as prompts_lib
from prism_jax.stages.align import config as align_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of a step, as each model reads them, and the teacher's responses."""

    indices: list[int]  # of the rows
    rows: list[records.PromptRow]
    policy: list[Example]
    discriminator: list[Example]
    teachers: list[segments.Cut]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """The static sizes of both models' rows."""

    policy: RowShape
    discriminator: RowShape


class Feed:
    """The prompts of each step, in an order that follows from the seed."""

    def __init__(
        self,
        options: align_config.Config,
        policy: setup_models.Model,
        discriminator: setup_models.Model,
        folder: pathlib.Path,
        *,
        files: pathlib.Path,
        discriminator_files: pathlib.Path,
    ):
        """Open, validate and measure the prompts and the teacher's responses.

        Args:
          folder: gets the list of the rows that are left out.
          files: small files of the policy, `discriminator_files` of the discriminator.

        Raises:
          InputError: for wrong data, fewer prompts than a step takes, or models that read tokens
            as different texts.
        """
        prompts = options.prompts
        self.options = options
        self.words = processor.Processor.from_folder(
            files,
            min_pixels=prompts.min_pixels,
            max_pixels=prompts.max_pixels,
            place="config.prompts.",
        )
        self.cutter = opening.open_cutter(
            options.discriminator,
            discriminator,
            self.words,
            files=discriminator_files,
            gate=options.gate,
            place="config.discriminator",
        )
        self.reader = self.cutter.reader
        self._opened = prompts_lib.open_prompts(
            prompts.path,
            prompts,
            self.words,
            need_teacher=True,
            # Prompts without a ground truth are welcome as long as nothing is judged.
            need_answer=options.advantage.asks_judge,
            folder=folder,
            check=self.cutter.check_teacher,
        )
        prompt_mixture.require(
            self._opened, options.rollout.num_prompts, field="rollout.num_prompts"
        )
        self.sizes = self._opened.sizes
        # Over all prompts and before the first step: every step then has one shape, and a prompt
        # that is too long ends the run now and not in its last epoch.
        self._measured = self.cutter.measure(self._opened)

    def shapes(self, devices: devices_lib.Devices) -> Shapes:
        """Return the rows into which any step fits."""
        options = self.options
        replayed = options.discriminator.steadying.replay_prompts or 0
        return Shapes(
            policy=policy_update.shape_of(options.rows, options.rollout, self.sizes, devices),
            discriminator=self.cutter.shape(
                self._measured,
                devices,
                # Responses of earlier steps are scored and learned from beside the new ones.
                num_prompts=options.rollout.num_prompts + replayed,
                num_responses=options.rollout.num_responses,
                max_response_tokens=options.rollout.max_response_tokens,
                place="config.discriminator",
            ),
        )

    def train(self, shape: RowShape, *, is_split_seen: bool) -> steps.Steps:
        """Return the prompts of the run, step by step.

        Args:
          shape: of the discriminator's rows.
          is_split_seen: the training depends on their split into microbatches, see
            `row_shapes.Rows.num_rows`.
        """
        options = self.options
        return prompt_mixture.index_steps(
            self._opened,
            self.prompts_of,
            weights=options.prompts.weights,
            num_prompts=options.rollout.num_prompts,
            num_steps=options.train.num_steps,
            seed=options.seed,
            num_threads=options.train.num_threads,
            microbatch_rows=shape.microbatch_rows if is_split_seen else None,
        )

    def prompts_of(self, indices: Sequence[int]) -> Prompts:
        """Return the prompts of rows."""
        rows = [self._opened.rows[index] for index in indices]
        return Prompts(
            indices=list(indices),
            rows=rows,
            policy=encode.encode_prompts(rows, self.words),
            discriminator=self.cutter.prompts(rows),
            teachers=self.cutter.teachers(rows),
        )
