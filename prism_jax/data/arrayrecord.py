"""Typed rows as ArrayRecord files with TFDS metadata, written and read without TensorFlow.

The rows stay in order. The folder is a normal TFDS data set: `tfds.builder_from_directory` opens
it. Texts that a row does not have are stored as empty strings.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, SupportsIndex

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_data_source, array_record_module

from prism_jax import errors
from prism_jax.data import records

SPLIT = "train"
_NAME = "prism_rows"
_FEATURES = "features.json"
_SHARD_BYTES = 256 << 20
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
_COMMON = {"id": _TEXT(), "source": _TEXT(), "images": _IMAGES}
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
    if kind == "sft":
        messages = _turns_in(example["messages"])
        return records.SFTRow(id=row_id, source=source, messages=messages, images=images)
    if kind == "pairs":
        return records.PairRow(
            id=row_id,
            source=source,
            prompt=_text(example["prompt"]),
            image=images[0] if images else None,
            **{name: _text(example[name]) or None for name in _PAIR_TEXTS},
        )
    return records.PromptRow(
        id=row_id,
        source=source,
        prompt=_turns_in(example["prompt"]),
        images=images,
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


def _scale_in(values: Mapping[str, int | None]) -> records.Scale | None:
    return records.Scale(**values) if any(values.values()) else None


class _Info(tfds.core.DatasetInfo):
    """The metadata of a folder, for which TFDS must not search its bucket."""

    def initialize_from_bucket(self) -> None:
        pass


class RowsBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A builder that writes rows of a kind into a single split, in order and in constant memory."""

    VERSION = tfds.core.Version("1.0.0")
    name = _NAME
    # Nothing is downloaded. The inherited look-up of checksums needs importlib_resources, which
    # neither TFDS nor the newer etils install.
    url_infos = None

    def __init__(self, *, kind: str, rows: Iterable[records.Row], data_dir: str):
        self._kind = kind
        self._rows = rows
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return _Info(builder=self, features=features(self._kind), disable_shuffling=True)

    def _split_generators(self, dl_manager) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # Nothing is downloaded.
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, row in enumerate(self._rows):
            yield key, to_example(row)

    def _download_and_prepare(self, dl_manager, download_config) -> None:
        # The inherited writer sorts by key, with up to 1000 MiB in memory; beyond that it needs
        # TensorFlow's file system. These rows are in order, so they are written directly.
        del download_config
        splits = []
        for split, examples in self._split_generators(dl_manager).items():
            shards = _ShardWriter(self.data_path)
            with contextlib.closing(shards):
                for _, example in examples:
                    shards.write(
                        self.info.features.serialize_example(
                            self.info.features.encode_example(example)
                        )
                    )
            splits.append(self._name_shards(split, shards))
        self.info.set_splits(tfds.core.splits.SplitDict(splits))

    def _name_shards(self, split: str, shards: "_ShardWriter") -> tfds.core.SplitInfo:
        template = tfds.core.ShardedFileTemplate(
            dataset_name=self.name,
            data_dir=self.data_path,
            split=split,
            filetype_suffix="array_record",
        )
        for i, path in enumerate(shards.paths):
            path.rename(
                os.fspath(template.sharded_filepath(shard_index=i, num_shards=len(shards.paths)))
            )
        return tfds.core.SplitInfo(
            name=split,
            shard_lengths=shards.num_rows,
            num_bytes=shards.num_bytes,
            filename_template=template,
        )


class _ShardWriter:
    """A writer of records into files of at most `_SHARD_BYTES` (or a single record)."""

    def __init__(self, folder: os.PathLike):
        self.paths: list[pathlib.Path] = []
        self.num_rows: list[int] = []
        self.num_bytes = 0
        self._folder = pathlib.Path(folder)
        self._writer = None
        self._shard_bytes = 0

    def write(self, record: bytes) -> None:
        if self._writer is None or self._shard_bytes + len(record) > _SHARD_BYTES:
            self.close()
            self.paths.append(self._folder / f"shard-{len(self.paths):05d}.part")
            self.num_rows.append(0)
            self._shard_bytes = 0
            # A record per group, so that a row is read without its neighbours.
            self._writer = array_record_module.ArrayRecordWriter(
                os.fspath(self.paths[-1]), "group_size:1"
            )
        self._writer.write(record)
        self.num_rows[-1] += 1
        self.num_bytes += len(record)
        self._shard_bytes += len(record)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def write(rows: Iterable[records.Row], *, kind: str, folder: str) -> str:
    """Write rows into a TFDS folder below `folder`; return its path.

    An exception raised by `rows` passes through and leaves nothing readable behind.
    """
    builder = RowsBuilder(kind=kind, rows=rows, data_dir=folder)
    # Suppress TFDS's announcement of a download, which never happens; errors are raised.
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    return os.fspath(builder.data_path)


class StoredRows:
    """The rows of a folder that `write` made, by number. Thread-safe.

    Nothing in the folder selects code: the records are read with this module's features of the
    kind, and `features.json` must describe the same features.
    """

    def __init__(self, folder: str, *, kind: str):
        self.folder = folder
        self._kind = kind
        self._features = features(kind)
        _check_features(folder, kind)
        try:
            self._data = array_record_data_source.ArrayRecordDataSource(_shards(folder))
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


def _shards(folder: str) -> list[str]:
    """Return the paths of the record files, which must form a complete set, in order."""
    names = sorted(name for name in os.listdir(folder) if ".array_record" in name)
    count = len(names)
    expected = [f"{_NAME}-{SPLIT}.array_record-{i:05d}-of-{count:05d}" for i in range(count)]
    if not names or names != expected:
        got = records.shorten(", ".join(names) or "none", 200)
        raise errors.InputError(
            f"{folder}: must hold {_NAME}-{SPLIT}.array_record-00000-of-N and all that follow, "
            f"got {got}"
        )
    return [os.path.join(folder, name) for name in names]
