"""Write a Hugging Face checkpoint folder, one tensor at a time.

The safetensors library writes whole dictionaries; here the header goes first, followed by each
tensor as it is produced. The folder appears under its name only when it is complete.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from models.hf import files as hf_files

# The only files that are copied from a model's source folder: never weights, code or pickles.
COPIED = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
)
SHARD_BYTES = 5 * 10**9  # size of the files that the commands write
_NAMES = {dtype: name for name, dtype in hf_files.DTYPES.items() if name != "F64"}

Buffer = Any  # anything with the buffer protocol and contiguous


@dataclasses.dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    name: str
    dtype: str  # as in the file: BF16, F16, F32
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        return hf_files.DTYPES[self.dtype].itemsize

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.item_bytes


Produce = Callable[[Planned], Iterable[Buffer]]  # the tensor's bytes, in order, in any blocks


def dtype_name(dtype: Any, where: str) -> str:
    """Return the name of a type in a file; `where` names the parameter in the error."""
    if dtype not in _NAMES:
        raise ValueError(
            f"{where} has the type {dtype}, only {', '.join(_NAMES.values())} are kept"
        )
    return _NAMES[dtype]


def shards(tensors: Sequence[Planned], max_shard_bytes: int) -> list[list[Planned]]:
    """Cut the tensors into files of at most `max_shard_bytes`; a larger one gets a separate file.

    Wider types come first in a file, so that every tensor is aligned.
    """
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    result: list[list[Planned]] = []
    size = 0
    for tensor in tensors:
        if not result or size + tensor.num_bytes > max_shard_bytes:
            result.append([])
            size = 0
        result[-1].append(tensor)
        size += tensor.num_bytes
    return [sorted(shard, key=lambda t: -t.item_bytes) for shard in result]


def check_target(target: pathlib.Path) -> str | None:
    """Return the reason why a folder cannot be written to, None when it can."""
    parent = target.absolute().parent
    try:
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            return f"{target} exists and is no folder"
        if target.exists() and any(target.iterdir()):
            return f"{target} is not empty; nothing is overwritten"
        if not parent.is_dir():
            return f"{parent} is not a folder"
        # Permissions do not decide this: a file system may be read-only, and root may write all.
        os.rmdir(tempfile.mkdtemp(prefix=f".{target.name}.", dir=parent))
    except OSError as error:
        return f"{target} cannot be written: {error}"
    return None


def write_folder(
    target: pathlib.Path,
    planned: Sequence[Sequence[Planned]],
    produce: Produce,
    *,
    config_json: Mapping[str, Any],
    copy_from: pathlib.Path | None,
) -> None:
    """Write the files of `shards`, the index, `config.json` and `manifest.json`.

    All files are written beside the target under a name that begins with a dot, made durable, and
    then renamed: a killed export leaves no folder of the target's name. The files in `COPIED` are
    copied byte by byte from `copy_from`. Raises ValueError when the target is not empty.
    """
    problem = check_target(target)
    if problem is not None:
        raise ValueError(problem)
    partial = target.absolute().parent / f".{target.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed job with this process number
    partial.mkdir()
    try:
        weight_map, digests = {}, {}
        for number, shard in enumerate(planned, start=1):
            file = f"model-{number:05d}-of-{len(planned):05d}.safetensors"
            digests[file] = _write_shard(partial / file, shard, produce)
            weight_map |= {tensor.name: file for tensor in shard}
        total = sum(tensor.num_bytes for shard in planned for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        for name in COPIED if copy_from is not None else ():
            if (copy_from / name).exists():
                shutil.copyfile(hf_files.inside(copy_from, name), partial / name)
        _write_json(partial / "config.json", config_json)
        _write_json(partial / hf_files.MANIFEST, {"sha256": digests})
        _write_json(partial / hf_files.INDEX, index)
        for path in (*partial.iterdir(), partial):
            _sync(path)
        os.rename(partial, target)
        _sync(target.absolute().parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(path: pathlib.Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_shard(path: pathlib.Path, tensors: Sequence[Planned], produce: Produce) -> str:
    """Write one safetensors file and return its SHA-256."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    raw = len(raw).to_bytes(8, "little") + raw
    digest = hashlib.sha256(raw)
    # One thread digests a block while the next is gathered and written.
    with path.open("wb") as stream, concurrent.futures.ThreadPoolExecutor(1) as digesting:
        stream.write(raw)
        digested = digesting.submit(digest.update, b"")
        for tensor in tensors:
            done = 0
            for block in produce(tensor):
                data = memoryview(block).cast("B")
                stream.write(data)
                done += len(data)
                digested.result()
                digested = digesting.submit(digest.update, data)
            assert done == tensor.num_bytes, f"{tensor} was given {done} bytes"
        digested.result()
    return digest.hexdigest()
