"""Decoding with a mixture of experts against what the experts give packed rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import config as config_lib
from models import layers, moe, sharding
from tests.models import cases


def _moe(implementation: str) -> moe.MoE:
    config = config_lib.from_hf(cases.CONFIGS["moe_tied_8_experts"]).text
    scope = layers.Scope(rngs=nnx.Rngs(0), param_dtype=jnp.float32, dtype=jnp.float32, std=0.3)
    return moe.MoE(config, implementation=implementation, rules=sharding.REPLICATED, scope=scope)


# Three rows choose six of eight experts, ten choose more often than there are experts.
@pytest.mark.parametrize("implementation", ["dense", "ragged"])
@pytest.mark.parametrize("rows", [1, 3, 10])
def test_a_token_gets_what_it_gets_in_a_packed_row(implementation, rows):
    built = _moe(implementation)
    x = jax.random.normal(jax.random.key(1), (rows, 1, 48))
    expected, _ = built(x, jnp.ones((rows, 1), bool))
    found = jax.jit(lambda x: built.decode(x, jnp.ones(rows, bool)))(x)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_experts_that_no_running_row_chose_are_not_read():
    built = _moe("dense")
    x = jax.random.normal(jax.random.key(1), (3, 1, 48))
    is_running = jnp.array([True, False, True])
    expected = built.decode(x, is_running)
    chosen = np.asarray(built._route(x, None)[2])[np.asarray(is_running)]
    unread = np.setdiff1d(np.arange(8), chosen)
    assert len(unread) >= 4
    for kernel in (built.gate, built.up, built.down):
        kernel[...] = kernel[...].at[unread].set(jnp.nan)
    found = built.decode(x, is_running)
    running = np.asarray(is_running)
    np.testing.assert_array_equal(found[running], expected[running])
    assert not jnp.isnan(found).any()
