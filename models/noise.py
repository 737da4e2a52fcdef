"""Noise on embedded tokens, for a penalty on how fast a score changes with its input."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.inputs import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingNoise:
    """Gaussian noise on some tokens, relative to the size of each token's embedding."""

    scale: float = dataclasses.field(metadata={"static": True})
    key: Leaf
    mask: Leaf  # bool[B, T]  the tokens that get noise

    def add(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return x + scale · rms(x) · n on the masked tokens, the others as they are."""
        size = jnp.sqrt(jnp.square(x.astype(jnp.float32)).mean(-1, keepdims=True))
        noise = self.scale * size * jax.random.normal(self.key, x.shape, jnp.float32)
        return jnp.where(self.mask[..., None], x + noise.astype(x.dtype), x)
