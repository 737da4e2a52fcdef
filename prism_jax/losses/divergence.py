"""Divergences of a policy from a teacher over the whole vocabulary, without any [T, V] array.

With p of the policy, q of the teacher, and m = β q + (1 − β) p for each token:

         value Σ_v                                          gradient by the policy's logits, × T
forward  q (log q − log p)              KL(teacher ‖ policy)   p − q
reverse  p (log p − log q)              KL(policy ‖ teacher)   p (log p − log q − value)
jsd      β q log(q / m) + (1 − β) p log(p / m)                 (1 − β) p (log(p / m) − KL(p ‖ m))

These are the divergences of the distributions themselves, where `losses.kl` estimates one from a
single token. Tokens go through both heads in chunks, as in `losses.logprob`; only one chunk has
logits at a time. Gradients are made on the way, so a chunk's logits are computed once a model.
Source: arXiv 2306.13649 (GKD) for the three; 2306.08543 for the reverse.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from prism_jax.losses import logprob

Divergence = Literal["forward", "reverse", "jsd"]


def weighted_divergences(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    teacher_hidden: Float[Array, "T F"],
    teacher_head: Float[Array, "V F"],
    weights: Float32[Array, "T"],
    *,
    divergence: Divergence,
    teacher_share: float | None,
    temperature: float,
    chunk_tokens: int,
) -> tuple[Float32[Array, ""], Float32[Array, "T"]]:
    """Return Σ_t weights[t] · divergence[t], and the divergence of each token in nats.

    The sum alone is differentiable, in `hidden` and `head`; the teacher is a constant, and the
    divergences are for metrics. Two products with the heads make the logits, two the gradients.

    Args:
      teacher_share: β of "jsd", in (0, 1); None for the others.
      temperature: divides the logits of both models.
      chunk_tokens: tokens whose logits exist at a time, float32 of both models.
    """
    logprob.check(temperature, chunk_tokens)
    if divergence not in Divergence.__args__:
        raise ValueError(f"divergence must be one of {Divergence.__args__}, got {divergence!r}")
    if (teacher_share is None) == (divergence == "jsd"):
        raise ValueError(
            f"teacher_share must be given for jsd alone, got {teacher_share} for {divergence}"
        )
    teacher = jax.lax.stop_gradient((teacher_hidden, teacher_head))
    kind = (divergence, teacher_share)
    total, values = _weighted(hidden, head, teacher, weights, kind, temperature, chunk_tokens)
    return total, jax.lax.stop_gradient(values)


def _of_chunk(log_p: Array, log_q: Array, kind: tuple[str, float | None]) -> tuple[Array, Array]:
    """Return float32[chunk] divergences and their gradients by the policy's logits [chunk, V]."""
    divergence, share = kind
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if divergence == "forward":
        return (q * (log_q - log_p)).sum(-1), p - q
    if divergence == "reverse":
        ratio = log_p - log_q
        values = (p * ratio).sum(-1)
        return values, p * (ratio - values[:, None])
    log_m = jnp.logaddexp(jnp.log(share) + log_q, jnp.log1p(-share) + log_p)
    from_policy = (p * (log_p - log_m)).sum(-1)
    values = share * (q * (log_q - log_m)).sum(-1) + (1 - share) * from_policy
    return values, (1 - share) * p * (log_p - log_m - from_policy[:, None])


def _log_probs(hidden: Array, head: Array, temperature: float) -> Array:
    return jax.nn.log_softmax(logprob.logits_of(hidden, head, temperature), axis=-1)


def _scan(hidden, head, teacher, weights, kind, temperature, chunk_tokens, *, has_gradient):
    """Return the divergences, and with `has_gradient` those of the weighted sum."""
    teacher_hidden, teacher_head = teacher
    operand = head.astype(hidden.dtype)
    teacher_operand = teacher_head.astype(teacher_hidden.dtype)

    def chunk(d_head, xs):
        hidden, teacher_hidden, weights = xs
        log_p = _log_probs(hidden, operand, temperature)
        log_q = _log_probs(teacher_hidden, teacher_operand, temperature)
        values, d_logits = _of_chunk(log_p, log_q, kind)
        if not has_gradient:
            return None, (values, None)
        # Padding has weights of 0, so its tokens add nothing.
        d_logits *= (weights / temperature)[:, None]
        d_hidden, d_head_chunk = logprob.head_products(d_logits, hidden, operand)
        return d_head + d_head_chunk, (values, d_hidden)

    xs = jax.tree.map(lambda x: logprob.split(x, chunk_tokens), (hidden, teacher_hidden, weights))
    zeros = jnp.zeros(head.shape, jnp.float32) if has_gradient else None
    d_head, chunks = jax.lax.scan(chunk, zeros, xs)
    values, d_hidden = jax.tree.map(lambda x: logprob.join(x, hidden.shape[0]), chunks)
    return values, d_hidden, d_head


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _weighted(hidden, head, teacher, weights, kind, temperature, chunk_tokens):
    values, _, _ = _scan(
        hidden, head, teacher, weights, kind, temperature, chunk_tokens, has_gradient=False
    )
    return (weights * values).sum(), values


def _weighted_forward(hidden, head, teacher, weights, kind, temperature, chunk_tokens):
    values, d_hidden, d_head = _scan(
        hidden, head, teacher, weights, kind, temperature, chunk_tokens, has_gradient=True
    )
    return ((weights * values).sum(), values), (d_hidden, d_head.astype(head.dtype))


def _weighted_backward(kind, temperature, chunk_tokens, saved, cotangents):
    d_total, _ = cotangents
    d_hidden, d_head = ((d_total * d).astype(d.dtype) for d in saved)
    return d_hidden, d_head, None, None


_weighted.defvjp(_weighted_forward, _weighted_backward)
