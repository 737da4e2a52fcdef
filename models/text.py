"""The text decoder: layers scanned in training, one by one with a cache in decoding."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models import attention, decode_attention, layers, moe, rope, sharding
from models.cache import Cache, Layout
from models.config import TextConfig
from models.decoder_layer import DecoderLayer
from models.deepstack import DeepStack
from models.inputs import Segments
from models.shared import SharedPrompts

# The values of a layer that the backward pass keeps besides its input: all, none, the results of
# attention, or these and those of the matmuls.
Remat = Literal["none", "full", "save_attention", "save_attention_and_dots"]


def _remat(step, policy: Remat, implementation: attention.Implementation):
    """Wrap the body of the scan over layers so that it keeps the values of `policy`."""
    if policy == "none":
        return step
    by_name = jax.checkpoint_policies.save_only_these_names("attention")
    dots = jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims

    def keep_attention(prim, *args, **params) -> bool:
        if implementation == "cudnn":
            # Its softmax statistics have no name: keep its whole result, from which the named one
            # is made by a mask.
            return "dot_product_attention_fwd" in prim.name
        return by_name(prim, *args, **params)

    policies = {
        "full": None,
        "save_attention": keep_attention,
        "save_attention_and_dots": lambda *a, **p: keep_attention(*a, **p) or dots(*a, **p),
    }
    if policy not in policies:
        raise ValueError(f"remat must be none or one of {list(policies)}, got {policy!r}")
    return jax.checkpoint(step, prevent_cse=False, policy=policies[policy])


class TextDecoder(nnx.Module):
    """The decoder: embedded tokens in, hidden states out.

    `layers` holds all layers stacked, or after `unstack` a list with one module each, the form
    that decoding wants.
    """

    def __init__(
        self,
        config: TextConfig,
        *,
        has_head: bool,
        moe_implementation: moe.Implementation | None,
        rules: sharding.Rules,
        scope: layers.Scope,
    ):
        self.config, self.rules = config, rules

        def table() -> layers.Embedding:
            axes = ("vocab", "embed")
            return layers.Embedding(config.vocab_size, config.hidden_size, axes=axes, scope=scope)

        self.embed = table()
        self.layers = DecoderLayer(
            config,
            moe_implementation=moe_implementation,
            rules=rules,
            scope=scope.stacked(config.num_layers),
        )
        self.norm = layers.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, scope=scope)
        self.head = table() if has_head and not config.tie_word_embeddings else None

    def unstack(self) -> None:
        """Replace the stacked layers by a list, which decoding reads without copying."""
        self.layers = nnx.List(self.layer_list())

    def join(self, *, heads: bool) -> None:
        """Join the maps of layers that were unstacked, see `DecoderLayer.join`."""
        if not isinstance(self.layers, nnx.List):
            raise ValueError("text.join needs layers one by one: call text.unstack first")
        for layer in self.layers:
            layer.join(heads=heads)

    def layer_list(self) -> Sequence[DecoderLayer]:
        """Return the layers one by one, whichever form they are held in."""
        if isinstance(self.layers, nnx.List):
            return self.layers
        return layers.unstack(self.layers, self.config.num_layers)

    def angles(self, positions: Int[Array, "3 B T"]) -> tuple[jax.Array, jax.Array]:
        """Return the cosines and sines of the positions."""
        c = self.config
        return rope.text_angles(
            positions, head_dim=c.head_dim, theta=c.rope_theta, section=c.mrope_section
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "3 B T"],
        segments: Segments,
        deepstack: DeepStack | None,
        *,
        implementation: attention.Implementation,
        remat: Remat,
        kind: Int[Array, "B T"] | None = None,
        shared: SharedPrompts | None = None,
    ) -> tuple[Float[Array, "B T D"], moe.RouterStats | None]:
        """Return normalised hidden states and the router's counts per layer (None if dense).

        Args:
          kind: of the sequence that each token stands in, for the router; see `models.kinds`.
          shared: of rows in which prompts stand once.
        """
        angles = self.angles(positions)
        graphdef, params = nnx.split(self.layers)

        def step(x: jax.Array, scanned: tuple) -> tuple[jax.Array, moe.RouterStats | None]:
            number, layer_params = scanned
            layer = nnx.merge(graphdef, layer_params)
            x, _, stats = layer(x, angles, segments, implementation, kind, shared)
            if deepstack is not None:
                x = deepstack.add(x, number)
            return x, stats

        numbers = jnp.arange(self.config.num_layers)
        x, stats = jax.lax.scan(_remat(step, remat, implementation), x, (numbers, params))
        return self.norm(x), stats

    def read(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "3 B T"],
        segments: Segments,
        deepstack: DeepStack | None,
        *,
        implementation: attention.Implementation,
    ) -> tuple[Float[Array, "B T D"], list[tuple[jax.Array, jax.Array]]]:
        """Return normalised hidden states of packed rows, and each layer's keys and values."""
        angles = self.angles(positions)
        caches = []
        for number, layer in enumerate(self.layer_list()):
            x, cache, _ = layer(x, angles, segments, implementation)
            caches.append(cache)
            if deepstack is not None and number < deepstack.num_levels:
                x = deepstack.add(x, jnp.int32(number))
        return self.norm(x), caches

    def prefill(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "3 B T"],
        segments: Segments,
        deepstack: DeepStack | None,
        *,
        implementation: attention.Implementation,
        cache_length: int,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Return hidden states of one sequence a row and a cache of `cache_length` places.

        Rows are padded on the right; their lengths are the places of segment 1.
        """
        x, caches = self.read(x, positions, segments, deepstack, implementation=implementation)
        room = ((0, 0), (0, 0), (0, cache_length - x.shape[1]), (0, 0))
        keys, values = (
            [jnp.pad(jnp.swapaxes(layer[which], 1, 2), room) for layer in caches]
            for which in (0, 1)
        )
        is_token = segments.ids == 1
        cache = Cache(
            keys=keys,
            values=values,
            layout=Layout(((x.shape[0], 1),)),
            lengths=is_token.sum(-1).astype(jnp.int32),
            next_positions=jnp.where(is_token, positions, -1).max((0, 2)) + 1,
            is_running=None,
            prompts=None,
        )
        return x, cache

    def decode(
        self,
        x: Float[Array, "B 1 D"],
        cache: Cache,
        *,
        implementation: decode_attention.Implementation,
    ) -> tuple[Float[Array, "B 1 D"], Cache]:
        """Return the hidden state of one more token a row, and the longer cache."""
        angles = self.angles(jnp.broadcast_to(cache.next_positions[:, None], (3, x.shape[0], 1)))
        keys, values = [], []
        for number, layer in enumerate(self.layer_list()):
            x, k, v = layer.decode(x, angles, cache.layer(number), implementation)
            keys.append(k)
            values.append(v)
        longer = dataclasses.replace(
            cache,
            keys=keys,
            values=values,
            lengths=cache.lengths + 1,
            next_positions=cache.next_positions + 1,
        )
        return self.norm(x), longer
