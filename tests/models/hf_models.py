"""Abstract models of checkpoint folders, for the tests of conversion."""

import dataclasses
import pathlib

import jax.numpy as jnp
from flax import nnx

from models import config as config_lib
from models import discriminator, hf, qwen3_vl, sharding


def abstract(
    folder: pathlib.Path, *, with_score: bool = False, text_only: bool = False
) -> nnx.State:
    """Return the abstract parameters of the model that the folder's `config.json` describes."""
    config = config_lib.from_hf(hf.read_config(folder))
    if text_only:
        config = dataclasses.replace(config, vision=None)
    moe = None if config.text.moe is None else "dense"

    def make() -> nnx.Module:
        rules, rngs = sharding.REPLICATED, nnx.Rngs(0)
        if with_score:
            return discriminator.Discriminator(
                config,
                moe_implementation=moe,
                rules=rules,
                dtype=jnp.float32,
                param_dtype=jnp.float32,
                rngs=rngs,
            )
        return qwen3_vl.Qwen3VL(
            config,
            has_head=True,
            moe_implementation=moe,
            rules=rules,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            rngs=rngs,
        )

    return qwen3_vl.abstract(make)[1]
