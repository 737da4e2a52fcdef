"""Typed rows as records with TFDS features, and the reader of the folders that hold them.

`tfds_builders` writes the folders. Texts that a row does not have are stored as empty strings.
"""

import dataclasses
import functools
import json
import os
import pathlib
import tempfile
from collections.abc import Collection, Mapping
from typing import Any, SupportsIndex

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_data_source

from prism_jax import errors
from prism_jax.data import records

SPLIT = "train"  # of a folder with a single one
_FEATURES = "features.json"
_TEXT = tfds.features.Text
_TURNS = tfds.features.Sequence(
    {"role": _TEXT(), "content": _TEXT(), "is_learned": tfds.features.Scalar(np.bool_)}
)
_SCALE = tuple(field.name for field in dataclasses.fields(records.Scale))
# Encoded bytes, since the Image feature needs TensorFlow inside a sequence.
_IMAGES = tfds.features.Sequence(
    {
        "data": tfds.features.Tensor(shape=(), dtype=np.object_),
        "path": _TEXT(),
        "sha256": _TEXT(),
        "width_pixels": tfds.features.Scalar(np.int32),
        "height_pixels": tfds.features.Scalar(np.int32),
        # Sizes that a row does not set are stored as 0.
        **{name: tfds.features.Scalar(np.int64) for name in _SCALE},
    }
)
_VIDEOS = tfds.features.Sequence(
    {
        # So many of `video_files`, in order.
        "num_files": tfds.features.Scalar(np.int32),
        "is_list": tfds.features.Scalar(np.bool_),
        "num_frames": tfds.features.Scalar(np.int32),
        # As text, since records hold numbers of 32 bits.
        "frames_per_second": _TEXT(),
        "sampled_per_second": _TEXT(),  # empty: not set
    }
)
_COMMON = {
    "id": _TEXT(),
    "source": _TEXT(),
    "images": _IMAGES,
    "videos": _VIDEOS,
    "video_files": _IMAGES,
}
_PAIR_TEXTS = (
    "teacher_caption",
    "student_caption",
    "teacher_cot",
    "student_cot",
    "teacher_response",
    "student_response",
)
_PROMPT_TEXTS = (
    "teacher_response",
    "teacher_caption",
    "teacher_cot",
    "data_source",
    "ground_truth",
)


def features(kind: str) -> tfds.features.FeaturesDict:
    """Return the TFDS features of a kind of row."""
    if kind == "sft":
        return tfds.features.FeaturesDict(_COMMON | {"messages": _TURNS})
    if kind == "pairs":
        texts = {name: _TEXT() for name in ("prompt", *_PAIR_TEXTS)}
        return tfds.features.FeaturesDict(_COMMON | texts)
    texts = {name: _TEXT() for name in (*_PROMPT_TEXTS, "extra_info")}
    equivalent = tfds.features.Sequence(_TEXT())
    return tfds.features.FeaturesDict(
        _COMMON | texts | {"prompt": _TURNS, "equivalent_answers": equivalent}
    )


def to_example(row: records.Row) -> dict[str, Any]:
    """Return a validated row as TFDS features."""
    example: dict[str, Any] = {
        "id": row.id,
        "source": row.source,
        "images": [_image_out(image) for image in records.get_images(row)],
        "videos": [_video_out(video) for video in records.get_videos(row)],
        "video_files": [
            _image_out(file) for video in records.get_videos(row) for file in video.files
        ],
    }
    if isinstance(row, records.SFTRow):
        return example | {"messages": _turns_out(row.messages)}
    if isinstance(row, records.PairRow):
        segments = records.get_segments(row)
        texts = {name: segments.get(name, "") for name in _PAIR_TEXTS}
        return example | texts | {"prompt": row.prompt}
    return example | {
        "prompt": _turns_out(row.prompt),
        "teacher_response": row.teacher_response or "",
        "teacher_caption": row.teacher_caption or "",
        "teacher_cot": row.teacher_cot or "",
        "data_source": row.data_source or "",
        "ground_truth": row.ground_truth or "",
        "equivalent_answers": list(row.equivalent_answers),
        "extra_info": json.dumps(row.extra_info, ensure_ascii=False, sort_keys=True),
    }


def from_example(kind: str, example: Mapping[str, Any]) -> records.Row:
    """Return the row that `to_example` stored."""
    row_id, source = _text(example["id"]), _text(example["source"])
    images = _images_in(example["images"])
    videos = _videos_in(example["videos"], _images_in(example["video_files"]))
    if kind == "sft":
        messages = _turns_in(example["messages"])
        return records.SFTRow(
            id=row_id, source=source, messages=messages, images=images, videos=videos
        )
    if kind == "pairs":
        return records.PairRow(
            id=row_id,
            source=source,
            prompt=_text(example["prompt"]),
            image=images[0] if images else None,
            video=videos[0] if videos else None,
            **{name: _text(example[name]) or None for name in _PAIR_TEXTS},
        )
    return records.PromptRow(
        id=row_id,
        source=source,
        prompt=_turns_in(example["prompt"]),
        images=images,
        videos=videos,
        equivalent_answers=tuple(_text(text) for text in example["equivalent_answers"]),
        extra_info=json.loads(_text(example["extra_info"])),
        **{name: _text(example[name]) or None for name in _PROMPT_TEXTS},
    )


def _text(value: bytes) -> str:
    return value.decode("utf-8")


