"""One layer of the text decoder: grouped-query attention, then an MLP or a mixture of experts.

Decoding reads few rows, so that a step takes as long as reading the weights: `join` gives the form
it wants, with one matmul for q, k and v and one for gate and up. Kernels stay 3-D and 4-D, so that
sharding the kv heads and the mlp cuts them as it cuts the separate ones.
"""

import jax
import jax.ad_checkpoint
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models import attention, decode_attention, layers, moe, rope, sharding
from models.cache import Cache
from models.config import TextConfig
from models.inputs import Segments
from models.shared import SharedPrompts, collapse, expand


def join_qkv(
    q: Float[Array, "*L D NH"],
    k: Float[Array, "*L D KH"],
    v: Float[Array, "*L D KH"],
    *,
    head_dim: int,
) -> Float[Array, "*L D K G2 H"]:
    """Return one kernel; each kv head has its G queries, its key and its value side by side."""

    def heads(kernel: jax.Array, num_heads: int) -> jax.Array:
        return kernel.reshape(*kernel.shape[:-1], num_heads, -1, head_dim)

    num_kv_heads = k.shape[-1] // head_dim
    return jnp.concatenate([heads(x, num_kv_heads) for x in (q, k, v)], axis=-2)


def join_norms(q: Float[Array, "*L H"], k: Float[Array, "*L H"], *, groups: int) -> jax.Array:
    """Return the weights [*L, G + 2, H] of a kv head's G queries, its key, and ones.

    The ones are for the value, which is not normalised: to leave it out before the norm would copy
    the rest.
    """
    return jnp.stack([q] * groups + [k, jnp.ones_like(k)], axis=-2)


def join_gate_up(gate: Float[Array, "*L D F"], up: Float[Array, "*L D F"]) -> jax.Array:
    """Return one kernel [*L, D, 2, F]."""
    return jnp.stack([gate, up], axis=-2)


