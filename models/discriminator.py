"""The discriminator: a trunk without output head, and a scalar score of a segment's last token."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from models import attention, layers, moe, sharding
from models.config import Qwen3VLConfig
from models.inputs import TextInput, VisionInput
from models.qwen3_vl import Qwen3VL
from models.text import Remat


class Discriminator(nnx.Module):
    """Score segments; the trunk may be a mixture of experts, dense, or text-only.

    Source: PRISM moe/value_head.py Qwen3VLMoeValueHead: a linear map without bias on the last
    normalised hidden state.
    """

    def __init__(
        self,
        config: Qwen3VLConfig,
        *,
        moe_implementation: moe.Implementation | None,
        rules: sharding.Rules,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.trunk = Qwen3VL(
            config,
            has_head=False,
            moe_implementation=moe_implementation,
            rules=rules,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        scope = layers.Scope(
            rngs=rngs, param_dtype=param_dtype, dtype=dtype, std=config.initializer_range
        )
        self.score = layers.Linear(
            config.text.hidden_size, 1, axes=("embed", "score"), use_bias=False, scope=scope
        )

    def __call__(
        self,
        text: TextInput,
        vision: VisionInput | None,
        last: Int[Array, "B M"],
        *,
        implementation: attention.Implementation,
        remat: Remat,
    ) -> tuple[Float[Array, "B M"], moe.RouterStats | None]:
        """Return a score per segment, float32, and the router's counts per layer (None if dense).

        Args:
          last: place in its row of each segment's scored token; any valid place for a slot that
            holds no segment, whose score means nothing.
        """
        hidden, stats = self.trunk(text, vision, implementation=implementation, remat=remat)
        scored = jnp.take_along_axis(hidden, last[..., None], axis=1)  # [B, M, D]
        kernel = self.score.kernel[...].astype(jnp.float32)
        return (scored.astype(jnp.float32) @ kernel)[..., 0], stats
