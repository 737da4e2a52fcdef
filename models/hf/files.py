"""List the tensors of a checkpoint folder, after checking each of its files.

This file reads only JSON and the headers of safetensors files, and never opens a pickle.

Source: https://huggingface.co/docs/safetensors (format), the index as transformers writes it.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MANIFEST = "manifest.json"
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_NUM_THREADS = 8

# Types that parameters may have; of the others only the size is known, to check a header.
DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
_ITEM_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
_MAX_AXES = 32
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_PICKLES = (b"PK\x03\x04", *(bytes([0x80, version]) for version in range(2, 6)))


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file: its type, shape, and the offset of its bytes in the file."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def listing(items: Mapping[str, Sequence[str]]) -> str:
    """Return `title (count): first ten; title (count): …` of the titles that have items."""
    return "; ".join(
        f"{title} ({len(names)}): {', '.join(names[:10])}"
        + (f", … and {len(names) - 10} more" if len(names) > 10 else "")
        for title, names in items.items()
        if names
    )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON object; raise ValueError naming the file when it is not one."""
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=_no_duplicates)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def inside(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Return the path of a file of the folder, or raise ValueError when it lies elsewhere.

    Symbolic links may leave the folder only in the hub's cache, where the files of
    `models--x/snapshots/REVISION` are links into `models--x/blobs`.
    """
    if not name or name in (".", "..") or pathlib.PurePosixPath(name).name != name or "\\" in name:
        raise ValueError(f"{folder}: the file name {name!r:.99} must be a plain name in the folder")
    path = folder / name
    if not path.exists():
        raise ValueError(f"{path} is missing")
    allowed = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        allowed.append(folder.resolve().parent.parent / "blobs")
    target = path.resolve()
    if target.parent not in allowed or not target.is_file():
        raise ValueError(f"{path} leads out of the folder or to no regular file: {target}")
    return target


def _entry(name: str, file: str, value: Any, start: int, where: pathlib.Path) -> Tensor:
    """Check one entry of a header."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where}: the header's entry {name!r:.99} is malformed")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise ValueError(f"{where}: the header's entry {name!r:.99} has a bad shape or bad offsets")
    if not isinstance(dtype, str) or dtype not in _ITEM_BITS:
        raise ValueError(f"{where}: the tensor {name!r:.99} has the unknown type {dtype!r:.80}")
    num_bytes = -(-math.prod(shape) * _ITEM_BITS[dtype] // 8)
    if offsets[1] - offsets[0] != num_bytes:
        raise ValueError(
            f"{where}: the tensor {name!r:.99} of type {dtype} and shape {shape} needs {num_bytes} "
            f"bytes, its offsets {offsets} give {offsets[1] - offsets[0]}"
        )
    return Tensor(name, file, dtype, tuple(shape), start + offsets[0], num_bytes)


def _are_sizes(numbers: Any) -> bool:
    """Return whether this is a short list of numbers that are possible sizes in a file."""
    return (
        isinstance(numbers, list)
        and len(numbers) <= _MAX_AXES
        and all(type(n) is int and 0 <= n < 2**63 for n in numbers)
    )


def read_header(path: pathlib.Path, file: str) -> dict[str, Tensor]:
    """Read and check the header of a safetensors file; raise ValueError naming the file.

    Checked: the file has exactly the size in the header, the tensors cover it without a gap or an
    overlap, types and shapes agree with the number of bytes, and no key occurs twice.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        first = stream.read(8)
        header_bytes = int.from_bytes(first, "little")
        if len(first) < 8 or header_bytes > min(size - 8, _MAX_HEADER_BYTES):
            if first.startswith(_PICKLES):
                raise ValueError(
                    f"{path} is a pickle (a PyTorch file), not safetensors; it is not opened, "
                    "because reading a pickle runs the code in it"
                )
            raise ValueError(
                f"{path} is truncated or not safetensors: {size} bytes, of which the header "
                f"claims {header_bytes}"
            )
        raw = stream.read(header_bytes)
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the header must be a JSON object")
    header.pop("__metadata__", None)
    start = 8 + header_bytes
    tensors = {name: _entry(name, file, value, start, path) for name, value in header.items()}
    end = start
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.num_bytes)):
        if tensor.offset != end:
            raise ValueError(f"{path}: a gap or an overlap before the tensor {tensor.name!r:.99}")
        end += tensor.num_bytes
    if end != size:
        said = "truncated" if size < end else "too long"
        raise ValueError(f"{path} is {said}: {size} bytes, its header describes {end}")
    return tensors


def _indexed(path: pathlib.Path) -> dict[str, Tensor]:
    """Read the index and its files; gather all disagreements into one error."""
    weight_map = read_json(inside(path, INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(f"{path / INDEX}: weight_map must map tensor names to file names")
    tensors: dict[str, Tensor] = {}
    files: dict[str, dict[str, Tensor]] = {}
    problems = []
    for file in sorted(set(weight_map.values())):
        try:
            if not file.endswith(".safetensors"):
                raise ValueError(f"{path / INDEX}: {file!r:.99} is not a safetensors file")
            files[file] = read_header(inside(path, file), file)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))
    wrong = [f"{name} in {file}" for name, file in weight_map.items() if name not in files[file]]
    unknown = [
        f"{name} in {file}"
        for file, header in files.items()
        for name in header
        if weight_map.get(name) != file
    ]
    if wrong or unknown:
        raise ValueError(
            f"{path / INDEX} and the files disagree: "
            + listing(
                {
                    "named by the index, not in the file": wrong,
                    "in the file, not named there by the index": unknown,
                }
            )
        )
    for name, file in weight_map.items():
        tensors[name] = files[file][name]
    return tensors


def sha256(path: pathlib.Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def compare_manifest(path: pathlib.Path, files: Iterable[str]) -> None:
    """Compare the SHA-256 of these files with `manifest.json`, where the folder has one.

    Raises ValueError naming each file that changed since it was written.
    """
    if not (path / MANIFEST).exists():
        return
    entries = read_json(inside(path, MANIFEST)).get("sha256")
    if not isinstance(entries, dict) or not all(isinstance(d, str) for d in entries.values()):
        raise ValueError(
            f"{path / MANIFEST}: sha256 must map file names to digests, as export writes it; "
            "without the file nothing is compared"
        )
    unlisted = sorted(set(files) - set(entries))
    listed = sorted(set(files) & set(entries))
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
        digests = pool.map(lambda file: sha256(inside(path, file)), listed)
        changed = [f for f, digest in zip(listed, digests, strict=True) if digest != entries[f]]
    if unlisted or changed:
        raise ValueError(
            f"{path / MANIFEST} does not vouch for the files: "
            + listing({"not listed": unlisted, "changed since it was written": changed})
        )


def refuse_adapter(path: pathlib.Path) -> None:
    """Raise ValueError for a folder that holds an adapter, beside a base model or alone."""
    adapters = [name for name in _ADAPTERS if (path / name).exists()]
    if adapters:
        raise ValueError(
            f"{path} holds an adapter ({', '.join(adapters)}), which is not applied: merge the "
            "adapter into its base model first (merge_and_unload of peft) and name that folder"
        )


def list_tensors(path: pathlib.Path, *, check_manifest: bool) -> dict[str, Tensor]:
    """Return the tensors of a folder by name, after checking all its files.

    With `check_manifest` each file's SHA-256 is compared with `manifest.json`, if there is one.
    Raises ValueError naming the file for: an adapter, no weights, weights only as pickles, two sets
    of weights, an index that names a file outside the folder or disagrees with the files, a
    missing, truncated or malformed file.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder")
    refuse_adapter(path)
    single, index = (path / SINGLE).exists(), (path / INDEX).exists()
    if single and index:
        raise ValueError(f"{path} holds both {SINGLE} and {INDEX}: which one is meant is unknown")
    if index:
        tensors = _indexed(path)
    elif single:
        tensors = read_header(inside(path, SINGLE), SINGLE)
    else:
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        raise ValueError(
            f"{path} holds neither {SINGLE} nor {INDEX}"
            + (f"; {', '.join(pickles)} are pickles and are not opened" if pickles else "")
        )
    if check_manifest:
        compare_manifest(path, {tensor.file for tensor in tensors.values()})
    return tensors
