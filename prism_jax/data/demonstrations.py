"""Packed batches of demonstrations: which rows a step has, encoded once, laid into arrays."""

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
    """Hold a demonstration as tokens and patches."""

    example: inputs.Example
    is_assistant: np.ndarray  # bool[T]

    def num_bytes(self) -> int:
        """Return the memory that it takes, but for a few headers."""
        arrays = (self.example.tokens, self.example.token_types, self.is_assistant)
        return sum(array.nbytes for array in (*arrays, *self.example.pixels))


def counter(
    words: processor.Processor, limits: packing.Limits
) -> Callable[[records.SFTRow], tuple[int, int, int]]:
    """Return the function for `validate.Rules.count_tokens` that also refuses too many patches.

    It returns tokens, patches and images, which `Demonstrations` need not measure again then.
    """

    def count(row: records.SFTRow) -> tuple[int, int, int]:
        size = encode.measure(row.messages, row.images, words, add_generation_prompt=False)
        misfit = limits.misfit(size)
        if misfit is not None:
            raise records.RowError("overlong", misfit)
        return size.tokens, size.patches, size.images

    return count


class Demonstrations:
    """Demonstrations of several sources, counted on from each other, measured and encoded."""

    def __init__(
        self,
        parts: Sequence[tuple[str, sources.Rows]],
        words: processor.Processor,
        *,
        cache_bytes: int,
        num_threads: int,
        sizes: Sequence[tuple[int, int, int]] | None = None,
    ):
        """Measure every row, unless that was done.

        Args:
          parts: names and rows.
          cache_bytes: encoded demonstrations are kept until they take so much memory.
          num_threads: rows measured at a time.
          sizes: what `counter` told of every row, in order; None: rows are read and measured.
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
        example = encode.example(row.messages, row.images, self._words, add_generation_prompt=False)
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
        size = encode.measure(row.messages, row.images, self._words, add_generation_prompt=False)
        return size.tokens, size.patches, size.images


class Packed:
    """Make the packed rows of any step."""

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

    def rows(self, step: int, chosen: Sequence[int]) -> Rows:
        """Return some of the rows of a step, by their place in it, as arrays.

        A place behind the rows of the step is an empty row.

        The vision rows have the size that all rows of the step need, so that it is the same for
        whoever makes another part of the step.
        """
        rows = self._plan.step(step)
        needed = max(int(self._demonstrations.sizes[list(row), 1].sum()) for row in rows)
        own = [
            [self._demonstrations[number] for number in (rows[place] if place < len(rows) else ())]
            for place in chosen
        ]
        text, vision = collate.collate(
            [[encoded.example for encoded in row] for row in own],
            config=self._config,
            shapes=self._shapes,
            row_patches=self._shapes.patches_for(needed),
            dtype=self._pixels_dtype,
        )
        is_assistant = collate.lay(
            [[encoded.is_assistant for encoded in row] for row in own],
            row_tokens=self._shapes.row_tokens,
            dtype=np.dtype(bool),
        )
        return text, vision, is_assistant
