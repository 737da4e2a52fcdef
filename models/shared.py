"""Rows in which a prompt stands once for all its responses, laid out anew for attention alone.

    row       P P P Q . a b c d e .      the prompts, then the tokens that follow them
    expanded  P P P a b P P P c Q d e    T places, every sequence with a copy of its prompt

All but attention depends on one token at a time, and a copy of a prompt token has the queries, keys
and values of the others: the result of a prompt's token is read from its first copy, and gradients
of its keys and values are the sums over all copies. Both directions gather, so that nothing is
added in an order that changes from run to run.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.inputs import Leaf, Segments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedPrompts:
    """Where the tokens of a row stand in the expanded row of T places.

    Sizes: `row`, the places of a row, of which the last `followers` are those behind prompts; and
    `copies`, the most copies of a prompt. A place beyond the row, `row` or T, stands for none.
    """

    source: Leaf  # int32[B, T]  the place in the row
    owner: Leaf  # int32[B, T]  the same for first copies and followers, else `row`
    copies: Leaf  # int32[B, row - followers, copies]  the places of each prompt token
    followers: Leaf  # int32[B, followers]  the place of each token behind a prompt
    segments: Segments  # of the expanded row
    # float32[B, row, A]  how many sequences of each kind a place stands for, see `with_kinds`; None
    # where no router counts them
    kind_weights: Leaf = None


def with_kinds(shared: SharedPrompts, kind: Int[Array, "B U"], num_kinds: int) -> SharedPrompts:
    """Count for each place the sequences of each kind whose token it is; `kind` is of each slot."""
    ids = shared.segments.ids
    slots = jnp.clip(ids - 1, 0, kind.shape[1] - 1)
    kinds = jax.nn.one_hot(jnp.take_along_axis(kind, slots, axis=1), num_kinds)
    kinds = jnp.where((ids > 0)[..., None], kinds, 0)  # [B, T, A]
    rows, num_tokens, num_copies = shared.copies.shape

    def take(places: jax.Array) -> jax.Array:
        return jnp.take_along_axis(kinds, places[..., None], axis=1, mode="fill", fill_value=0)

    prompts = take(shared.copies.reshape(rows, -1))
    prompts = prompts.reshape(rows, num_tokens, num_copies, num_kinds).sum(2)
    weights = jnp.concatenate([prompts, take(shared.followers)], axis=1)
    return dataclasses.replace(shared, kind_weights=weights)


def _take(
    x: Float[Array, "B source N H"], places: Int[Array, "B places"]
) -> Float[Array, "B places N H"]:
    return jnp.take_along_axis(x, places[..., None, None], axis=1, mode="fill", fill_value=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def expand(
    x: Float[Array, "B row N H"], shared: SharedPrompts, is_query: bool
) -> Float[Array, "B T N H"]:
    """Return the expanded rows.

    Args:
      is_query: only first copies are read behind attention (`collapse`), so that the others have
        no gradient.
    """
    return _take(x, shared.source)


def _expand_forward(x, shared, is_query):
    return _take(x, shared.source), shared


def _expand_backward(is_query, shared, cotangent):
    copies = shared.copies[..., :1] if is_query else shared.copies
    rows, num_tokens, num_copies = copies.shape
    taken = _take(cotangent, copies.reshape(rows, -1))
    taken = taken.reshape(rows, num_tokens, num_copies, *cotangent.shape[2:])
    prompts = taken.astype(jnp.float32).sum(2).astype(cotangent.dtype)
    return jnp.concatenate([prompts, _take(cotangent, shared.followers)], axis=1), None


expand.defvjp(_expand_forward, _expand_backward)


@jax.custom_vjp
def collapse(x: Float[Array, "B T N H"], shared: SharedPrompts) -> Float[Array, "B row N H"]:
    """Return the rows in which each prompt stands once, read from its first copy."""
    places = jnp.concatenate([shared.copies[..., 0], shared.followers], axis=1)
    return _take(x, places)


def _collapse_forward(x, shared):
    return collapse(x, shared), shared


def _collapse_backward(shared, cotangent):
    return _take(cotangent, shared.owner), None


collapse.defvjp(_collapse_forward, _collapse_backward)
