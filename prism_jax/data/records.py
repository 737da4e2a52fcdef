"""The typed rows that every file format is read into, and the error that names a bad one.

A row's text marks each picture with `<image>`, in order, and the number of marks equals the number
of pictures. In a file a picture is a reference (a path below the dataset's root, or bytes); once a
row is validated it holds the encoded bytes, their sha256 and the size in pixels.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from prism_jax import errors

IMAGE_MARK = "<image>"
KINDS = ("sft", "pairs", "prompts")
_MESSAGE_CHARS = 400


def shorten(text: str, max_chars: int) -> str:
    """Return a text for a message; of a long one both ends and the length."""
    if len(text) <= max_chars:
        return text
    half = max_chars // 2
    return f"{text[:half]}…{text[-half:]} ({len(text)} characters)"


class RowError(errors.InputError):
    """Say that one row is wrong: `reason` is a name to count by, the message gives the values.

    A message never becomes as long as the file that it quotes.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(shorten(message, _MESSAGE_CHARS))
        self.reason = reason

    def alone(self) -> "RowError":
        """Return the error without the frames that raised it, which keep pictures in memory."""
        return RowError(self.reason, str(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where a row stands: rows (of JSON lines: lines) are counted from 1."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file} row {self.row}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """The size that a row asks for one of its pictures: bounds on its area, or height and width."""

    min_pixels: int | None = None
    max_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Image:
    """One picture. `sha256` and the size (after EXIF rotation) are None until it is validated."""

    path: str | None
    data: bytes | None
    sha256: str | None = None
    width_pixels: int | None = None
    height_pixels: int | None = None
    scale: Scale | None = None  # None: scaled as the stage's settings say


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
    """One turn; `role` is system, user or assistant.

    `is_learned` is False for an assistant's turn that demonstrations show but do not teach.
    """

    role: str
    content: str
    is_learned: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTRow:
    """A conversation that ends with the response to learn."""

    id: str
    source: str
    messages: tuple[Message, ...]
    images: tuple[Image, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairRow:
    """A prompt with a teacher's and a student's text: the four segments or the two whole responses.

    The other form's fields are None.
    """

    id: str
    source: str
    prompt: str
    image: Image | None
    teacher_caption: str | None
    student_caption: str | None
    teacher_cot: str | None
    student_cot: str | None
    teacher_response: str | None
    student_response: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptRow:
    """A prompt to sample from, with what the stage needs to score the responses (None: not given).

    `extra_info` holds JSON values only.
    """

    id: str
    source: str
    prompt: tuple[Message, ...]
    images: tuple[Image, ...]
    teacher_response: str | None
    teacher_caption: str | None
    teacher_cot: str | None
    data_source: str | None
    ground_truth: str | None
    equivalent_answers: tuple[str, ...]
    extra_info: Mapping[str, Any]


Row = SFTRow | PairRow | PromptRow


def get_images(row: Row) -> tuple[Image, ...]:
    """Return the pictures of a row of any kind, in the order of their marks."""
    if isinstance(row, PairRow):
        return () if row.image is None else (row.image,)
    return row.images


def replace_images(row: Row, images: tuple[Image, ...]) -> Row:
    """Return the row with other pictures, as many as it had."""
    if len(images) != len(get_images(row)):
        raise ValueError(f"row {row.id} has {len(get_images(row))} images, got {len(images)}")
    if isinstance(row, PairRow):
        return dataclasses.replace(row, image=images[0] if images else None)
    return dataclasses.replace(row, images=images)


def digest(row: Row) -> bytes:
    """Return 32 bytes that depend on all that a validated row teaches or asks, pictures included.

    Its id, its source and the paths of its pictures say where it came from and do not count.
    """
    content: dict[str, Any] = {
        name: [dataclasses.astuple(turn) for turn in value]
        if name in ("messages", "prompt") and not isinstance(value, str)
        else value
        for name, value in vars(row).items()
        if name not in ("id", "source", "image", "images")
    }
    content["pictures"] = [
        (image.sha256, None if image.scale is None else dataclasses.astuple(image.scale))
        for image in get_images(row)
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


def get_texts(row: Row) -> tuple[str, ...]:
    """Return every text of a row that the model will read, prompts first."""
    if isinstance(row, SFTRow):
        return tuple(message.content for message in row.messages)
    if isinstance(row, PairRow):
        return (row.prompt, *get_segments(row).values())
    teacher = (row.teacher_response, row.teacher_caption, row.teacher_cot)
    return (
        *(message.content for message in row.prompt),
        *(text for text in teacher if text is not None),
    )


def get_segments(row: PairRow) -> dict[str, str]:
    """Return the teacher and student texts that the row has, by field name."""
    segments = {
        "teacher_caption": row.teacher_caption,
        "student_caption": row.student_caption,
        "teacher_cot": row.teacher_cot,
        "student_cot": row.student_cot,
        "teacher_response": row.teacher_response,
        "student_response": row.student_response,
    }
    return {name: text for name, text in segments.items() if text is not None}
