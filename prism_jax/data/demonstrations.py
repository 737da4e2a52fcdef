"""Packed batches of demonstrations: the rows of each step, encoded once and collated."""

import concurrent.futures
import dataclasses
import threading
from collections.abc import Callable, Sequence

import numpy as np

from models import inputs
from models.config import Qwen3VLConfig
from prism_jax import errors
from prism_jax.data import collate, encode, packing, processor, records, sources

# Text, images and is_assistant of packed rows: [rows, T], [rows, P, C], bool[rows, T].
Rows = tuple[inputs.TextInput, inputs.VisionInput | None, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """A demonstration as tokens and patches."""

    example: inputs.Example
    is_assistant: np.ndarray  # bool[T]

    def num_bytes(self) -> int:
        """Return the size of the arrays in memory."""
        arrays = (self.example.tokens, self.example.token_types, self.is_assistant)
        return sum(array.nbytes for array in (*arrays, *self.example.pixels))


def counter(
    words: processor.Processor, limits: packing.Limits
) -> Callable[[records.SFTRow], tuple[int, int, int]]:
    """Return a function for `validate.Rules.count_tokens` that also refuses too many patches.

    It returns tokens, patches and images, so that `Demonstrations` need not measure them again.
    """

    def count(row: records.SFTRow) -> tuple[int, int, int]:
        size = encode.measure(
            row.messages, records.get_media(row), words, add_generation_prompt=False
        )
        misfit = limits.misfit(size)
        if misfit is not None:
            raise records.RowError("overlong", misfit)
        return size.tokens, size.patches, size.images

    return count


class Demonstrations:
    """The demonstrations of several sources, numbered consecutively, measured and encoded."""

    def __init__(
        self,
        parts: Sequence[tuple[str, sources.Rows]],
        words: processor.Processor,
        *,
        cache_bytes: int,
        num_threads: int,
        sizes: Sequence[tuple[int, int, int]] | None = None,
    ):
        """Measure all rows, unless `sizes` are given.

        Args:
          parts: names and rows.
          cache_bytes: memory for encoded demonstrations.
          num_threads: rows measured in parallel.
          sizes: the results of `counter` for all rows, in order; None: read and measure the rows.
        """
        if not parts:
            raise errors.InputError("data.train must name at least one source")
        self.names = [name for name, _ in parts]
        self.lengths = [len(rows) for _, rows in parts]
        self._rows = [rows for _, rows in parts]
        self._starts = np.cumsum([0, *self.lengths])
        self._words = words
        self._turns = encode.TurnTokens.of(words.tokenizer)
        self._bytes_left = cache_bytes
        self._cache: dict[int, Encoded] = {}
        self._lock = threading.Lock()
        if sizes is None:
            with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
                sizes = list(pool.map(self._measure, range(sum(self.lengths))))
        if len(sizes) != sum(self.lengths):
            raise ValueError(f"sizes of {len(sizes)} rows were given for {sum(self.lengths)}")
        self.sizes = np.array(sizes, np.int64).reshape(-1, 3)  # tokens, patches, images

    def __getitem__(self, number: int) -> Encoded:
        known = self._cache.get(number)
        if known is not None:
            return known
        row = self._row(number)
        example = encode.example(
            row.messages, records.get_media(row), self._words, add_generation_prompt=False
        )
        encoded = Encoded(
            example=example, is_assistant=self._turns.is_response(example.tokens, row.messages)
        )
        if not encoded.is_assistant.any():
            raise errors.InputError(f"{row.id}: the chat template writes no assistant turn")
        with self._lock:
            if number not in self._cache and encoded.num_bytes() <= self._bytes_left:
                self._cache[number] = encoded
                self._bytes_left -= encoded.num_bytes()
        return encoded

    def _row(self, number: int) -> records.SFTRow:
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._rows[part][number - self._starts[part]]

    def _measure(self, number: int) -> tuple[int, int, int]:
        row = self._row(number)
        size = encode.measure(
            row.messages, records.get_media(row), self._words, add_generation_prompt=False
        )
        return size.tokens, size.patches, size.images


class Packed:
    """The packed rows of any step."""

    def __init__(
        self,
        demonstrations: Demonstrations,
        plan: packing.Plan,
        shapes: collate.Shapes,
        *,
        config: Qwen3VLConfig,
        pixels_dtype: np.dtype,
    ):
        self._demonstrations = demonstrations
        self._plan = plan
        self._shapes = shapes
        self._config = config
        self._pixels_dtype = pixels_dtype

    def rows(self, step: int, positions: Sequence[int]) -> Rows:
        """Return the rows at some positions of a step, as arrays.

        A position beyond the rows of the step is an empty row. The vision rows and the slots for
        segments have the sizes that all rows of the step need, so that processes that make other
        parts of the step use the same sizes.
        """
        rows = self._plan.step(step)
        sizes = [self._demonstrations.sizes[list(row)].sum(0) for row in rows]
        _, patches, images = (int(most) for most in np.max(sizes, axis=0))
        encoded_rows = [
            [self._demonstrations[number] for number in rows[position]]
            if position < len(rows)
            else []
            for position in positions
        ]
        text, vision = collate.collate(
            [[encoded.example for encoded in row] for row in encoded_rows],
            config=self._config,
            shapes=self._shapes,
            row_patches=self._shapes.patches_for(patches),
            segments=self._shapes.segments_for(max(map(len, rows)), images),
            dtype=self._pixels_dtype,
        )
        is_assistant = collate.lay(
            [[encoded.is_assistant for encoded in row] for row in encoded_rows],
            row_tokens=self._shapes.row_tokens,
            dtype=np.dtype(bool),
        )
        return text, vision, is_assistant
