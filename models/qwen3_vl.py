"""Qwen3-VL: images and tokens in, hidden states out; logits on request."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from models import attention, decode_attention, deepstack, layers, moe, sharding
from models.cache import Cache
from models.config import Qwen3VLConfig
from models.deepstack import DeepStack
from models.inputs import TextInput, VisionInput
from models.noise import EmbeddingNoise
from models.text import Remat, TextDecoder
from models.vision import VisionTower


class Qwen3VL(nnx.Module):
    """The dense or mixture-of-experts model, with or without vision tower.

    Args:
      has_head: make the output head of an untied model; a discriminator needs none.
      moe_implementation: "dense" or "ragged" (see `moe.MoE`), None for a dense model.
      rules: logical axes to mesh axes.
      dtype: of activations and matmuls.
      param_dtype: of the parameters that are made here.
    """

    def __init__(
        self,
        config: Qwen3VLConfig,
        *,
        has_head: bool,
        moe_implementation: moe.Implementation | None,
        rules: sharding.Rules,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.rules = rules
        scope = layers.Scope(
            rngs=rngs, param_dtype=param_dtype, dtype=dtype, std=config.initializer_range
        )
        self.vision = (
            None if config.vision is None else VisionTower(config.vision, rules=rules, scope=scope)
        )
        self.text = TextDecoder(
            config.text,
            has_head=has_head,
            moe_implementation=moe_implementation,
            rules=rules,
            scope=scope,
        )

    def encode_images(
        self, vision: VisionInput, *, implementation: attention.Implementation, remat: bool
    ) -> tuple[Float[Array, "W Q D"], Float[Array, "Y W Q D"] | None]:
        """Return the merged tokens of all images, and those of each DeepStack tap."""
        if self.vision is None:
            raise ValueError("images were given to a text-only model")
        return self.vision(vision, implementation=implementation, remat=remat)

    def embed(
        self,
        text: TextInput,
        images: tuple[Float[Array, "W Q D"], Float[Array, "Y W Q D"] | None] | None,
    ) -> tuple[Float[Array, "B T D"], DeepStack | None]:
        """Embed the tokens, with the images' tokens in their places.

        Args:
          images: from `encode_images`; None for text alone.
        """
        x = self.text.embed(text.tokens)
        x = sharding.constrain(x, self.rules, "batch", "act_length", "act_embed")
        if images is None:
            return x, None
        tokens, levels = images
        shown = (text.image_slots >= 0)[..., None]
        x = jnp.where(shown, deepstack.place(tokens, text.image_slots).astype(x.dtype), x)
        x = sharding.constrain(x, self.rules, "batch", "act_length", "act_embed")
        if levels is None:
            return x, None
        return x, DeepStack(levels=levels, slots=text.image_slots)

    def __call__(
        self,
        text: TextInput,
        vision: VisionInput | None,
        *,
        implementation: attention.Implementation,
        remat: Remat,
        kind: Int[Array, "B T"] | None = None,
        noise: EmbeddingNoise | None = None,
    ) -> tuple[Float[Array, "B T D"], moe.RouterStats | None]:
        """Return normalised hidden states of packed rows, and the router's counts per layer.

        Args:
          remat: the values of a decoder layer that the backward pass keeps; unless "none" the
            vision tower keeps the inputs of its blocks alone.
          kind: of the sequence that each token stands in, for the router; see `models.kinds`.
        """
        images = None
        if vision is not None:
            images = self.encode_images(
                vision, implementation=implementation, remat=remat != "none"
            )
        x, levels = self.embed(text, images)
        if noise is not None:
            x = noise.add(x)
        return self.text(
            x,
            text.positions,
            text.segments,
            levels,
            implementation=implementation,
            remat=remat,
            kind=kind,
            shared=text.shared,
        )

    def head(self) -> Float[Array, "V D"]:
        """Return the output head, the table of token embeddings in a tied model."""
        if self.config.text.tie_word_embeddings:
            return self.text.embed.embedding[...]
        if self.text.head is None:
            raise ValueError("this model was made without an output head")
        return self.text.head.embedding[...]

    def logits(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Return float32 logits of the next token for each hidden state."""
        head = self.head().astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)

    def read(
        self,
        text: TextInput,
        images: tuple[Float[Array, "W Q D"], Float[Array, "Y W Q D"] | None] | None,
        *,
        implementation: attention.Implementation,
    ) -> tuple[Float[Array, "B T D"], list[tuple[jax.Array, jax.Array]]]:
        """Return hidden states of packed rows, and each layer's keys and values, [B, T, K, H].

        Args:
          images: from `encode_images`; None for text alone.
        """
        x, levels = self.embed(text, images)
        return self.text.read(
            x, text.positions, text.segments, levels, implementation=implementation
        )

    def prefill(
        self,
        text: TextInput,
        images: tuple[Float[Array, "W Q D"], Float[Array, "Y W Q D"] | None] | None,
        *,
        implementation: attention.Implementation,
        cache_length: int,
    ) -> tuple[Float[Array, "B D"], Cache]:
        """Read one prompt a row; return each row's last hidden state and the cache.

        Prompts of different lengths are padded on the right. Call `text.unstack` first when many
        tokens follow.

        Args:
          images: from `encode_images`; None for text alone.
          cache_length: places a row, prompt and response together.
        """
        x, levels = self.embed(text, images)
        hidden, cache = self.text.prefill(
            x,
            text.positions,
            text.segments,
            levels,
            implementation=implementation,
            cache_length=cache_length,
        )
        last = jnp.take_along_axis(hidden, cache.lengths[:, None, None] - 1, axis=1)
        return last[:, 0], cache

    def decode_step(
        self,
        tokens: Int[Array, "B"],
        cache: Cache,
        *,
        implementation: decode_attention.Implementation,
    ) -> tuple[Float[Array, "B D"], Cache]:
        """Read one more token a row; return its hidden state and the longer cache."""
        x = self.text.embed(tokens[:, None])
        hidden, cache = self.text.decode(x, cache, implementation=implementation)
        return hidden[:, 0], cache


def abstract(make: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, nnx.State]:
    """Return the graph definition and abstract parameters of `make()` without making any array.

    `make` must create its own `nnx.Rngs`.
    """
    return nnx.split(nnx.eval_shape(make))


def num_parameters(state: nnx.State) -> int:
    """Return the number of parameters, a tied head counted once."""
    return sum(leaf.size for leaf in jax.tree.leaves(state))
