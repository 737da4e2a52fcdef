"""Models of checkpoint folders, loaded and saved, for the tests of conversion."""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import config as config_lib
from models import discriminator, qwen3_vl, sharding
from models.hf import checkpoint as hf_checkpoint


def abstract(
    folder: pathlib.Path, *, with_score: bool = False, text_only: bool = False
) -> nnx.State:
    """Return the abstract parameters of the model that the folder's `config.json` describes."""
    config = config_lib.from_hf(hf_checkpoint.read_config(folder))
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


def load(
    folder: pathlib.Path, *, with_score: bool = False, text_only: bool = False, **options
) -> nnx.State:
    """Load the folder's model as it is stored, on one device unless `options` say more."""
    state = abstract(folder, with_score=with_score, text_only=text_only)
    return hf_checkpoint.load(folder, state, **{"shardings": None, "dtype": None, **options})


def save(target: pathlib.Path, state: nnx.State, source: pathlib.Path, **options) -> None:
    """Write the model in several files, with the config and the small files of its source."""
    given = {"layout": "4.57", "max_shard_bytes": 30_000, "copy_from": source, **options}
    hf_checkpoint.save(target, state, hf_checkpoint.read_config(source), **given)


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Assert that names, types, shapes and bytes are the same."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert found[name].tobytes() == value.tobytes(), name
