"""How a discriminator that learns with the policy reads prompts, teachers and responses."""

import dataclasses
import pathlib
from collections.abc import Sequence

from models.inputs import Example
from prism_jax import errors
from prism_jax.data import encode, processor, records
from prism_jax.discriminator import section as section_lib
from prism_jax.discriminator import segments
from prism_jax.rewards import tags
from prism_jax.rows import Largest, RowShape
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.setup import prompts as prompts_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """The sizes of all prompts as the discriminator reads them."""

    sizes: list[encode.Size]
    longest: int  # tokens of the longest of the teacher's segments


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cutter:
    """The rule that cuts texts, with the section that it follows."""

    section: section_lib.Discriminator
    reader: segments.Reader

    def check_teacher(self, row: records.PromptRow) -> None:
        """Raise RowError for a teacher's response that is malformed."""
        self.reader.teacher(segments.teacher_text(row))

    def teachers(self, rows: Sequence[records.PromptRow]) -> list[segments.Cut]:
        """Return the segments of the teacher's response to each prompt."""
        return [self.reader.teacher(segments.teacher_text(row)) for row in rows]

    def prompts(self, rows: Sequence[records.PromptRow]) -> list[Example]:
        """Return the prompts as the discriminator reads them."""
        sees_images = self.section.sees_images
        return [
            self.reader.prompt(row.prompt, records.get_media(row), sees_images=sees_images)
            for row in rows
        ]

    def measure(self, opened: prompts_lib.Opened) -> Measured:
        """Return the sizes of all prompts, without decoding a picture."""
        longest, sizes = 0, []
        for index in range(len(opened.rows)):
            row = opened.rows[index]
            longest = max(longest, self.reader.teacher(segments.teacher_text(row)).longest)
            sizes.append(
                self.reader.measure(
                    row.prompt, records.get_media(row), sees_images=self.section.sees_images
                )
            )
        return Measured(sizes=sizes, longest=longest)

    def shape(
        self,
        measured: Measured,
        devices: devices_lib.Devices,
        *,
        num_prompts: int,
        num_responses: int,
        max_response_tokens: int,
        place: str,
    ) -> RowShape:
        """Return the rows into which the segments of any step fit.

        Args:
          num_prompts: of a step, with those of earlier steps that are learned from again.
          num_responses: to each.
          place: the section in the configuration, for errors.
        """
        # No segment of a response is longer than the response, but for how it ends.
        longest = max_response_tokens + self.reader.tail_tokens
        largest = encode.Size(
            tokens=max(size.tokens for size in measured.sizes),
            patches=max(size.patches for size in measured.sizes),
            images=max(size.images for size in measured.sizes),
        )
        advice = ""
        if measured.longest > longest:
            advice = (
                f"; the longest segment is a teacher's, of {measured.longest} tokens: "
                f"{place}.teacher_max_tokens cuts the rest, at the cost of its end"
            )
        return step_shape(
            self.section,
            devices,
            largest,
            continued_tokens=max(measured.longest, longest),
            num_prompts=num_prompts,
            num_responses=num_responses,
            place=place,
            advice=advice,
        )


def step_shape(
    section: section_lib.Discriminator,
    devices: devices_lib.Devices,
    largest: encode.Size,
    *,
    continued_tokens: int,
    num_prompts: int,
    num_responses: int,
    place: str,
    advice: str = "",
) -> RowShape:
    """Return the rows into which the segments of a step fit.

    Args:
      largest: the most of each that a prompt has.
      continued_tokens: of the longest segment.
      num_prompts: as for `Cutter.shape`, which has them from the data.
    """
    num_names = len(section.form.names)
    has_swaps = section.lengths.swap_coefficient is not None
    return section.rows.shape(
        Largest(
            # The most that a step may hold: all responses well-formed, no two segments equal.
            num_units=num_names * num_prompts * (1 + num_responses) + has_swaps * num_prompts,
            unit_sequences=1,
            unit_tokens=largest.tokens + continued_tokens,
            continued_tokens=continued_tokens,
            prompt_patches=largest.patches,
            prompt_frames=largest.images,
        ),
        devices,
        shared_units=num_names * (1 + num_responses),
        place=f"{place}.rows",
        advice=advice,
    )


def open_cutter(
    section: section_lib.Discriminator,
    model: setup_models.Model,
    words: processor.Processor,
    *,
    files: pathlib.Path,
    gate: tags.Gate,
    place: str,
) -> Cutter:
    """Return the rule that cuts texts for a discriminator.

    Args:
      words: of the policy.
      files: small files of the discriminator.
      gate: the format that a response must have.
      place: the section in the configuration, for errors.

    Raises:
      InputError: both models read tokens as different texts, or the section needs pictures.
    """
    section.rows.check_router(model.config, place=f"{place}.rows")
    own_words = words
    if model.config.vision is not None:
        own_words = processor.Processor.from_folder(
            files, min_pixels=section.min_pixels, max_pixels=section.max_pixels, place=f"{place}."
        )
    elif section.sees_images:
        raise errors.InputError(f"{place}.sees_images must be False for a model without vision")
    # Segments are passed on as the policy's tokens. As texts they would be tokenised again, and
    # differently.
    if not segments.same_words(words, own_words):
        raise errors.InputError(
            f"{place}.folder: policy and discriminator must have the same tokens"
        )
    reader = segments.Reader(
        own_words, vocab_tokens=model.config.text.vocab_size, gate=gate, form=section.form
    )
    return Cutter(section=section, reader=reader)
