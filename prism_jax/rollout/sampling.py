"""Choose the next token from logits."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Say how responses are drawn.

    Temperature 0 takes the most likely token. `top_k` and `top_p` keep the likeliest tokens only;
    None is off. A response ends with one of `end_token_ids`, or after `max_tokens`.
    """

    temperature: float
    top_k: int | None
    top_p: float | None
    max_tokens: int
    end_token_ids: tuple[int, ...]

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"sampling.temperature must be >= 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"sampling.top_k must be >= 1 or None, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p must be in (0, 1] or None, got {self.top_p}")
        if self.max_tokens < 1:
            raise ValueError(f"sampling.max_tokens must be >= 1, got {self.max_tokens}")


def draw(
    logits: Float[Array, "B V"], keys: Key[Array, "B"], sampling: Sampling
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Return one token a row and its log-probability, float32.

    The log-probability is the one of softmax(logits / temperature) before `top_k` and `top_p`, the
    one that a trainer computes (at temperature 0: of softmax(logits)). Each row draws with its own
    key, so that a response does not depend on the rows beside it. Gumbel-max needs no sort; only
    `top_p` does.
    """
    scaled = logits.astype(jnp.float32)
    if sampling.temperature > 0:
        scaled = scaled / sampling.temperature
        noise = jax.vmap(lambda key: jax.random.gumbel(key, scaled.shape[1:]))(keys)
        tokens = jnp.argmax(_filter(scaled, sampling) + noise, axis=-1)
    else:
        tokens = jnp.argmax(scaled, axis=-1)
    chosen = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), chosen - jax.nn.logsumexp(scaled, axis=-1)


def _filter(scaled: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Put minus infinity where `top_k`, then `top_p`, leaves a token out.

    `top_p` keeps the fewest likeliest tokens whose probabilities reach it.

    Source: transformers generation/logits_process.py TopKLogitsWarper, TopPLogitsWarper.
    """
    if sampling.top_k is not None and sampling.top_k < scaled.shape[-1]:
        least = jax.lax.top_k(scaled, sampling.top_k)[0][:, -1:]
        scaled = jnp.where(scaled < least, -jnp.inf, scaled)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered = -jnp.sort(-scaled, axis=-1)
        probability = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        least = jnp.where(before < sampling.top_p, ordered, jnp.inf).min(-1, keepdims=True)
        scaled = jnp.where(scaled < least, -jnp.inf, scaled)
    return scaled
