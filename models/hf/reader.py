"""Read tensors from safetensors files, each directly into the shards of the devices.

This replaces the reader of the safetensors library for two reasons. The touched pages of a mapped
file count towards the resident memory of a process, while reads of a few MiB do not; and all shards
of a tensor, along whichever axes, are filled in one pass over its bytes.
"""

import concurrent.futures
import math
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from models.hf import files as hf_files

_CHUNK_BYTES = 4 << 20
_NUM_THREADS = 8
_WIDEST_BYTES = 8  # of an item of any type

# By type: unsigned integers of its size and the bits of the exponent, which are all set in NaN and
# infinity. Comparing the bits is several times faster than testing each number.
_EXPONENTS: dict[str, tuple[type[np.unsignedinteger], np.unsignedinteger]] = {
    "BF16": (np.uint16, np.uint16(0x7F80)),
    "F16": (np.uint16, np.uint16(0x7C00)),
    "F32": (np.uint32, np.uint32(0x7F80_0000)),
    "F64": (np.uint64, np.uint64(0x7FF0_0000_0000_0000)),
}

Box = tuple[tuple[int, int], ...]  # start and stop of every axis


class Reader:
    """The tensors of a folder by name; use it in a `with` statement.

    All data are checked while they are read: NaN or infinity raises a ValueError that names the
    weight.
    """

    def __init__(self, path: pathlib.Path, tensors: dict[str, hf_files.Tensor]):
        self.path = path
        self.tensors = tensors
        self._pool = concurrent.futures.ThreadPoolExecutor(_NUM_THREADS)
        self._descriptors: dict[str, int] = {}

    def __enter__(self) -> "Reader":
        for file in sorted({tensor.file for tensor in self.tensors.values()}):
            self._descriptors[file] = os.open(hf_files.inside(self.path, file), os.O_RDONLY)
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown()
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read_into(
        self, name: str, view: tuple[int, ...], wants: Sequence[tuple[Box, np.ndarray]]
    ) -> None:
        """Fill every array with its box of the tensor, in one pass over the bytes.

        Besides the arrays this needs only a few chunks of 4 MiB of memory.

        Args:
            view: a shape with as many items as the tensor; the boxes refer to it.
            wants: pairs of a box and the array to fill, of the box's shape and the stored type.
        """
        tensor = self.tensors[name]
        if not view:
            view, wants = (1,), [(((0, 1),), out.reshape(1)) for _, out in wants]
        if not tensor.num_bytes or not wants:
            return
        chunks = list(
            _chunks(view, hf_files.DTYPES[tensor.dtype].itemsize, [box for box, _ in wants])
        )
        jobs = [(tensor, view, chunk, wants) for chunk in chunks]
        if len(jobs) == 1:
            self._fill(*jobs[0])
        else:
            for _ in self._pool.map(lambda job: self._fill(*job), jobs):
                pass

    def read(self, name: str) -> np.ndarray:
        """Return a whole tensor."""
        tensor = self.tensors[name]
        out = np.empty(tensor.shape, hf_files.DTYPES[tensor.dtype])
        self.read_into(name, tensor.shape, [(tuple((0, n) for n in tensor.shape), out)])
        return out

    def blocks(self, name: str, num_bytes: int) -> Iterator[memoryview]:
        """Yield the bytes of a tensor in blocks of about `num_bytes`, whole items each."""
        tensor = self.tensors[name]
        num_bytes = max(num_bytes // _WIDEST_BYTES, 1) * _WIDEST_BYTES
        for begin in range(0, tensor.num_bytes, num_bytes):
            block = memoryview(bytearray(min(num_bytes, tensor.num_bytes - begin)))
            self._read_at(tensor, begin, block)
            self._refuse_not_finite(tensor, np.frombuffer(block, np.uint8))
            yield block

    def _read_at(self, tensor: hf_files.Tensor, begin: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            got = os.preadv(
                self._descriptors[tensor.file], [buffer[done:]], tensor.offset + begin + done
            )
            if not got:
                raise ValueError(f"{self.path / tensor.file} ended while {tensor.name!r} was read")
            done += got

    def _refuse_not_finite(self, tensor: hf_files.Tensor, data: np.ndarray) -> None:
        """Raise ValueError when whole items of a tensor, given as bytes, hold NaN or infinity."""
        bits = _EXPONENTS.get(tensor.dtype)
        if bits is None:
            return
        kind, exponent = bits
        if ((data.view(kind) & exponent) == exponent).any():
            raise ValueError(
                f"{self.path / tensor.file}: the weight {tensor.name!r} holds NaN or infinity, "
                "which no model can use"
            )

    def _fill(
        self,
        tensor: hf_files.Tensor,
        view: tuple[int, ...],
        chunk: Box,
        wants: Sequence[tuple[Box, np.ndarray]],
    ) -> None:
        """Read one chunk, contiguous in the file, and copy it into the arrays that want it."""
        dtype = hf_files.DTYPES[tensor.dtype]
        begin = 0
        for (start, _), size in zip(chunk, view, strict=True):
            begin = begin * size + start
        shared = [(box, out, _overlap(box, chunk)) for box, out in wants]
        shared = [(box, out, common) for box, out, common in shared if common is not None]
        if len(shared) == 1 and shared[0][2] == chunk:
            box, out, common = shared[0]
            target = out[_slices(common, box)]
            if target.flags.c_contiguous:
                self._read_at(tensor, begin * dtype.itemsize, memoryview(_bytes(target)))
                self._refuse_not_finite(tensor, _bytes(target))
                return
        if shared:
            data = np.empty([stop - start for start, stop in chunk], dtype)
            self._read_at(tensor, begin * dtype.itemsize, memoryview(_bytes(data)))
            self._refuse_not_finite(tensor, _bytes(data))
            for box, out, common in shared:
                out[_slices(common, box)] = data[_slices(common, chunk)]


def _bytes(array: np.ndarray) -> np.ndarray:
    """Return the memory of a contiguous array as bytes."""
    return array.reshape(-1).view(np.uint8)


def _overlap(a: Box, b: Box) -> Box | None:
    """Return the overlap of two boxes, None when it is empty."""
    common = tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))
    return None if any(start >= stop for start, stop in common) else common


