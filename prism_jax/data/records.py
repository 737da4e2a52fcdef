"""The typed rows that all file formats are converted to, and the error for a bad row.

A row's text marks each picture with `<image>` and each video with `<video>`, in order, and the
number of marks equals the number of pictures and of videos. In a file a picture is a reference (a
path below the dataset's root, or bytes); in a validated row it has the encoded bytes, their sha256
and the size in pixels.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from prism_jax import errors

IMAGE_MARK = "<image>"
VIDEO_MARK = "<video>"
KINDS = ("sft", "pairs", "prompts")
# The released files' mark for an empty list of equivalent answers. In a list with others it voids
# them too, as in the released reward.
# Source: PRISM verl/verl/utils/reward_score/math_verify_with_format.py:81.
NO_EQUIVALENT = "__EMPTY__"
_MESSAGE_CHARS = 400


def shorten(text: str, max_chars: int) -> str:
    """Return a text for a message; a long text is cut to both ends and its length."""
    if len(text) <= max_chars:
        return text
    half = max_chars // 2
    return f"{text[:half]}…{text[-half:]} ({len(text)} characters)"


class RowError(errors.InputError):
    """An error in a row: `reason` is a name to count by, the message gives the values.

    Long messages are shortened, since they quote the file.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(shorten(message, _MESSAGE_CHARS))
        self.reason = reason

    def alone(self) -> "RowError":
        """Return the error without its traceback, whose frames keep pictures in memory."""
        return RowError(self.reason, str(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """The file and number of a row: rows (in JSON lines: lines) are counted from 1."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file} row {self.row}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """The size that a row sets for a picture: bounds on its area, or height and width."""

    min_pixels: int | None = None
    max_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Image:
    """A picture. `sha256` and the size (after EXIF rotation) are None until it is validated."""

    path: str | None
    data: bytes | None
    sha256: str | None = None
    width_pixels: int | None = None
    height_pixels: int | None = None
    scale: Scale | None = None  # None: scaled by the stage's settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Video:
    """A video: one file with all frames, or a list with a picture for each frame.

    `frames_per_second` is the rate of these frames: of a list as the row gives it, of a file None
    until it is validated, like `num_frames`.
    """

    files: tuple[Image, ...]
    is_list: bool
    frames_per_second: float | None = None
    # The rate to sample at; None: the frames of a list are used as they are, those of a file are
    # sampled at the checkpoint's rate.
    sampled_per_second: float | None = None
    num_frames: int | None = None

    @property
    def is_sampled(self) -> bool:
        """Return whether all frames are used."""
        return self.is_list and self.sampled_per_second is None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
    """A turn; `role` is system, user or assistant.

    `is_learned` is False for an assistant's turn that is shown without a loss.
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
    videos: tuple[Video, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairRow:
    """A prompt with a teacher's and a student's text: the four segments or the two whole responses.

    The fields of the other form are None.
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
    video: Video | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptRow:
    """A prompt to sample from, with the data to score its responses (None: missing).

    `extra_info` has only JSON values.
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
    videos: tuple[Video, ...] = ()


Row = SFTRow | PairRow | PromptRow


def get_images(row: Row) -> tuple[Image, ...]:
    """Return the pictures of a row of any kind, in the order of their marks."""
    if isinstance(row, PairRow):
        return () if row.image is None else (row.image,)
    return row.images


def get_videos(row: Row) -> tuple[Video, ...]:
    """Return the videos of a row of any kind, in the order of their marks."""
    if isinstance(row, PairRow):
        return () if row.video is None else (row.video,)
    return row.videos


def get_media(row: Row) -> tuple[Image | Video, ...]:
    """Return the pictures of a row, then its videos."""
    return (*get_images(row), *get_videos(row))


def get_files(row: Row) -> tuple[Image, ...]:
    """Return the pictures of a row, then the files of its videos."""
    return (*get_images(row), *(file for video in get_videos(row) for file in video.files))


def replace_media(row: Row, media: Sequence[Image | Video]) -> Row:
    """Return the row with other pictures and videos, as many of each, ordered as by `get_media`."""
    images = tuple(item for item in media if isinstance(item, Image))
    videos = tuple(item for item in media if isinstance(item, Video))
    counts, wanted = (len(images), len(videos)), (len(get_images(row)), len(get_videos(row)))
    if counts != wanted:
        raise ValueError(f"row {row.id} has {wanted} images and videos, got {counts}")
    if isinstance(row, PairRow):
        return dataclasses.replace(
            row, image=images[0] if images else None, video=videos[0] if videos else None
        )
    return dataclasses.replace(row, images=images, videos=videos)


def replace_files(row: Row, files: Sequence[Image]) -> Row:
    """Return the row with other files, in the order of `get_files`."""
    rest = iter(files)
    media = [
        dataclasses.replace(item, files=tuple(next(rest) for _ in item.files))
        if isinstance(item, Video)
        else next(rest)
        for item in get_media(row)
    ]
    return replace_media(row, media)


def digest(row: Row) -> bytes:
    """Return 32 bytes that depend on the whole content of a validated row, pictures included.

    Its id, its source and the paths of its files are not part of the content.
    """
    content: dict[str, Any] = {
        name: [dataclasses.astuple(turn) for turn in value]
        if name in ("messages", "prompt") and not isinstance(value, str)
        else value
        for name, value in vars(row).items()
        if name not in ("id", "source", "image", "images", "video", "videos")
    }
    content["pictures"] = [
        (image.sha256, None if image.scale is None else dataclasses.astuple(image.scale))
        for image in get_images(row)
    ]
    videos = [
        (
            [file.sha256 for file in video.files],
            video.is_list,
            video.frames_per_second,
            video.sampled_per_second,
        )
        for video in get_videos(row)
    ]
    content |= {"videos": videos} if videos else {}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


def get_texts(row: Row) -> tuple[str, ...]:
    """Return all texts of a row that the model reads, prompts first."""
    if isinstance(row, SFTRow):
        return tuple(message.content for message in row.messages)
    if isinstance(row, PairRow):
        return (row.prompt, *get_segments(row).values())
    teacher = (row.teacher_response, row.teacher_caption, row.teacher_cot)
    return (
        *(message.content for message in row.prompt),
        *(text for text in teacher if text is not None),
    )


def get_question(row: Row) -> str:
    """Return the user's turns as one text for a reader, without marks of pictures."""
    if isinstance(row, PairRow):
        turns = [row.prompt]
    else:
        messages = row.messages if isinstance(row, SFTRow) else row.prompt
        turns = [turn.content for turn in messages if turn.role == "user"]
    return without_marks("\n".join(turns)).strip()


def without_marks(text: str) -> str:
    """Return a text without the marks of pictures and videos."""
    return text.replace(IMAGE_MARK, "").replace(VIDEO_MARK, "")


def get_segments(row: PairRow) -> dict[str, str]:
    """Return the teacher and student texts of the row, by field name."""
    segments = {
        "teacher_caption": row.teacher_caption,
        "student_caption": row.student_caption,
        "teacher_cot": row.teacher_cot,
        "student_cot": row.student_cot,
        "teacher_response": row.teacher_response,
        "student_response": row.student_response,
    }
    return {name: text for name, text in segments.items() if text is not None}
