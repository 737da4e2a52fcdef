"""Read prompts: packed into rows, each image encoded once, keys and values into the prompt store.

A call reads at most one row of each part. Its shape is the least of a few `levels`: for as many of
the largest prompts as are read at a time, for one, and, on request, for parts of one and for some.
Smaller prompts are packed closer.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import attention, inputs, positions, sharding
from models.config import Qwen3VLConfig
from models.inputs import Example
from prism_jax.rollout import decode
from prism_jax.rollout.memory import round_up

_SPLASH_ROW = 128  # of which splash attention reads multiples, see `models.attention`
_LEVEL_FACTOR = 2  # between the sizes of levels for parts of the largest prompt
_COUNT_FACTOR = 4  # between those for several of the largest prompts
_MOST_PROMPTS = 4  # in a row, for each prompt of the largest size that it has room for


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Spans:
    """Where the prompts of each part stand in its row, and where they are stored."""

    starts: Any  # int32[parts, prompts]
    lengths: Any  # int32[parts, prompts]
    entries: Any  # int32[parts, prompts]  of the part's store; beyond it: no prompt


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """One row a part of packed prompts, and their images."""

    text: inputs.TextInput
    vision: inputs.VisionInput | None
    spans: Spans


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a row."""

    tokens: int
    patches: int
    frames: int
    prompts: int

    def times(self, count: int) -> "Shape":
        """Return the shape of a row for `count` of the largest prompts."""
        return Shape(
            tokens=self.tokens * count,
            patches=self.patches * count,
            frames=self.frames * count,
            prompts=self.prompts * count,
        )


def shape(
    *, tokens: int, patches: int, frames: int, implementation: attention.Implementation
) -> Shape:
    """Return the shape of a row for one prompt of the largest size."""
    multiple = _SPLASH_ROW if implementation == "splash" else 1
    return Shape(
        tokens=round_up(tokens, multiple),
        patches=round_up(patches, multiple),
        frames=frames,
        prompts=_MOST_PROMPTS,
    )


def measure(prompt: Example) -> tuple[int, int, int]:
    """Return a prompt's tokens, patches and frames."""
    patches = sum(positions.num_patches(grid) for grid in prompt.grids)
    return len(prompt.tokens), patches, sum(int(grid[0]) for grid in prompt.grids)


def holds(shape: Shape, prompt: Example) -> bool:
    """Return whether a row has room for a prompt."""
    return bool((_size(prompt) <= _room(shape)).all())


def next_position(prompt: Example, config: Qwen3VLConfig) -> int:
    """Return the M-RoPE position of the first token behind a prompt."""
    merge = config.vision.spatial_merge_size if config.vision else 1
    places = positions.text_positions(prompt.token_types, prompt.grids, spatial_merge_size=merge)
    return int(places.max()) + 1


def levels(
    one: Shape, most: int, *, least_tokens: int | None, implementation: attention.Implementation
) -> list[Shape]:
    """Return the shapes that calls may have, ascending.

    Args:
      one: the shape for one prompt of the largest size; `most` such are read at a time.
      least_tokens: also halves of `one`, halves of those and so on, of at least so many tokens, and
        four of `one`, four times as many and so on; None: neither.
    """
    shapes = [one] if most == 1 else [one, one.times(most)]
    if least_tokens is None:
        return shapes
    count = _COUNT_FACTOR
    while count * 2 < most:
        shapes.insert(-1, one.times(count))
        count *= _COUNT_FACTOR
    factor = _LEVEL_FACTOR
    while one.tokens // factor >= least_tokens:
        tokens, patches = (math.ceil(size / factor) for size in (one.tokens, one.patches))
        smaller = shape(
            tokens=tokens, patches=patches, frames=one.frames, implementation=implementation
        )
        shapes.insert(0, smaller)
        factor *= _LEVEL_FACTOR
    return shapes


# Of each call the shape and each part's prompts, with the entries of the store that they get.
Calls = list[tuple[Shape, list[list[tuple[int, Example]]]]]


def split(
    parts: Sequence[Sequence[tuple[int, Example]]],
    shapes: Sequence[Shape],
    *,
    call_tokens: int,
) -> Calls:
    """Lay each part's prompts into rows, first fit; return the calls.

    Args:
      parts: for each part the prompts and the entries of the store that they get.
      shapes: from `levels`.
      call_tokens: a call takes as long as reading its tokens and this many more; the calls that
        take least in all are returned.
    """
    calls = _lay_out(parts, shapes, shapes[-1])
    if not calls:
        return calls
    largest = np.max([_size(prompt) for part in parts for _, prompt in part], axis=0)
    most = max(sum(len(prompt.tokens) for _, prompt in part) for part in parts)
    least = sum(shape.tokens + call_tokens for shape, _ in calls)
    for row in reversed(shapes[:-1]):
        # No packing is closer than this.
        bound = most + math.ceil(most / row.tokens) * call_tokens
        if bound >= least or (largest > _room(row)).any():
            continue
        candidate = _lay_out(parts, shapes, row)
        cost = sum(shape.tokens + call_tokens for shape, _ in candidate)
        if cost < least:
            calls, least = candidate, cost
    return calls


