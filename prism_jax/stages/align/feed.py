"""Alignment's data: prompts as both models read them, with the teacher's response to each."""

import dataclasses
import pathlib
from collections.abc import Sequence

from models.inputs import Example
from prism_jax import errors
from prism_jax.data import encode, processor, records, steps
from prism_jax.discriminator import segments
from prism_jax.policy import update as policy_update
from prism_jax.rows import Largest, RowShape
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
        section, prompts = options.discriminator, options.prompts
        section.rows.check_router(discriminator.config, place="config.discriminator.rows")
        self.options = options
        self.words = processor.Processor.from_folder(
            files,
            min_pixels=prompts.min_pixels,
            max_pixels=prompts.max_pixels,
            place="config.prompts.",
        )
        discriminator_words = self.words
        if discriminator.config.vision is not None:
            discriminator_words = processor.Processor.from_folder(
                discriminator_files,
                min_pixels=section.min_pixels,
                max_pixels=section.max_pixels,
                place="config.discriminator.",
            )
        elif section.sees_images:
            raise errors.InputError(
                "config.discriminator.sees_images must be False for a model without vision"
            )
        # Segments are passed on as the policy's tokens. As texts they would be tokenised again, and
        # differently.
        if not segments.same_words(self.words, discriminator_words):
            raise errors.InputError(
                "config.discriminator.folder: policy and discriminator must have the same tokens"
            )
        self.reader = segments.Reader(
            discriminator_words,
            vocab_tokens=discriminator.config.text.vocab_size,
            gate=options.gate,
            form=section.form,
        )
        self._opened = prompts_lib.open_prompts(
            prompts.path,
            prompts,
            self.words,
            need_teacher=True,
            # Prompts without a ground truth are welcome as long as nothing is judged.
            need_answer=options.advantage.asks_judge,
            folder=folder,
            check=self._check_teacher,
        )
        prompt_mixture.require(
            self._opened, options.rollout.num_prompts, field="rollout.num_prompts"
        )
        self.sizes = self._opened.sizes
        # Over all prompts and before the first step: every step then has one shape, and a prompt
        # that is too long ends the run now and not in its last epoch.
        self._longest, self._discriminator_sizes = self._measure(self._opened)

    def _check_teacher(self, row: records.PromptRow) -> None:
        """Raise RowError for a teacher's response that is malformed."""
        self.reader.teacher(segments.teacher_text(row))

    def _measure(self, opened: prompts_lib.Opened) -> tuple[int, list[encode.Size]]:
        """Return the longest of the teacher's segments, and the prompts' sizes."""
        longest, sizes = 0, []
        for index in range(len(opened.rows)):
            row = opened.rows[index]
            longest = max(longest, self.reader.teacher(segments.teacher_text(row)).longest)
            sizes.append(
                self.reader.measure(
                    row.prompt, row.images, sees_images=self.options.discriminator.sees_images
                )
            )
        return longest, sizes

    def shapes(self, devices: devices_lib.Devices) -> Shapes:
        """Return the rows into which any step fits."""
        options = self.options
        num_names = len(options.discriminator.form.names)
        # With those of earlier steps that the discriminator learns from again.
        num_prompts = options.rollout.num_prompts
        num_prompts += options.discriminator.steadying.replay_prompts or 0
        num_responses = num_prompts * options.rollout.num_responses
        has_swaps = options.discriminator.lengths.swap_coefficient is not None
        # No segment of a response is longer than the response, but for how it ends.
        longest = options.rollout.max_response_tokens + self.reader.tail_tokens
        continued = max(self._longest, longest)
        largest = Largest(
            # The most that a step may hold: all responses well-formed, no two segments equal.
            num_units=num_names * (num_prompts + num_responses) + has_swaps * num_prompts,
            unit_sequences=1,
            unit_tokens=max(size.tokens for size in self._discriminator_sizes) + continued,
            continued_tokens=continued,
            prompt_patches=max(size.patches for size in self._discriminator_sizes),
            prompt_frames=max(size.images for size in self._discriminator_sizes),
        )
        return Shapes(
            policy=policy_update.shape_of(options.rows, options.rollout, self.sizes, devices),
            discriminator=options.discriminator.rows.shape(
                largest,
                devices,
                shared_units=num_names * (1 + options.rollout.num_responses),
                place="config.discriminator.rows",
                advice=self._advice_on_teachers(longest),
            ),
        )

    def _advice_on_teachers(self, longest_of_policy: int) -> str:
        """Return advice on shorter rows where a teacher's segment is the longest; else nothing."""
        if self._longest <= longest_of_policy:
            return ""
        return (
            f"; the longest segment is a teacher's, of {self._longest} tokens: "
            "config.discriminator.teacher_max_tokens cuts the rest, at the cost of its end"
        )

    def train(self) -> steps.Steps:
        """Return the prompts of the run, step by step."""
        options = self.options
        return prompt_mixture.index_steps(
            self._opened,
            self.prompts_of,
            weights=options.prompts.weights,
            num_prompts=options.rollout.num_prompts,
            num_steps=options.train.num_steps,
            seed=options.seed,
            num_threads=options.train.num_threads,
        )

    def prompts_of(self, indices: Sequence[int]) -> Prompts:
        """Return the prompts of rows."""
        rows = [self._opened.rows[index] for index in indices]
        sees_images = self.options.discriminator.sees_images
        return Prompts(
            indices=list(indices),
            rows=rows,
            policy=encode.encode_prompts(rows, self.words),
            discriminator=[
                self.reader.prompt(row.prompt, row.images, sees_images=sees_images) for row in rows
            ],
            teachers=[self.reader.teacher(segments.teacher_text(row)) for row in rows],
        )
