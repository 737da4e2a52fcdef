"""Effects of docs/fidelity.md that need a model: positions, head dropout, noise of the experts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import config as config_lib
from models import discriminator, inputs, kinds, positions, presets, sharding, upcycle
from prism_jax import rows as packed_rows
from prism_jax.discriminator import batch as discriminator_batch
from prism_jax.discriminator import loss as discriminator_loss

Json = Any
_NUM_PROMPTS, _NUM_SEGMENTS = 8, 4
_PROMPT_WORDS, _SEGMENT_WORDS = 24, 40
_GRID = (1, 12, 16)  # a picture of 192 x 256 pixels: 48 tokens


def _config() -> config_lib.Qwen3VLConfig:
    """Return a small upcycled model whose weights are large enough for attention to choose."""
    small = dataclasses.replace(
        presets.TINY,
        image_token_id=508,
        video_token_id=509,
        vision_start_token_id=510,
        vision_end_token_id=511,
        initializer_range=64**-0.5,
    )
    return presets.upcycled(small, num_experts=4, num_experts_per_token=2)


def _prompt(config: config_lib.Qwen3VLConfig, rng: np.random.Generator) -> inputs.Example:
    """Return a picture of noise between words."""
    start, end = config.vision_start_token_id, config.vision_end_token_id
    half = _PROMPT_WORDS // 2
    num_tokens = _GRID[1] * _GRID[2] // config.vision.spatial_merge_size**2
    tokens = np.array(
        [
            *rng.integers(1, 500, half),
            *(start, *[config.image_token_id] * num_tokens, end),
            *rng.integers(1, 500, half),
        ],
        np.int32,
    )
    patches = rng.integers(0, 256, (positions.num_patches(_GRID), config.vision.patch_dim))
    return inputs.Example(
        tokens=tokens,
        token_types=np.where(tokens == config.image_token_id, positions.IMAGE, positions.TEXT),
        grids=[_GRID],
        pixels=[patches.astype(np.uint8)],
    )


def _batches(config: config_lib.Qwen3VLConfig) -> dict[str, discriminator_batch.PackedSegments]:
    """Return the same segments with positions of both kinds."""
    rng = np.random.default_rng(0)
    prompts = [_prompt(config, rng) for _ in range(_NUM_PROMPTS)]
    units = [
        [
            packed_rows.Continuation(
                prompt=prompt, tokens=rng.integers(1, 500, _SEGMENT_WORDS).astype(np.int32)
            )
        ]
        for prompt in range(_NUM_PROMPTS)
        for _ in range(_NUM_SEGMENTS)
    ]
    longest = max(len(prompt.tokens) for prompt in prompts) + _SEGMENT_WORDS
    shape = packed_rows.row_shape(
        packed_rows.Largest(
            num_units=len(units),
            unit_sequences=1,
            unit_tokens=longest,
            continued_tokens=_SEGMENT_WORDS,
            prompt_patches=positions.num_patches(_GRID),
            prompt_frames=1,
        ),
        row_tokens=longest * _NUM_SEGMENTS,
        row_sequences=_NUM_SEGMENTS,
        microbatch_rows=_NUM_PROMPTS,
        patch_multiple=1,
        place="rows",
    )
    names = [0] * len(units)
    return {
        kind: discriminator_batch.segment_rows(
            prompts, units, names, (kinds.COT,), shape, config, positions=kind
        )
        for kind in ("mrope", "text_1d")
    }


def scores() -> dict[str, Json]:
    """Items 4 and 9: how far 1-D positions, and dropout of the head, move a random model's scores.

    Distances are in units of the standard deviation of the scores.
    """
    config = _config()
    model = discriminator.Discriminator(
        config,
        moe_implementation="dense",
        rules=sharding.REPLICATED,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs=nnx.Rngs(0),
    )
    graphdef, params = nnx.split(model)
    settings = discriminator_loss.Settings(
        implementation="xla", remat="none", head_dropout=0.1, score_dtype="float32"
    )

    @jax.jit
    def score(params, batch, key):
        merged = nnx.merge(graphdef, params)
        return discriminator_loss.all_scores(merged, batch, settings, key)

    packed = _batches(config)
    scores_by_kind = {
        kind: one.read(score(params, one.batch, None)) for kind, one in packed.items()
    }
    rows = packed["mrope"]
    dropped = np.stack(
        [rows.read(score(params, rows.batch, jax.random.key(number))) for number in range(16)]
    )
    by_prompt = scores_by_kind["mrope"].reshape(_NUM_PROMPTS, _NUM_SEGMENTS)
    moved = (scores_by_kind["text_1d"] - scores_by_kind["mrope"]).reshape(by_prompt.shape)
    spread = float(by_prompt.std())
    return {
        "segments": by_prompt.size,
        "positions_mean_distance": float(np.abs(moved).mean()) / spread,
        # What all segments of a prompt share cancels in the group and in teacher - student.
        "positions_mean_distance_within_prompt": float(
            np.abs(moved - moved.mean(1, keepdims=True)).mean()
        )
        / float((by_prompt - by_prompt.mean(1, keepdims=True)).std()),
        "dropout_standard_deviation": float(dropped.std(0).mean()) / spread,
    }


def upcycle_noise() -> dict[str, Json]:
    """Item 11: the released noise beside weights of the 2B's width and initial deviation 0.02.

    Weights are drawn, not read: those of a trained checkpoint have other deviations.
    """
    hidden, inner, std = 2048, 6144, 0.02
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}
    inputs_of = jax.random.normal(keys[3], (8, hidden))
    dense, noisy = {}, {}
    for key, (name, shape) in zip(keys, shapes.items(), strict=False):
        dense[name] = (std * jax.random.normal(key, shape)).astype(jnp.bfloat16)
        noisy[name] = upcycle.experts(
            dense[name],
            jax.random.fold_in(key, 1),
            num_experts=1,
            noise_std=0.01,
            noise="absolute",
        )[0]

    def norm(x: jax.Array) -> float:
        return float(jnp.linalg.norm(x.astype(jnp.float32)))

    def mlp(weights: dict[str, jax.Array]) -> jax.Array:
        wide = {name: one.astype(jnp.float32) for name, one in weights.items()}
        return (jax.nn.silu(inputs_of @ wide["gate"]) * (inputs_of @ wide["up"])) @ wide["down"]

    difference = noisy["gate"].astype(jnp.float32) - dense["gate"].astype(jnp.float32)
    exact = mlp(dense)
    return {
        "noise_over_weights": norm(difference) / norm(dense["gate"]),
        "change_of_an_experts_output_over_output": norm(mlp(noisy) - exact) / norm(exact),
    }
