"""The router's choices by kind of segment: a segment's own tokens, or all where kinds are apart."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import config as config_lib
from models import discriminator, kinds, qwen3_vl, sharding
from prism_jax import rows as packed_rows
from prism_jax.discriminator import batch as discriminator_batch
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.honesty import router as honesty_router
from prism_jax.rows import Continuation
from tests.models import cases

_PROMPTS = [*cases.ROWS["rows_of_different_length"][:2], *cases.ROWS["one_image"]]
_SETTINGS = discriminator_loss.Settings(
    implementation="xla", remat="none", head_dropout=0.0, score_dtype="float32"
)
_KINDS = (kinds.CAPTION, kinds.COT)


def _model(router: str):
    values = cases.CONFIGS["moe_untied"] | {kinds.KEY: {"router": router, "heads": 1}}
    config = config_lib.from_hf(values)
    graphdef, params = qwen3_vl.abstract(
        lambda: discriminator.Discriminator(
            config,
            moe_implementation="dense",
            rules=sharding.REPLICATED,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            rngs=nnx.Rngs(0),
        )
    )
    filled = [
        (path, leaf.replace(jnp.asarray(cases.weight(".".join(map(str, path)), leaf.shape))))
        for path, leaf in nnx.to_flat_state(params)
    ]
    return config, graphdef, nnx.from_flat_state(filled)


def _packed(config, sizes: dict[tuple[int, int], int], shared_units=None):
    """Pack segments of these sizes by (prompt, name); some microbatches stay empty."""
    rng = np.random.default_rng(0)
    units = [
        [Continuation(prompt=prompt, tokens=rng.integers(1, 180, size).astype(np.int32))]
        for (prompt, _), size in sizes.items()
    ]
    shape = packed_rows.row_shape(
        packed_rows.Largest(
            num_units=2 * len(units),
            unit_sequences=1,
            unit_tokens=40,
            continued_tokens=20,
            prompt_patches=24,
            prompt_frames=1,
        ),
        row_tokens=96,
        row_sequences=4,
        microbatch_rows=1,
        patch_multiple=1,
        shared_units=shared_units,
        place="rows",
    )
    names = [name for _, name in sizes]
    return discriminator_batch.segment_rows(
        _PROMPTS, units, names, _KINDS, shape, config, positions="mrope"
    ).batch


@pytest.mark.parametrize("router", kinds.ROUTERS)
def test_a_token_router_is_counted_on_the_segments_own_tokens_a_segment_router_on_all(router):
    sizes = {(0, 0): 9, (1, 0): 4, (1, 1): 7, (2, 1): 6}
    config, graphdef, params = _model(router)
    choices = np.asarray(
        honesty_router.make_counter(graphdef, _SETTINGS)(params, _packed(config, sizes))
    )
    assert choices.shape == (3, len(kinds.NAMES), 4)
    for name, kind in enumerate(_KINDS):
        tokens = sum(size for (_, n), size in sizes.items() if n == name)
        if router == "segment":
            tokens += sum(len(_PROMPTS[p].tokens) for p, n in sizes if n == name)
        # Two experts a token.
        np.testing.assert_array_equal(choices[:, kind].sum(-1), 2 * tokens)
    assert not choices[:, kinds.WHOLE].any()
    if router == "token":
        shared = _packed(config, sizes, shared_units=2)
        again = honesty_router.make_counter(graphdef, _SETTINGS)(params, shared)
        np.testing.assert_allclose(again, choices)
    if router == "segment":
        assert not choices[:, kinds.CAPTION, 2:].any() and not choices[:, kinds.COT, :2].any()