def _turns_out(messages: tuple[records.Message, ...]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(message) for message in messages]


def _turns_in(turns: Mapping[str, Any]) -> tuple[records.Message, ...]:
    columns = zip(turns["role"], turns["content"], turns["is_learned"], strict=True)
    return tuple(
        records.Message(role=_text(role), content=_text(content), is_learned=bool(is_learned))
        for role, content, is_learned in columns
    )


def _image_out(image: records.Image) -> dict[str, Any]:
    scale = {} if image.scale is None else dataclasses.asdict(image.scale)
    return {
        "data": image.data,
        "path": image.path or "",
        "sha256": image.sha256,
        "width_pixels": image.width_pixels,
        "height_pixels": image.height_pixels,
        **{name: scale.get(name) or 0 for name in _SCALE},
    }


def _images_in(images: Mapping[str, Any]) -> tuple[records.Image, ...]:
    return tuple(
        records.Image(
            path=_text(images["path"][i]) or None,
            data=bytes(images["data"][i]),
            sha256=_text(images["sha256"][i]),
            width_pixels=int(images["width_pixels"][i]),
            height_pixels=int(images["height_pixels"][i]),
            scale=_scale_in({name: int(images[name][i]) or None for name in _SCALE}),
        )
        for i in range(len(images["data"]))
    )


def _video_out(video: records.Video) -> dict[str, Any]:
    return {
        "num_files": len(video.files),
        "is_list": video.is_list,
        "num_frames": video.num_frames,
        "frames_per_second": repr(video.frames_per_second),
        "sampled_per_second": repr(video.sampled_per_second) if video.sampled_per_second else "",
    }


def _videos_in(
    videos: Mapping[str, Any], files: tuple[records.Image, ...]
) -> tuple[records.Video, ...]:
    ends = np.cumsum(videos["num_files"], dtype=np.int64)
    if len(files) != (ends[-1] if len(ends) else 0):
        raise ValueError(f"the videos have {videos['num_files']} files, the row has {len(files)}")
    for i, num_files in enumerate(videos["num_files"]):
        wanted = videos["num_frames"][i] if videos["is_list"][i] else 1
        if num_files < 1 or num_files != wanted:
            raise ValueError(f"video {i + 1} must have {wanted} files, got {num_files}")
    return tuple(
        records.Video(
            files=files[end - videos["num_files"][i] : end],
            is_list=bool(videos["is_list"][i]),
            frames_per_second=float(videos["frames_per_second"][i]),
            sampled_per_second=float(videos["sampled_per_second"][i] or 0) or None,
            num_frames=int(videos["num_frames"][i]),
        )
        for i, end in enumerate(ends)
    )


def _scale_in(values: Mapping[str, int | None]) -> records.Scale | None:
    return records.Scale(**values) if any(values.values()) else None


class StoredRows:
    """The rows of a split of a folder that `tfds_builders` made, by number. Thread-safe.

    Nothing in the folder selects code: the records are read with this module's features of the
    kind, and `features.json` must describe the same features.
    """

    def __init__(self, folder: str, *, kind: str, split: str, splits: Collection[str]):
        """Open the rows of `split`; the folder must have the files of all `splits`, no others."""
        self.folder = folder
        self._kind = kind
        self._features = features(kind)
        _check_features(folder, kind)
        try:
            self._data = array_record_data_source.ArrayRecordDataSource(
                _shards(folder, kind, splits)[split]
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise errors.InputError(f"{folder}: not a readable data folder: {error}") from error

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: SupportsIndex) -> records.Row:
        try:
            example = self._features.deserialize_example_np(self._data[index])
            return from_example(self._kind, example)
        # The records are untrusted bytes: the parsers may raise anything.
        except Exception as error:
            cause = records.shorten(f"{type(error).__name__}: {error}", 200)
            raise errors.InputError(
                f"{self.folder}: row {int(index) + 1} is damaged: {cause}"
            ) from error


def _check_features(folder: str, kind: str) -> None:
    """Raise InputError unless `features.json` is that of `write` for this kind of rows."""
    path = pathlib.Path(folder) / _FEATURES
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise errors.InputError(f"{path}: must be a readable JSON file: {error}") from error
    if content != _written_features(kind):
        raise errors.InputError(
            f"{path}: must be the file that `data build` writes for this kind of rows; build the "
            "folder again from its files"
        )


@functools.cache
def _written_features(kind: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        features(kind).save_config(folder)
        return json.loads((pathlib.Path(folder) / _FEATURES).read_text(encoding="utf-8"))


def builder_name(kind: str) -> str:
    """Return TFDS's name of a kind's builder, with which the names of its files begin."""
    return f"prism_{kind}"


def _shards(folder: str, kind: str, splits: Collection[str]) -> dict[str, list[str]]:
    """Return the paths of each split's record files, which must form complete sets, in order."""
    names = sorted(name for name in os.listdir(folder) if ".array_record" in name)
    shards = {}
    for split in splits:
        start = f"{builder_name(kind)}-{split}.array_record"
        present = [name for name in names if name.startswith(f"{start}-")]
        expected = [f"{start}-{i:05d}-of-{len(present):05d}" for i in range(len(present))]
        if not present or present != expected:
            got = records.shorten(", ".join(names) or "none", 200)
            raise errors.InputError(
                f"{folder}: must hold {start}-00000-of-N and all that follow, got {got}"
            )
        shards[split] = [os.path.join(folder, name) for name in present]
    return shards
