"""One layer of the text decoder: grouped-query attention, then an MLP or a mixture of experts."""

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models import attention, layers, moe, rope, sharding
from models.config import TextConfig
from models.inputs import Segments


class Attention(nnx.Module):
    """Attend with grouped queries, normalised heads and interleaved M-RoPE."""

    def __init__(self, config: TextConfig, *, rules: sharding.Rules, scope: layers.Scope):
        self.rules = rules
        self.head_dim = config.head_dim
        d, n, k = config.hidden_size, config.num_heads, config.num_kv_heads

        def linear(size_in: int, size_out: int, axes: tuple[str, str]) -> layers.Linear:
            return layers.Linear(size_in, size_out, axes=axes, use_bias=False, scope=scope)

        self.q = linear(d, n * self.head_dim, ("embed", "heads"))
        self.k = linear(d, k * self.head_dim, ("embed", "kv_heads"))
        self.v = linear(d, k * self.head_dim, ("embed", "kv_heads"))
        self.o = linear(n * self.head_dim, d, ("heads", "embed"))
        self.q_norm = layers.RMSNorm(self.head_dim, eps=config.rms_norm_eps, scope=scope)
        self.k_norm = layers.RMSNorm(self.head_dim, eps=config.rms_norm_eps, scope=scope)

    def project(
        self, x: Float[Array, "B T D"], angles: tuple[jax.Array, jax.Array]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Return rotated queries and keys, and values."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = rope.apply(self.q_norm(self.q(x).reshape(heads)), *angles)  # [B, T, N, H]
        k = rope.apply(self.k_norm(self.k(x).reshape(heads)), *angles)  # [B, T, K, H]
        return q, k, self.v(x).reshape(heads)  # [B, T, K, H]

    def mix(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        segments: Segments,
        implementation: attention.Implementation,
    ) -> Float[Array, "B T D"]:
        """Attend inside each segment, causally, and project back."""
        mixed = attention.attend(
            q,
            k,
            v,
            segments,
            causal=True,
            implementation=implementation,
            rules=self.rules,
            row_axis="batch",
        )
        mixed = jax.ad_checkpoint.checkpoint_name(mixed, "attention")
        return self.o(mixed.reshape(*q.shape[:2], -1))


class MLP(nnx.Module):
    """Apply the gated MLP: down(silu(gate x) * up x)."""

    def __init__(self, config: TextConfig, *, rules: sharding.Rules, scope: layers.Scope):
        self.rules = rules
        d, f = config.hidden_size, config.intermediate_size
        self.gate = layers.Linear(d, f, axes=("embed", "mlp"), use_bias=False, scope=scope)
        self.up = layers.Linear(d, f, axes=("embed", "mlp"), use_bias=False, scope=scope)
        self.down = layers.Linear(f, d, axes=("mlp", "embed"), use_bias=False, scope=scope)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        h = jax.nn.silu(self.gate(x)) * self.up(x)
        return self.down(sharding.constrain(h, self.rules, "batch", "act_length", "act_mlp"))


class DecoderLayer(nnx.Module):
    """Attend, then apply an MLP or a mixture of experts, both on normalised input."""

    def __init__(
        self,
        config: TextConfig,
        *,
        moe_implementation: moe.Implementation | None,
        rules: sharding.Rules,
        scope: layers.Scope,
    ):
        self.rules = rules
        d, eps = config.hidden_size, config.rms_norm_eps
        self.input_norm = layers.RMSNorm(d, eps=eps, scope=scope)
        self.post_norm = layers.RMSNorm(d, eps=eps, scope=scope)
        self.attn = Attention(config, rules=rules, scope=scope)
        self.mlp = MLP(config, rules=rules, scope=scope) if config.moe is None else None
        self.moe = (
            None
            if config.moe is None
            else moe.MoE(config, implementation=moe_implementation, rules=rules, scope=scope)
        )

    def feed_forward(
        self, x: Float[Array, "B T D"], ids: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], moe.RouterStats | None]:
        """Add the MLP's answer; ids 0 are padding and count for no expert."""
        if self.moe is None:
            x, stats = x + self.mlp(self.post_norm(x)), None
        else:
            mixed, stats = self.moe(self.post_norm(x), ids > 0)
            x = x + mixed
        return sharding.constrain(x, self.rules, "batch", "act_length", "act_embed"), stats

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: tuple[jax.Array, jax.Array],
        segments: Segments,
        implementation: attention.Implementation,
    ) -> tuple[Float[Array, "B T D"], tuple[jax.Array, jax.Array], moe.RouterStats | None]:
        """Return the layer's output, its keys and values, and the router's counts."""
        q, k, v = self.attn.project(self.input_norm(x), angles)
        x = x + self.attn.mix(q, k, v, segments, implementation)
        x, stats = self.feed_forward(x, segments.ids)
        return x, (k, v), stats

    def decode(
        self,
        x: Float[Array, "B 1 D"],
        angles: tuple[jax.Array, jax.Array],
        keys: Float[Array, "B S K H"],
        values: Float[Array, "B S K H"],
        lengths: Int[Array, "B"],
        implementation: attention.Implementation,
    ) -> tuple[Float[Array, "B 1 D"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Write one token at place `lengths` of each row's cache and attend to all up to it."""
        q, k, v = self.attn.project(self.input_norm(x), angles)
        rows = jnp.arange(x.shape[0])
        keys = keys.at[rows, lengths].set(k[:, 0].astype(keys.dtype))
        values = values.at[rows, lengths].set(v[:, 0].astype(values.dtype))
        mixed = attention.attend_decode(q, keys, values, lengths + 1, implementation=implementation)
        x = x + self.attn.o(mixed.reshape(*x.shape[:2], -1))
        x, _ = self.feed_forward(x, jnp.ones(x.shape[:2], jnp.int32))
        return x, keys, values
