"""The hidden states that predict response tokens, of a policy or a teacher on the same rows."""

import jax
import jax.numpy as jnp
from flax import nnx

from models import attention
from models.text import Remat
from prism_jax.policy.batch import PolicyBatch


def at_predictors(
    model: nnx.Module, batch: PolicyBatch, *, implementation: attention.Implementation, remat: Remat
) -> jax.Array:
    """Return the hidden state behind each response token of one microbatch, [B * Z, D]."""
    hidden, _ = model(batch.text, batch.vision, implementation=implementation, remat=remat)
    # Padding reads zeros from beyond the row: a place inside the row would get the gradient of
    # all padding, and a GPU adds to one address one by one.
    hidden = jnp.take_along_axis(
        hidden, batch.predictors[..., None], axis=1, mode="fill", fill_value=0
    )
    return hidden.reshape(-1, hidden.shape[-1])