def _slices(part: Box, whole: Box) -> tuple[slice, ...]:
    """Return the slices of `part` in an array that holds `whole`."""
    return tuple(slice(p[0] - w[0], p[1] - w[0]) for p, w in zip(part, whole, strict=True))


def _chunks(view: tuple[int, ...], item_bytes: int, boxes: Sequence[Box]) -> Iterator[Box]:
    """Cut the region of the boxes into chunks of about 4 MiB, each contiguous in the file."""
    low = [min(box[axis][0] for box in boxes) for axis in range(len(view))]
    high = [max(box[axis][1] for box in boxes) for axis in range(len(view))]
    full = [(0, n) for n in view]
    # The first axis whose slices are small enough to read several at once.
    axis = 0
    while axis + 1 < len(view) and math.prod(view[axis + 1 :]) * item_bytes > _CHUNK_BYTES:
        axis += 1
    step = max(1, _CHUNK_BYTES // max(1, math.prod(view[axis + 1 :]) * item_bytes))
    for outer in np.ndindex(*(high[k] - low[k] for k in range(axis))):
        fixed = [(low[k] + i, low[k] + i + 1) for k, i in enumerate(outer)]
        for start in range(low[axis], high[axis], step):
            yield (*fixed, (start, min(start + step, high[axis])), *full[axis + 1 :])


def open_folder(folder: str | os.PathLike[str], *, check_manifest: bool) -> Reader:
    """Check a checkpoint folder and open it for reading; see `models.hf.files.list_tensors`."""
    path = pathlib.Path(folder)
    return Reader(path, hf_files.list_tensors(path, check_manifest=check_manifest))
