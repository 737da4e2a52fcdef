"""The inputs of the benchmark of the SFT update: sizes, packed rows, and their operations."""

import dataclasses

import jax
import numpy as np

from benchmarks import sizes
from models import inputs, presets
from models.config import Qwen3VLConfig, TextConfig
from models.text import Remat
from prism_jax import batches

FULL = 0.98  # of a row's tokens, as `packing` fills them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """The sizes of a model and its rows."""

    config: Qwen3VLConfig
    rows: int
    row_tokens: int
    row_patches: int
    row_examples: int  # and images: static segments of a row
    picture: tuple[int, int]  # patches down and across
    chunk_tokens: int  # through the head at a time
    remat: Remat
    frozen: tuple[str, ...]
    filled: float = 0.9  # of a row's tokens


# configs/sft.py:small,new with a vocabulary of 512.
_SMALL = Qwen3VLConfig(
    text=TextConfig(
        vocab_size=512,
        hidden_size=640,
        intermediate_size=2048,
        num_layers=12,
        num_heads=10,
        num_kv_heads=5,
        head_dim=64,
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
        mrope_section=(12, 10, 10),
        tie_word_embeddings=True,
        moe=None,
    ),
    vision=dataclasses.replace(
        presets.QWEN3_VL_2B.vision,
        hidden_size=512,
        intermediate_size=2048,
        num_layers=8,
        num_heads=8,
        out_hidden_size=640,
        num_position_embeddings=576,
        deepstack_layers=(2, 5),
    ),
    image_token_id=508,
    video_token_id=509,
    vision_start_token_id=510,
    vision_end_token_id=511,
    initializer_range=0.02,
    score_heads=1,
)


def _large(config: Qwen3VLConfig) -> Size:
    """Return rows as configs/sft.py gives one device of eight, the tower frozen as there."""
    return Size(
        config=config,
        rows=1,
        row_tokens=8192,
        row_patches=8192,
        row_examples=8,
        picture=(32, 32),
        chunk_tokens=1024,
        remat="save_attention",
        frozen=("vision/.*",),
    )


SIZES = {
    "tiny": Size(
        config=dataclasses.replace(
            presets.TINY,
            image_token_id=508,
            video_token_id=509,
            vision_start_token_id=510,
            vision_end_token_id=511,
        ),
        rows=2,
        row_tokens=64,
        row_patches=32,
        row_examples=4,
        picture=(4, 4),
        chunk_tokens=32,
        remat="none",
        frozen=(),
    ),
    "small": Size(
        config=_SMALL,
        rows=16,
        row_tokens=2048,
        row_patches=1024,
        row_examples=16,
        picture=(16, 16),
        chunk_tokens=2048,
        remat="none",
        frozen=(),
    ),
    "2b": _large(sizes.SIZES["2b"]),
    "4b": _large(sizes.SIZES["4b"]),
    "8b": _large(presets.QWEN3_VL_8B),
}


def with_layers(size: Size, num_layers: int | None) -> Size:
    """Return a size with fewer layers of text; None leaves it."""
    if num_layers is None:
        return size
    text = dataclasses.replace(size.config.text, num_layers=num_layers)
    return dataclasses.replace(size, config=dataclasses.replace(size.config, text=text))


def _examples(size: Size, rng: np.random.Generator) -> list[inputs.Example]:
    """Return a row's examples: a picture and words, of pictures as many as have place."""
    config, (down, across) = size.config, size.picture
    num = size.row_patches // (down * across)
    shown = down * across // config.vision.spatial_merge_size**2
    # Lengths differ, and sum up to the filled part of the row.
    edges = np.linspace(0.5, 1.5, num)
    lengths = (edges / edges.sum() * size.filled * size.row_tokens).astype(int)
    examples = []
    for length in lengths:
        words = rng.integers(1, config.text.vocab_size - 10, max(length - shown, 4))
        tokens = np.concatenate([np.full(shown, config.image_token_id), words])
        examples.append(
            inputs.Example(
                tokens=tokens,
                token_types=(tokens == config.image_token_id).astype(np.int32),
                grids=[(1, down, across)],
                pixels=[
                    rng.integers(0, 256, (down * across, config.vision.patch_dim), np.uint8),
                ],
            )
        )
    return examples


