"""Choose the next token from logits."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """The settings with which responses are drawn.

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode:
    """The work that a batch of rows needs; static, so that other work is not done."""

    has_noise: bool  # some row has a temperature above 0
    top_k: int | None  # at least the largest of all rows, a power of two; None: no row has one
    has_top_p: bool

    @classmethod
    def of(cls, samplings: Sequence[Sampling]) -> "Mode":
        """Return the least work that serves all rows."""
        random_ones = [one for one in samplings if one.temperature > 0]
        top_ks = [one.top_k for one in random_ones if one.top_k is not None]
        return cls(
            has_noise=bool(random_ones),
            top_k=1 << (max(top_ks) - 1).bit_length() if top_ks else None,
            has_top_p=any(one.top_p is not None and one.top_p < 1 for one in random_ones),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of each row, on the device."""

    temperature: Any  # float32[B]
    top_k: Any  # int32[B]  0 is off
    top_p: Any  # float32[B]  1 is off

    @classmethod
    def of(cls, samplings: Sequence[Sampling]) -> "Settings":
        """Return the settings of rows, on the host."""
        return cls(
            temperature=np.array([one.temperature for one in samplings], np.float32),
            top_k=np.array([one.top_k or 0 for one in samplings], np.int32),
            top_p=np.array([one.top_p or 1.0 for one in samplings], np.float32),
        )


def draw(
    logits: Float[Array, "B V"], keys: Key[Array, "B"], settings: Settings, mode: Mode
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Return one token a row and its log-probability, float32.

    The log-probability is the one of softmax(logits / temperature) before `top_k` and `top_p`, the
    one that a trainer computes (at temperature 0: of softmax(logits)). Each row draws with its own
    key, so that a response does not depend on the rows beside it. Gumbel-max needs no sort; only
    `top_p` does.
    """
    scaled = logits.astype(jnp.float32)
    tokens = jnp.argmax(scaled, axis=-1)
    if mode.has_noise:
        is_drawn = settings.temperature[:, None] > 0
        scaled = scaled / jnp.where(is_drawn, settings.temperature[:, None], 1.0)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, scaled.shape[1:]))(keys)
        samples = jnp.argmax(_filter(scaled, settings, mode) + noise, axis=-1)
        tokens = jnp.where(is_drawn[:, 0], samples, tokens)
    likelihoods = jnp.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), likelihoods - jax.nn.logsumexp(scaled, axis=-1)


def _filter(scaled: Float[Array, "B V"], settings: Settings, mode: Mode) -> Float[Array, "B V"]:
    """Put minus infinity where `top_k`, then `top_p`, leaves a token out.

    `top_p` keeps the fewest likeliest tokens whose probabilities reach it.

    Source: transformers generation/logits_process.py TopKLogitsWarper, TopPLogitsWarper.
    """
    if mode.top_k is not None:
        most = min(mode.top_k, scaled.shape[-1])
        ordered = jax.lax.top_k(scaled, most)[0]
        last = jnp.clip(settings.top_k - 1, 0, most - 1)
        least = jnp.take_along_axis(ordered, last[:, None], axis=-1)
        is_out = (settings.top_k[:, None] > 0) & (scaled < least)
        scaled = jnp.where(is_out, -jnp.inf, scaled)
    if mode.has_top_p:
        ordered = -jnp.sort(-scaled, axis=-1)
        probability = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        top_p = settings.top_p[:, None]
        least = jnp.where(before < top_p, ordered, jnp.inf).min(-1, keepdims=True)
        # Rounded sums may reach 1 before the last token.
        scaled = jnp.where((top_p < 1) & (scaled < least), -jnp.inf, scaled)
    return scaled
