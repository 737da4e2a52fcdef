"""Log-probabilities and entropies over a large vocabulary without the [T, V] logits.

Tokens go through the head in chunks, each with the full vocabulary: logits, log-sum-exp and the
weight gradient are float32, matmul operands keep the dtype of `hidden`. The backward pass computes
each chunk's logits again from the saved log-sum-exp, so that no [T, V] array exists at any time.

Chunk i of n holds the tokens i, i + n, i + 2n, ...: a token axis that is sharded over data axes
stays sharded inside every chunk when the number of shards divides `chunk_tokens`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int


def token_logprobs(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "T"],
    *,
    temperature: float,
    chunk_tokens: int,
    with_entropy: bool,
) -> tuple[Float32[Array, "T"], Float32[Array, "T"] | None]:
    """Return log p(targets[t] | hidden[t]) and, on request, the entropy of p(· | hidden[t]).

    p = softmax(hidden · headᵀ / temperature); a policy that samples at a temperature has the
    log-probs of that same temperature. Index t predicts targets[t]: the caller has shifted them.
    Both outputs are in nats and differentiable in `hidden` and `head`; the gradient of `head` is
    accumulated in float32 and given in the dtype of `head`. The entropy is None unless requested.
    """
    check(temperature, chunk_tokens)
    return _logprobs(hidden, head, targets, temperature, chunk_tokens, with_entropy)


def weighted_logprobs(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "T"],
    weights: Float32[Array, "T"],
    *,
    temperature: float,
    chunk_tokens: int,
) -> tuple[Float32[Array, ""], Float32[Array, "T"]]:
    """Return Σ_t weights[t] · log p(targets[t]) and the log-probs, gradients made on the way.

    Equal to `token_logprobs` followed by the weighted sum, with three head matmuls instead of
    four, because the cotangent of each log-prob is known but for one scalar. The sum alone is
    differentiable, in `hidden` and `head`; the log-probs are constants for metrics.
    """
    check(temperature, chunk_tokens)
    total, logprobs = _weighted(hidden, head, targets, weights, temperature, chunk_tokens)
    return total, jax.lax.stop_gradient(logprobs)


def check(temperature: float, chunk_tokens: int) -> None:
    """Raise ValueError for a temperature or a chunk that means nothing."""
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be >= 1, got {chunk_tokens}")


def split(x: Array, chunk_tokens: int) -> Array:
    """Pad the token axis with zeros and return [chunks, chunk, ...]."""
    num_tokens = x.shape[0]
    chunk_tokens = min(chunk_tokens, num_tokens)
    num_chunks = -(-num_tokens // chunk_tokens)
    padding = num_chunks * chunk_tokens - num_tokens
    x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(chunk_tokens, num_chunks, *x.shape[1:]).swapaxes(0, 1)


def join(chunks: Array, num_tokens: int) -> Array:
    """Undo `split`."""
    return chunks.swapaxes(0, 1).reshape(-1, *chunks.shape[2:])[:num_tokens]


def logits_of(hidden: Array, head: Array, temperature: float) -> Array:
    """Return hidden · headᵀ / temperature of one chunk, float32[chunk, V]."""
    logits = jnp.einsum("td,vd->tv", hidden, head, preferred_element_type=jnp.float32)
    return logits / temperature


def _is_target(logits: Array, targets: Array) -> Array:
    # A comparison instead of a gather: it fuses into the reductions and partitions over V.
    return jax.lax.broadcasted_iota(targets.dtype, logits.shape, 1) == targets[:, None]


def _logits_gradient(
    logits: Array, targets: Array, lse: Array, d_logprob: Array, temperature: float
) -> Array:
    """Return d_logprob · (1[v = target] − p_v) / temperature, float32[chunk, V]."""
    pulled = -jnp.exp(logits - lse[:, None]) * d_logprob[:, None]
    pushed = jnp.where(_is_target(logits, targets), d_logprob[:, None], 0.0)
    return (pulled + pushed) / temperature


def _entropy_gradient(
    logits: Array, lse: Array, entropy: Array, d_entropy: Array, temperature: float
) -> Array:
    """Return −d_entropy · p_v · (log p_v + H) / temperature, float32[chunk, V]."""
    log_p = logits - lse[:, None]
    return -jnp.exp(log_p) * (log_p + entropy[:, None]) * d_entropy[:, None] / temperature


def head_products(d_logits: Array, hidden: Array, head: Array) -> tuple[Array, Array]:
    """Return the gradients of hidden (its dtype) and head (float32) for one chunk."""
    d_logits = d_logits.astype(hidden.dtype)
    d_hidden = jnp.einsum("tv,vd->td", d_logits, head, preferred_element_type=jnp.float32)
    d_head = jnp.einsum("tv,td->vd", d_logits, hidden, preferred_element_type=jnp.float32)
    return d_hidden.astype(hidden.dtype), d_head


def _forward(hidden, head, targets, temperature, chunk_tokens, with_entropy):
    """Return log-probs, log-sum-exps and entropies (or None), float32[T]."""
    head = head.astype(hidden.dtype)

    def chunk(_, xs):
        hidden, targets = xs
        logits = logits_of(hidden, head, temperature)
        lse = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.where(_is_target(logits, targets), logits, 0.0).sum(-1)
        entropy = None
        if with_entropy:
            log_p = logits - lse[:, None]
            entropy = -(jnp.exp(log_p) * log_p).sum(-1)
        return None, (picked - lse, lse, entropy)

    xs = (split(hidden, chunk_tokens), split(targets, chunk_tokens))
    _, chunks = jax.lax.scan(chunk, None, xs)
    return jax.tree.map(lambda x: join(x, hidden.shape[0]), chunks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _logprobs(hidden, head, targets, temperature, chunk_tokens, with_entropy):
    logprobs, _, entropy = _forward(hidden, head, targets, temperature, chunk_tokens, with_entropy)
    return logprobs, entropy


def _logprobs_forward(hidden, head, targets, temperature, chunk_tokens, with_entropy):
    logprobs, lse, entropy = _forward(
        hidden, head, targets, temperature, chunk_tokens, with_entropy
    )
    return (logprobs, entropy), (hidden, head, targets, lse, entropy)


def _logprobs_backward(temperature, chunk_tokens, with_entropy, saved, cotangents):
    hidden, head, targets, lse, entropy = saved
    d_logprobs, d_entropy = cotangents
    operand = head.astype(hidden.dtype)

    def chunk(d_head, xs):
        hidden, targets, lse, entropy, d_logprobs, d_entropy = xs
        logits = logits_of(hidden, operand, temperature)
        d_logits = _logits_gradient(logits, targets, lse, d_logprobs, temperature)
        if with_entropy:
            d_logits += _entropy_gradient(logits, lse, entropy, d_entropy, temperature)
        d_hidden, d_head_chunk = head_products(d_logits, hidden, operand)
        return d_head + d_head_chunk, d_hidden

    # Padding has cotangents of 0, so its tokens add nothing.
    xs = (hidden, targets, lse, entropy, d_logprobs, d_entropy)
    xs = jax.tree.map(lambda x: split(x, chunk_tokens), xs)
    d_head, d_hidden = jax.lax.scan(chunk, jnp.zeros(head.shape, jnp.float32), xs)
    return join(d_hidden, hidden.shape[0]), d_head.astype(head.dtype), None


_logprobs.defvjp(_logprobs_forward, _logprobs_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _weighted(hidden, head, targets, weights, temperature, chunk_tokens):
    logprobs, _, _ = _forward(hidden, head, targets, temperature, chunk_tokens, False)
    return (weights * logprobs).sum(), logprobs


def _weighted_forward(hidden, head, targets, weights, temperature, chunk_tokens):
    operand = head.astype(hidden.dtype)

    def chunk(d_head, xs):
        hidden, targets, weights = xs
        logits = logits_of(hidden, operand, temperature)
        lse = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.where(_is_target(logits, targets), logits, 0.0).sum(-1)
        d_logits = _logits_gradient(logits, targets, lse, weights, temperature)
        d_hidden, d_head_chunk = head_products(d_logits, hidden, operand)
        return d_head + d_head_chunk, (picked - lse, d_hidden)

    xs = jax.tree.map(lambda x: split(x, chunk_tokens), (hidden, targets, weights))
    d_head, chunks = jax.lax.scan(chunk, jnp.zeros(head.shape, jnp.float32), xs)
    logprobs, d_hidden = (join(x, hidden.shape[0]) for x in chunks)
    total = (weights * logprobs).sum()
    return (total, logprobs), (d_hidden, d_head.astype(head.dtype))


def _weighted_backward(temperature, chunk_tokens, saved, cotangents):
    d_total, _ = cotangents
    d_hidden, d_head = ((d_total * d).astype(d.dtype) for d in saved)
    return d_hidden, d_head, None, None


_weighted.defvjp(_weighted_forward, _weighted_backward)