class Attention(nnx.Module):
    """Attention with grouped queries, normalised heads and interleaved M-RoPE.

    After `join` the maps `q, k, v` and the norms `q_norm, k_norm` are one each.
    """

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
        self.qkv, self.qk_norm = None, None

    def join(self) -> None:
        """Replace q, k and v by one map."""
        kernels = [part.kernel[...] for part in (self.q, self.k, self.v)]
        kernel = join_qkv(*kernels, head_dim=self.head_dim)
        axes = ("embed", "kv_heads", None, None)
        self.qkv = nnx.data(layers.Joined(kernel, axes=axes, dtype=self.q.dtype))
        groups = kernels[0].shape[-1] // kernels[1].shape[-1]
        norm = self.q_norm
        scale = join_norms(norm.scale[...], self.k_norm.scale[...], groups=groups)
        norm.scale = nnx.Param(scale, axes=(None, "norm"))
        self.qk_norm = nnx.data(norm)
        self.q, self.k, self.v, self.q_norm, self.k_norm = (None,) * 5

    def project(
        self, x: Float[Array, "B T D"], angles: tuple[jax.Array, jax.Array]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Return rotated queries and keys, and values."""
        heads = (*x.shape[:2], -1, self.head_dim)
        if self.qkv is not None:
            qkv = self.qkv(x)  # [B, T, K, G + 2, H]
            qk = self.qk_norm(qkv)  # [B, T, K, G + 2, H]
            qk = rope.apply(qk.reshape(heads), *angles).reshape(qk.shape)
            return qk[..., :-2, :].reshape(heads), qk[..., -2, :], qkv[..., -1, :]
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
        shared: SharedPrompts | None,
    ) -> Float[Array, "B T D"]:
        """Attend inside each segment, causally, and project back."""
        places = q.shape[:2]
        if shared is not None:
            segments = shared.segments
            q = expand(q, shared, True)  # [B, T of the expanded row, N, H]
            k, v = expand(k, shared, False), expand(v, shared, False)
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
        if shared is not None:
            mixed = collapse(mixed, shared)
        mixed = jax.ad_checkpoint.checkpoint_name(mixed, "attention")
        return self.o(mixed.reshape(*places, -1))


class MLP(nnx.Module):
    """The gated MLP: down(silu(gate x) * up x). After `join` gate and up are one map."""

    def __init__(self, config: TextConfig, *, rules: sharding.Rules, scope: layers.Scope):
        self.rules = rules
        d, f = config.hidden_size, config.intermediate_size
        self.gate = layers.Linear(d, f, axes=("embed", "mlp"), use_bias=False, scope=scope)
        self.up = layers.Linear(d, f, axes=("embed", "mlp"), use_bias=False, scope=scope)
        self.down = layers.Linear(f, d, axes=("mlp", "embed"), use_bias=False, scope=scope)
        self.gate_up = None

    def join(self) -> None:
        """Replace gate and up by one map."""
        kernel = join_gate_up(self.gate.kernel[...], self.up.kernel[...])
        axes = ("embed", None, "mlp")
        self.gate_up = nnx.data(layers.Joined(kernel, axes=axes, dtype=self.gate.dtype))
        self.gate, self.up = None, None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        if self.gate_up is None:
            gate, up = self.gate(x), self.up(x)  # [B, T, F]
        else:
            both = self.gate_up(x)  # [B, T, 2, F]
            gate, up = both[..., 0, :], both[..., 1, :]
        h = jax.nn.silu(gate) * up
        return self.down(sharding.constrain(h, self.rules, "batch", "act_length", "act_mlp"))


class DecoderLayer(nnx.Module):
    """Attention, then an MLP or a mixture of experts, both of normalised input."""

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

    def join(self, *, heads: bool) -> None:
        """Make one matmul of maps that read the same input; experts stay as they are.

        Args:
          heads: those of attention too; only where the mesh cuts queries as it cuts keys, between
            kv heads.
        """
        if heads:
            self.attn.join()
        if self.mlp is not None:
            self.mlp.join()

    def feed_forward(
        self,
        x: Float[Array, "B T D"],
        ids: Int[Array, "B T"],
        kind: Int[Array, "B T"] | None,
        kind_weights: Float[Array, "B T A"] | None = None,
    ) -> tuple[Float[Array, "B T D"], moe.RouterStats | None]:
        """Add the MLP's answer; ids 0 are padding and count for no expert."""
        if self.moe is None:
            x, stats = x + self.mlp(self.post_norm(x)), None
        else:
            mixed, stats = self.moe(self.post_norm(x), ids > 0, kind, kind_weights)
            x = x + mixed
        return sharding.constrain(x, self.rules, "batch", "act_length", "act_embed"), stats

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: tuple[jax.Array, jax.Array],
        segments: Segments,
        implementation: attention.Implementation,
        kind: Int[Array, "B T"] | None = None,
        shared: SharedPrompts | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[jax.Array, jax.Array], moe.RouterStats | None]:
        """Return the layer's output, its keys and values, and the router's counts.

        Args:
          kind: of the sequence that each token stands in, for the router; see `models.kinds`.
          shared: of rows in which prompts stand once.
        """
        q, k, v = self.attn.project(self.input_norm(x), angles)
        x = x + self.attn.mix(q, k, v, segments, implementation, shared)
        kind_weights = None if shared is None else shared.kind_weights
        x, stats = self.feed_forward(x, segments.ids, kind, kind_weights)
        return x, (k, v), stats

    def decode(
        self,
        x: Float[Array, "B 1 D"],
        angles: tuple[jax.Array, jax.Array],
        layer: Cache,
        implementation: decode_attention.Implementation,
    ) -> tuple[Float[Array, "B 1 D"], jax.Array, jax.Array]:
        """Read one token a row; return the output, and the layer's keys and values with it."""
        q, k, v = self.attn.project(self.input_norm(x), angles)
        mixed, keys, values = decode_attention.attend(
            q, k, v, layer, implementation=implementation, rules=self.rules
        )
        x = x + self.attn.o(mixed.reshape(*x.shape[:2], -1))
        if self.moe is None:
            x = x + self.mlp(self.post_norm(x))
        else:
            is_running = layer.is_running
            if is_running is None:
                is_running = jnp.ones(x.shape[0], bool)
            x = x + self.moe.decode(self.post_norm(x), is_running)
        x = sharding.constrain(x, self.rules, "batch", "act_length", "act_embed")
        return x, keys, values
