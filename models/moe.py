"""A sparse mixture of experts: router, experts, and the counts for the load balance."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from models import kinds, layers, sharding
from models.config import TextConfig
from models.inputs import Leaf

Implementation = Literal["dense", "ragged"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterStats:
    """The choices of the router; sums, so that parts of a batch add up. Leading axis L if stacked.

    `by_kind` holds the same for each kind of sequence (see `kinds`), with an axis A before E, of
    the same tokens; None where the kinds are unknown.
    """

    choices: Leaf  # float32[…, E]  how many tokens chose each expert
    probability: Leaf  # float32[…, E]  sum over tokens of the router's probability
    tokens: Leaf  # float32[…]
    by_kind: "RouterStats | None" = None
    router: kinds.Router = dataclasses.field(default="token", metadata={"static": True})


def load_balance(stats: RouterStats) -> Float[Array, ""]:
    """Return E x sum over e of (share of tokens on expert e) x (mean probability of e).

    Its least value is X, the experts per token, reached when all experts are used alike. Layers
    are pooled before the product. Gradients flow through the probabilities alone.

    With router="segment" each kind of sequence is balanced over the experts that it may use, E
    their number, and the kinds are averaged by their tokens: again X at least. Where a kind has
    just X experts, as in the method's 4 with 2 a token, the term is X and has no gradient.

    Source: Switch Transformer (arXiv 2101.03961) eq. 4-6; transformers
    models/qwen3_vl_moe/modeling_qwen3_vl_moe.py load_balancing_loss_func.
    """
    num_experts = stats.choices.shape[-1]
    if stats.router == "segment":
        assert stats.by_kind is not None, "a segment router always counts by kind"
        stats = stats.by_kind
        num_kinds = len(kinds.NAMES)
        choices = stats.choices.reshape(-1, num_kinds, num_experts).sum(0)
        probability = stats.probability.reshape(-1, num_kinds, num_experts).sum(0)
        tokens = stats.tokens.reshape(-1, num_kinds).sum(0)
        used = jnp.maximum(tokens, 1.0)[:, None]
        each = kinds.allowed(num_experts).sum(-1) * ((choices / used) * (probability / used)).sum(
            -1
        )
        return (each * tokens).sum() / jnp.maximum(tokens.sum(), 1.0)
    choices = stats.choices.reshape(-1, num_experts).sum(0)
    probability = stats.probability.reshape(-1, num_experts).sum(0)
    tokens = jnp.maximum(stats.tokens.sum(), 1.0)
    return num_experts * jnp.sum((choices / tokens) * (probability / tokens))


class MoE(nnx.Module):
    """A layer that sends each token to its best experts and mixes their answers.

    `dense` computes every expert on every token, E / X times the needed work but one plain matmul
    that partitions anywhere: right for few experts. `ragged` sorts tokens by expert and computes
    only the chosen ones: right for many.
    """

    def __init__(
        self,
        config: TextConfig,
        *,
        implementation: Implementation,
        rules: sharding.Rules,
        scope: layers.Scope,
    ):
        if implementation not in ("dense", "ragged"):
            raise NotImplementedError(f"MoE implementation {implementation!r} does not exist")
        self.implementation, self.rules = implementation, rules
        self.top = config.moe.num_experts_per_token
        self.choice = config.moe.router
        self.dtype = scope.dtype
        d, e, f = config.hidden_size, config.moe.num_experts, config.moe.intermediate_size
        self.router = layers.Linear(d, e, axes=("embed", "router"), use_bias=False, scope=scope)
        self.gate = scope.normal((e, d, f), ("experts", "embed", "mlp"))
        self.up = scope.normal((e, d, f), ("experts", "embed", "mlp"))
        self.down = scope.normal((e, f, d), ("experts", "mlp", "embed"))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        token_mask: Bool[Array, "B T"],
        kind: Int[Array, "B T"] | None = None,
        kind_weights: Float[Array, "B T A"] | None = None,
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """Return the mixed answers and where the tokens of `token_mask` went.

        Args:
          kind: of the sequence that each token stands in, see `kinds`; a segment router needs it.
          kind_weights: how many sequences of each kind a token counts for, in place of `kind`
            where it stands for several.
        """
        if kind_weights is not None:
            return self._weighted(x, kind_weights)
        probability, weights, chosen = self._route(x, kind)
        one_hot = jax.nn.one_hot(chosen, probability.shape[-1])  # [B, T, X, E]
        seen = token_mask[..., None]
        choices = jax.lax.stop_gradient(jnp.where(seen, one_hot.sum(-2), 0))
        shown = jnp.where(seen, probability, 0)
        by_kind = None
        if kind is not None:
            of_kind = jnp.where(seen, jax.nn.one_hot(kind, len(kinds.NAMES)), 0)  # [B, T, A]
            by_kind = RouterStats(
                choices=jnp.einsum("bta,bte->ae", of_kind, choices),
                probability=jnp.einsum("bta,bte->ae", of_kind, shown),
                tokens=of_kind.sum((0, 1)),
            )
        stats = RouterStats(
            choices=choices.sum((0, 1)),
            probability=shown.sum((0, 1)),
            tokens=token_mask.sum().astype(jnp.float32),
            by_kind=by_kind,
            router=self.choice,
        )
        return self._mix(x, weights, chosen, one_hot), stats

    def _mix(
        self, x: jax.Array, weights: jax.Array, chosen: jax.Array, one_hot: jax.Array
    ) -> Float[Array, "B T D"]:
        if self.implementation == "dense":
            return self._dense(x, jnp.einsum("btxe,btx->bte", one_hot, weights))
        return self._ragged(x, weights, chosen)

    def _weighted(
        self, x: Float[Array, "B T D"], kind_weights: Float[Array, "B T A"]
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """Return the same for tokens that each count for several sequences."""
        if self.choice != "token":
            raise ValueError("a router that goes by kinds cannot share a prompt among them")
        probability, weights, chosen = self._route(x, None)
        one_hot = jax.nn.one_hot(chosen, probability.shape[-1])  # [B, T, X, E]
        choices = jax.lax.stop_gradient(one_hot.sum(-2))
        by_kind = RouterStats(
            choices=jnp.einsum("bta,bte->ae", kind_weights, choices),
            probability=jnp.einsum("bta,bte->ae", kind_weights, probability),
            tokens=kind_weights.sum((0, 1)),
        )
        stats = RouterStats(
            choices=by_kind.choices.sum(0),
            probability=by_kind.probability.sum(0),
            tokens=by_kind.tokens.sum(),
            by_kind=by_kind,
            router=self.choice,
        )
        return self._mix(x, weights, chosen, one_hot), stats

    def decode(
        self, x: Float[Array, "B 1 D"], is_running: Bool[Array, "B"]
    ) -> Float[Array, "B 1 D"]:
        """Return the mixed answers for one token a row; rows that do not run may be anything.

        Few rows choose few experts: only the weights of those that a running row chose are read.
        """
        probability, weights, chosen = self._route(x, None)
        weights = jnp.where(is_running[:, None, None], weights, 0)
        if self.implementation == "dense" and chosen.size > probability.shape[-1]:
            one_hot = jax.nn.one_hot(chosen, probability.shape[-1])
            return self._dense(x, jnp.einsum("btxe,btx->bte", one_hot, weights))
        return self._ragged(x, weights, chosen, is_decoding=True)

    def _route(
        self, x: Float[Array, "B T D"], kind: Int[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T E"], Float[Array, "B T X"], Int[Array, "B T X"]]:
        """Return the probabilities of all experts, and weights and numbers of the chosen ones."""
        logits = self.router(x).astype(jnp.float32)
        if self.choice == "token":
            probability = jax.nn.softmax(logits, axis=-1)
            weights, chosen = jax.lax.top_k(probability, self.top)
        else:
            if kind is None:
                raise ValueError("a segment router must be told the kind of each sequence")
            allowed = jnp.asarray(kinds.allowed(logits.shape[-1]))[kind]
            logits = jnp.where(allowed, logits, -jnp.inf)
            probability = jax.nn.softmax(logits, axis=-1)
            # By logits: a probability that rounds to 0 is still above those not allowed.
            _, chosen = jax.lax.top_k(logits, self.top)
            weights = jnp.take_along_axis(probability, chosen, axis=-1)
        return probability, weights / weights.sum(-1, keepdims=True), chosen

    def _kernels(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        return tuple(p[...].astype(self.dtype) for p in (self.gate, self.up, self.down))

    def _dense(
        self, x: Float[Array, "B T D"], weights: Float[Array, "B T E"]
    ) -> Float[Array, "B T D"]:
        gate, up, down = self._kernels()
        axes = ("batch", "act_length", "act_experts", "act_mlp")
        h = jax.nn.silu(jnp.einsum("btd,edf->btef", x, gate)) * jnp.einsum("btd,edf->btef", x, up)
        h = sharding.constrain(h * weights[..., None].astype(h.dtype), self.rules, *axes)
        return jnp.einsum("btef,efd->btd", h, down)

    def _ragged(
        self,
        x: Float[Array, "B T D"],
        weights: Float[Array, "B T X"],
        chosen: Int[Array, "B T X"],
        *,
        is_decoding: bool = False,
    ) -> Float[Array, "B T D"]:
        """Sort the tokens of each device by expert; each device computes the experts it holds."""
        rules, kernels = self.rules, self._kernels()
        run = _decoding_experts if is_decoding else _sorted_experts
        if jax.sharding.get_abstract_mesh().empty:
            return run(x, weights, chosen, kernels, first_expert=0)
        rows = sharding.spec(rules, "batch", "act_length")
        experts, mlp = rules.mesh_axes("experts"), rules.mesh_axes("mlp")
        into = jax.sharding.PartitionSpec(experts, None, mlp)
        out_of = jax.sharding.PartitionSpec(experts, mlp, None)
        summed = experts + mlp

        def local(x, weights, chosen, kernels):
            first = jax.lax.axis_index(experts) * kernels[0].shape[0] if experts else 0
            y = run(x, weights, chosen, kernels, first_expert=first)
            return jax.lax.psum(y, summed) if summed else y

        return jax.shard_map(
            local,
            in_specs=(rows, rows, rows, (into, into, out_of)),
            out_specs=rows,
            check_vma=False,
        )(x, weights, chosen, kernels)


def _decoding_experts(
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    kernels: tuple[jax.Array, jax.Array, jax.Array],
    *,
    first_expert: jax.Array | int,
) -> jax.Array:
    """Mix as `_sorted_experts` does; of few choices go over the chosen experts, one by one."""
    num_local = kernels[0].shape[0]
    if chosen.size > num_local:
        return _sorted_experts(x, weights, chosen, kernels, first_expert=first_expert)
    tokens = x.reshape(-1, x.shape[-1])
    expert = chosen.reshape(len(tokens), -1) - first_expert
    one_hot = jax.nn.one_hot(expert, num_local)  # [T, X, E], nothing for experts held elsewhere
    weight = jnp.einsum("txe,tx->et", one_hot, weights.reshape(expert.shape))
    is_chosen = (weight > 0).any(-1)
    order = jnp.argsort(~is_chosen, stable=True)

    def add(number: jax.Array, y: jax.Array) -> jax.Array:
        gate, up, down = (
            jax.lax.dynamic_index_in_dim(kernel, order[number], keepdims=False)
            for kernel in kernels
        )
        h = jax.nn.silu(tokens @ gate) * (tokens @ up)
        h = h * weight[order[number]][:, None].astype(h.dtype)
        return y + jnp.dot(h, down, preferred_element_type=jnp.float32)

    empty = jnp.zeros(tokens.shape, jnp.float32)
    y = jax.lax.fori_loop(0, is_chosen.sum(), add, empty)
    return y.astype(x.dtype).reshape(x.shape)


def _sorted_experts(
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    kernels: tuple[jax.Array, jax.Array, jax.Array],
    *,
    first_expert: jax.Array | int,
) -> jax.Array:
    """Mix the answers of experts `first_expert` …, the ones of `kernels`; others count as 0."""
    gate, up, down = kernels
    num_local, top = gate.shape[0], chosen.shape[-1]
    tokens = x.reshape(-1, x.shape[-1])
    expert = chosen.reshape(-1) - first_expert
    is_local = (expert >= 0) & (expert < num_local)
    expert = jnp.where(is_local, expert, num_local)  # the others sort behind all groups
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.bincount(expert, length=num_local + 1)[:num_local].astype(jnp.int32)
    rows = tokens[order // top]
    h = jax.nn.silu(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
    y = jax.lax.ragged_dot(h, down, sizes)
    weight = jnp.where(is_local, weights.reshape(-1), 0)[order]
    y = jnp.where(weight[:, None] > 0, y * weight[:, None].astype(y.dtype), 0)
    return jnp.zeros_like(tokens).at[order // top].add(y).reshape(x.shape)
