"""The vision tower: patches to merged tokens, with DeepStack taps on the way."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models import attention, layers, rope, sharding
from models.config import VisionConfig
from models.inputs import Segments, VisionInput

_EPS = 1e-6


class Attention(nnx.Module):
    """Attention among the patches of one frame, with 2-D rotary positions."""

    def __init__(self, config: VisionConfig, *, rules: sharding.Rules, scope: layers.Scope):
        self.num_heads, self.rules = config.num_heads, rules
        d = config.hidden_size

        def linear(axes: tuple[str, str]) -> layers.Linear:
            return layers.Linear(d, d, axes=axes, use_bias=True, scope=scope)

        self.q = linear(("vision_embed", "vision_heads"))
        self.k = linear(("vision_embed", "vision_heads"))
        self.v = linear(("vision_embed", "vision_heads"))
        self.o = linear(("vision_heads", "vision_embed"))

    def __call__(
        self,
        x: Float[Array, "W P D"],
        angles: tuple[jax.Array, jax.Array],
        segments: Segments,
        implementation: attention.Implementation,
    ) -> Float[Array, "W P D"]:
        heads = (*x.shape[:2], self.num_heads, -1)
        q = rope.apply(self.q(x).reshape(heads), *angles)  # [W, P, N, H]
        k = rope.apply(self.k(x).reshape(heads), *angles)  # [W, P, N, H]
        v = self.v(x).reshape(heads)  # [W, P, N, H]
        mixed = attention.attend(
            q,
            k,
            v,
            segments,
            causal=False,
            implementation=implementation,
            rules=self.rules,
            row_axis="images",
        )
        return self.o(mixed.reshape(x.shape))


class Block(nnx.Module):
    """Attention, then a GELU MLP, both of normalised input and added to it."""

    def __init__(self, config: VisionConfig, *, rules: sharding.Rules, scope: layers.Scope):
        d, f = config.hidden_size, config.intermediate_size
        self.rules = rules
        self.norm1 = layers.LayerNorm(d, eps=_EPS, scope=scope)
        self.norm2 = layers.LayerNorm(d, eps=_EPS, scope=scope)
        self.attn = Attention(config, rules=rules, scope=scope)
        self.mlp = VisionMLP(d, f, d, approximate=True, scope=scope)

    def __call__(
        self,
        x: Float[Array, "W P D"],
        angles: tuple[jax.Array, jax.Array],
        segments: Segments,
        implementation: attention.Implementation,
    ) -> Float[Array, "W P D"]:
        x = x + self.attn(self.norm1(x), angles, segments, implementation)
        x = x + self.mlp(self.norm2(x))
        return sharding.constrain(x, self.rules, "images", "act_length", "act_embed")


class VisionMLP(nnx.Module):
    """Two linear maps with a GELU between them.

    The blocks use the tanh approximation of GELU, the mergers the exact one.
    """

    def __init__(
        self, d_in: int, d_mid: int, d_out: int, *, approximate: bool, scope: layers.Scope
    ):
        self.approximate = approximate
        self.fc1 = layers.Linear(
            d_in, d_mid, axes=("vision_embed", "vision_mlp"), use_bias=True, scope=scope
        )
        self.fc2 = layers.Linear(
            d_mid, d_out, axes=("vision_mlp", "vision_embed"), use_bias=True, scope=scope
        )

    def __call__(self, x: Float[Array, "*rows I"]) -> Float[Array, "*rows O"]:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=self.approximate))


class Merger(VisionMLP):
    """The MLP that merges the patches of one square into one token of the decoder's width.

    The last merger normalises each patch, the DeepStack mergers the whole square.

    Source: transformers models/qwen3_vl/modeling_qwen3_vl.py Qwen3VLVisionPatchMerger.
    """

    def __init__(self, config: VisionConfig, *, normalise_square: bool, scope: layers.Scope):
        self.normalise_square = normalise_square
        self.area = config.spatial_merge_size**2
        square = config.hidden_size * self.area
        width = square if normalise_square else config.hidden_size
        self.norm = layers.LayerNorm(width, eps=_EPS, scope=scope)
        super().__init__(square, square, config.out_hidden_size, approximate=False, scope=scope)

    def __call__(self, x: Float[Array, "W P D"]) -> Float[Array, "W Q O"]:
        square = (x.shape[0], x.shape[1] // self.area, x.shape[2] * self.area)
        x = self.norm(x.reshape(square)) if self.normalise_square else self.norm(x).reshape(square)
        return super().__call__(x)


class VisionTower(nnx.Module):
    """The tower: packed patches in, merged tokens and a DeepStack map per tapped block out."""

    def __init__(self, config: VisionConfig, *, rules: sharding.Rules, scope: layers.Scope):
        self.config, self.rules = config, rules
        d = config.hidden_size
        self.patch_embed = layers.Linear(
            config.patch_dim, d, axes=("patch", "vision_embed"), use_bias=True, scope=scope
        )
        self.pos_embed = layers.Embedding(
            config.num_position_embeddings,
            d,
            axes=("vision_positions", "vision_embed"),
            scope=scope,
        )
        self.blocks = Block(config, rules=rules, scope=scope.stacked(config.num_layers))
        self.merger = Merger(config, normalise_square=False, scope=scope)
        taps = len(config.deepstack_layers)
        self.deepstack_mergers = (
            Merger(config, normalise_square=True, scope=scope.stacked(taps)) if taps else None
        )

    def embed(self, vision: VisionInput) -> Float[Array, "W P D"]:
        """Embed the patches and add their interpolated positions."""
        table = self.pos_embed.embedding[...].astype(jnp.float32)
        # Both are large: where the length of rows is split, each device makes its own part.
        corners, pixels = (
            sharding.constrain(x, self.rules, "images", "act_length", None)
            for x in (vision.corners, vision.pixels)
        )
        # c: the four corners of a patch.
        place = jnp.einsum("wpcd,wpc->wpd", table[corners], vision.corner_weights)
        x = self.patch_embed(normalise(pixels))
        return x + place.astype(x.dtype)

    def __call__(
        self, vision: VisionInput, *, implementation: attention.Implementation, remat: bool
    ) -> tuple[Float[Array, "W Q O"], Float[Array, "Y W Q O"] | None]:
        """Return the merged tokens and, per tapped block, its merged tokens (None without taps).

        Args:
          remat: keep only each block's input for the backward pass.
        """
        angles = rope.vision_angles(
            vision.coords, head_dim=self.config.head_dim, theta=self.config.rope_theta
        )
        graphdef, params = nnx.split(self.blocks)

        def block(x: jax.Array, block_params: nnx.State) -> tuple[jax.Array, None]:
            module = nnx.merge(graphdef, block_params)
            return module(x, angles, vision.segments, implementation), None

        step = jax.checkpoint(block, prevent_cse=False) if remat else block
        x = sharding.constrain(self.embed(vision), self.rules, "images", "act_length", "act_embed")
        tapped = []
        start = 0
        for stop in [*(i + 1 for i in self.config.deepstack_layers), self.config.num_layers]:
            if stop > start:
                # Not `p[a:z]`: JAX 0.10 cannot add the gradient of such a slice to a sum in place.
                part = jax.tree.map(
                    lambda p, a=start, z=stop: jax.lax.slice_in_dim(p, a, z, axis=0), params
                )
                x, _ = jax.lax.scan(step, x, part)
            tapped.append(x)
            start = stop
        tokens = self.merger(tapped.pop())
        if not tapped:
            return tokens, None
        mergers = layers.unstack(self.deepstack_mergers, len(tapped))
        return tokens, jnp.stack([merge(y) for merge, y in zip(mergers, tapped, strict=True)])


def normalise(pixels: jax.Array) -> jax.Array:
    """Return pixels in -1 … 1; uint8 is scaled here, to send an eighth of the bytes to the device.

    Source: Qwen3-VL's preprocessor_config.json, image_mean = image_std = 0.5.
    """
    if pixels.dtype == jnp.uint8:
        return pixels.astype(jnp.float32) / 127.5 - 1.0
    return pixels