def make_batch(size: Size) -> batches.SFTBatch:
    """Return one microbatch of packed rows on the host; the words are learned, not the pictures."""
    rng = np.random.default_rng(0)
    rows = [_examples(size, rng) for _ in range(size.rows)]
    shared = {
        "config": size.config,
        "max_segments": size.row_examples,
        "num_vision_rows": size.rows,
    }
    text = inputs.pack_text(rows, row_tokens=size.row_tokens, **shared)
    vision = inputs.pack_vision(rows, row_patches=size.row_patches, **shared)
    is_assistant = (text.segments.ids > 0) & (text.image_slots < 0)
    return batches.split(batches.SFTBatch(text=text, vision=vision, is_assistant=is_assistant), 1)


def _squares(segments: inputs.Segments) -> float:
    return float((np.maximum(segments.lengths, 0).astype(np.float64) ** 2).sum())


def forward_flops(size: Size, batch: batches.SFTBatch) -> dict[str, float]:
    """Return the operations of a forward pass by part: of matmuls, two for each product.

    All places of the rows count, padding too, as they are computed. Attention counts the pairs
    inside segments alone, of text the half that is not masked.
    """
    text, vision = size.config.text, size.config.vision
    tokens = float(batch.text.tokens.size)
    d, h = text.hidden_size, text.head_dim
    maps = d * h * (2 * text.num_heads + 2 * text.num_kv_heads) + 3 * d * text.intermediate_size
    pairs = _squares(batch.text.segments) / 2
    flops_by_part = {
        "text": 2 * tokens * text.num_layers * maps,
        "text attention": 4 * pairs * text.num_layers * text.num_heads * h,
        "head": 2 * tokens * d * text.vocab_size,
    }
    if batch.vision is None:
        return flops_by_part
    patches, width = float(batch.vision.coords.size / 2), vision.hidden_size
    area = vision.spatial_merge_size**2
    block = 4 * width**2 + 2 * width * vision.intermediate_size
    merger = (width * area) ** 2 + width * area * vision.out_hidden_size
    num_mergers = 1 + len(vision.deepstack_layers)
    flops_by_part["vision"] = (
        2
        * patches
        * (vision.num_layers * block + vision.patch_dim * width + num_mergers * merger / area)
    )
    pairs = _squares(batch.vision.segments)
    flops_by_part["vision attention"] = 4 * pairs * vision.num_layers * width
    return flops_by_part


def flops(size: Size, batch: batches.SFTBatch, *, has_backward: bool) -> dict[str, float]:
    """Return the operations by part; backward is twice forward, nothing for a frozen tower.

    What is computed again in the backward pass does not count.
    """
    times = 3.0 if has_backward else 1.0
    is_frozen = "vision/.*" in size.frozen
    flops_by_part = {
        part: count * (1.0 if is_frozen and part.startswith("vision") else times)
        for part, count in forward_flops(size, batch).items()
    }
    return flops_by_part | {"all": sum(flops_by_part.values())}


def matmul_parameters(size: Size) -> int:
    """Return the parameters that each token is multiplied with: the decoder's and the head's."""
    text = size.config.text
    d, h = text.hidden_size, text.head_dim
    maps = d * h * (2 * text.num_heads + 2 * text.num_kv_heads) + 3 * d * text.intermediate_size
    return text.num_layers * maps + text.vocab_size * d


def num_tokens(batch: batches.SFTBatch) -> int:
    """Return how many places of the rows are tokens, not padding."""
    return int(np.sum(jax.device_get(batch.text.segments.ids) > 0))