def _size(prompt: Example) -> np.ndarray:
    return np.array([*measure(prompt), 1])


def _room(shape: Shape) -> np.ndarray:
    return np.array([shape.tokens, shape.patches, shape.frames, shape.prompts])


def _lay_out(
    parts: Sequence[Sequence[tuple[int, Example]]], shapes: Sequence[Shape], row: Shape
) -> Calls:
    """Return calls with rows of at most this shape."""
    limits = _room(row)
    rows: list[list[list[tuple[int, Example]]]] = []
    for prompts in parts:
        mine, used = [], []
        for entry, prompt in sorted(prompts, key=lambda item: -len(item[1].tokens)):
            size = _size(prompt)
            at = next((n for n, u in enumerate(used) if (u + size <= limits).all()), None)
            if at is None:
                mine.append([])
                used.append(np.zeros(4, int))
                at = len(mine) - 1
            mine[at].append((entry, prompt))
            used[at] = used[at] + size
        rows.append(mine)
    calls = []
    for number in range(max((len(mine) for mine in rows), default=0)):
        call = [mine[number] if number < len(mine) else [] for mine in rows]
        sizes = [np.sum([_size(p) for _, p in part], axis=0) for part in call if part]
        least = next(shape for shape in shapes if (np.array(sizes) <= _room(shape)).all())
        calls.append((least, call))
    return calls


def pack_prompts(
    parts: Sequence[Sequence[tuple[int, Example]]],
    shape: Shape,
    *,
    config: Qwen3VLConfig,
    num_entries: int,
) -> Rows:
    """Pack the prompts of a call, one row a part."""
    rows = [[prompt for _, prompt in part] for part in parts]
    spans = np.zeros((3, len(parts), shape.prompts), np.int32)
    spans[2] = num_entries
    for number, part in enumerate(parts):
        lengths = [len(prompt.tokens) for _, prompt in part]
        spans[0, number, : len(part)] = np.cumsum([0, *lengths])[: len(part)]
        spans[1, number, : len(part)] = lengths
        spans[2, number, : len(part)] = [entry for entry, _ in part]
    text = inputs.pack_text(
        rows,
        config=config,
        row_tokens=shape.tokens,
        max_segments=shape.prompts + 1,
        num_vision_rows=len(parts),
    )
    vision = inputs.pack_vision(
        rows,
        config=config,
        row_patches=shape.patches,
        max_segments=shape.frames + 1,
        num_vision_rows=len(parts),
    )
    return Rows(
        text=text,
        vision=vision,
        spans=Spans(starts=spans[0], lengths=spans[1], entries=spans[2]),
    )


@functools.partial(
    jax.jit, static_argnames=("graphdef", "implementation", "rules"), donate_argnames="state"
)
def fill(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    state: decode.State,
    rows: Rows,
    *,
    implementation: attention.Implementation,
    rules: sharding.Rules,
) -> decode.State:
    """Read the prompts of a call and store their keys, values and last hidden states."""
    model = nnx.merge(graphdef, params)
    images = None
    if rows.vision is not None:
        images = model.encode_images(rows.vision, implementation=implementation, remat=False)
    hidden, caches = model.read(rows.text, images, implementation=implementation)

    def store(prompts: tuple, read: tuple, spans: Spans) -> tuple:
        keys, values, last = prompts
        caches, hidden = read
        starts, lengths, entries = spans.starts[0], spans.lengths[0], spans.entries[0]
        num_blocks, block = keys[0].shape[0] // last.shape[0], keys[0].shape[2]
        places = starts[:, None] + jnp.arange(num_blocks * block)
        blocks = entries[:, None] * num_blocks + jnp.arange(num_blocks)

        def stored(prompts: jax.Array, row: jax.Array) -> jax.Array:
            taken = row[0].at[places].get(mode="clip")  # [prompts, places, K, H]
            taken = taken.reshape(*blocks.shape, block, *taken.shape[2:])
            taken = jnp.swapaxes(taken, 2, 3).astype(prompts.dtype)
            return prompts.at[blocks].set(taken, mode="drop")

        ends = jnp.maximum(starts + lengths - 1, 0)
        return (
            [stored(x, row) for x, (row, _) in zip(keys, caches, strict=True)],
            [stored(x, row) for x, (_, row) in zip(values, caches, strict=True)],
            last.at[entries].set(hidden[0, ends].astype(last.dtype), mode="drop"),
        )

    of_state = decode.specs(rules, len(caches))
    prompts = (of_state.prompt_keys, of_state.prompt_values, of_state.prompt_hidden)
    batch = sharding.spec(rules, "batch")
    heads = sharding.spec(rules, "batch", None, "act_kv_heads", None)
    specs = (prompts, ([(heads, heads)] * len(caches), batch), batch)
    keys, values, last = decode.per_part(store, specs, prompts)(
        (state.prompt_keys, state.prompt_values, state.prompt_hidden),
        (caches, hidden),
        rows.spans,
    )
    return dataclasses.replace(state, prompt_keys=keys, prompt_values=values, prompt_hidden=last)
