"""Registered TFDS builders of the three kinds of rows, which write without TensorFlow.

A folder is found by name where its path ends in the builder's name and version:

  DATA/prism_sft/3.0.0         tfds.data_source("prism_sft", split="train", data_dir=DATA)
  DATA/prism_sft/mine/3.0.0    tfds.data_source("prism_sft/mine", split="test", data_dir=DATA)
"""

import contextlib
import io
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds
from array_record.python import array_record_module

from prism_jax import errors
from prism_jax.data import arrayrecord, records

Splits = Mapping[str, Iterable[records.Row]]
_VERSION = "3.0.0"  # its first number is the version of the manifest
_SHARD_BYTES = 256 << 20


class _Info(tfds.core.DatasetInfo):
    """The metadata of a folder, for which TFDS must not search its bucket."""

    def initialize_from_bucket(self) -> None:
        pass


class _Rows(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A builder that writes rows of a kind into splits, in order and in constant memory."""

    VERSION = tfds.core.Version(_VERSION)
    KIND: str
    # Nothing is downloaded. The inherited look-up of checksums needs importlib_resources, which
    # neither TFDS nor the newer etils install.
    url_infos = None

    def __init__(self, *, splits: Splits | None = None, **options: Any):
        """Make a builder; without the rows of splits it opens what is there, and writes nothing."""
        self._splits = splits
        super().__init__(**{"file_format": "array_record"} | options)

    def _info(self) -> tfds.core.DatasetInfo:
        return _Info(builder=self, features=arrayrecord.features(self.KIND), disable_shuffling=True)

    def _split_generators(self, dl_manager) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # Nothing is downloaded.
        if self._splits is None:
            raise errors.InputError(
                f"{self.data_path}: must hold a folder that `data build --kind={self.KIND}` wrote"
            )
        return {split: self._generate_examples(rows) for split, rows in self._splits.items()}

    def _generate_examples(
        self, rows: Iterable[records.Row]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, row in enumerate(rows):
            yield key, arrayrecord.to_example(row)

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


class PrismSft(_Rows):
    """Demonstrations, as `prism_sft`."""

    KIND = "sft"


class PrismPairs(_Rows):
    """Teacher and student texts, as `prism_pairs`."""

    KIND = "pairs"


class PrismPrompts(_Rows):
    """Prompts with answers and teacher texts, as `prism_prompts`."""

    KIND = "prompts"


_BUILDERS = {builder.KIND: builder for builder in (PrismSft, PrismPairs, PrismPrompts)}


def write(splits: Splits, *, kind: str, folder: str) -> str:
    """Write the rows of each split into a TFDS folder below `folder`; return its path.

    An exception raised by rows passes through and leaves nothing readable behind.
    """
    builder = _BUILDERS[kind](splits=splits, data_dir=folder)
    # Suppress TFDS's announcement of a download, which never happens; errors are raised.
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    return os.fspath(builder.data_path)
