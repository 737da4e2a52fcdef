"""Make a mixture of experts from a dense checkpoint: every expert is the dense MLP plus noise.

The folder is streamed, one tensor at a time. Vision tower, attention, norms and embeddings are
copied byte by byte; only the decoder's MLPs change, and each layer gets a router.

Source: PRISM moe/create_vl_moe.py, whose noise is absolute, of std 0.01, and unseeded.
"""

import dataclasses
import functools
import hashlib
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from models import config as config_lib
from models import kinds, qwen3_vl, sharding
from models.hf import check as hf_check
from models.hf import checkpoint as hf_checkpoint
from models.hf import files as hf_files
from models.hf import names as hf_names
from models.hf import reader as hf_reader
from models.hf import stream as hf_stream
from models.hf import writer as hf_writer

Noise = Literal["absolute", "relative"]

# Copied into the text part from the dense config; they do not change with the experts.
_KEPT = (
    "attention_bias attention_dropout bos_token_id dtype eos_token_id head_dim hidden_act "
    "hidden_size initializer_range intermediate_size max_position_embeddings num_attention_heads "
    "num_hidden_layers num_key_value_heads pad_token_id rms_norm_eps use_cache vocab_size"
).split()
_KEPT_TOP = (
    "dtype image_token_id torch_dtype video_token_id vision_end_token_id vision_start_token_id"
).split()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The settings of a mixture; ValueError for a value out of range."""

    num_experts: int
    num_experts_per_token: int
    noise_std: float
    noise: str  # "absolute" or "relative"
    router_std: float
    seed: int
    router: str  # of a discriminator with this trunk, see `kinds`
    heads: int

    def __post_init__(self):
        kinds.Apart(router=self.router, heads=self.heads)
        if not 1 <= self.num_experts_per_token <= self.num_experts:
            raise ValueError(
                "upcycle.num_experts_per_token must be between 1 and num_experts = "
                f"{self.num_experts}, got {self.num_experts_per_token}"
            )
        if self.noise not in ("absolute", "relative"):
            raise ValueError(f"upcycle.noise must be absolute or relative, got {self.noise!r}")
        for name, value in (("noise_std", self.noise_std), ("router_std", self.router_std)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"upcycle.{name} must be 0 or more, got {value}")
        kinds.check_experts(
            self.router,
            num_experts=self.num_experts,
            num_experts_per_token=self.num_experts_per_token,
        )


def tensor_key(seed: int, name: str) -> Key[Array, ""]:
    """Return the random key of one tensor; it depends only on the seed and the name."""
    digest = hashlib.sha256(name.encode()).digest()
    return jax.random.fold_in(jax.random.key(seed), int.from_bytes(digest[:4], "little"))


def experts(
    kernel: Float[Array, "I O"],
    key: Key[Array, ""],
    *,
    num_experts: int,
    noise_std: float,
    noise: Noise,
) -> Float[Array, "E I O"]:
    """Return a copy of a dense kernel for each expert, each with independent normal noise.

    Noise is drawn and added in float32. With "relative" its std is `noise_std` times the std of
    the kernel's values (ddof 0), with "absolute" `noise_std` itself.
    """
    wide = kernel.astype(jnp.float32)
    std = noise_std * wide.std(ddof=0) if noise == "relative" else noise_std

    def noisy_copy(expert: jax.Array) -> jax.Array:
        standard = jax.random.normal(jax.random.fold_in(key, expert), kernel.shape, jnp.float32)
        return (wide + std * standard).astype(kernel.dtype)

    return jax.lax.map(noisy_copy, jnp.arange(num_experts))


def moe_config(dense: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """Return the `config.json` of the mixture, in a form that transformers 4.57 and 5.x both read.

    Source: PRISM moe/create_vl_moe.py:63-120; rope as `rope_theta` and `rope_scaling`, experts as
    `num_experts`: 5.x maps these to its names, while 4.57 does not know the newer ones.
    """
    if dense.get("model_type") != "qwen3_vl":
        raise ValueError(
            f"only a dense qwen3_vl can be upcycled, config.json says {dense.get('model_type')!r}"
        )
    config = config_lib.from_hf(dense)
    text = {key: dense["text_config"][key] for key in _KEPT if key in dense["text_config"]}
    text |= {
        "model_type": "qwen3_vl_moe_text",
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "rope_theta": config.text.rope_theta,
        "rope_scaling": {
            "rope_type": "default",
            "mrope_section": list(config.text.mrope_section),
            "mrope_interleaved": True,
        },
        "num_experts": options.num_experts,
        "num_experts_per_tok": options.num_experts_per_token,
        "moe_intermediate_size": config.text.intermediate_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.01,
    }
    return {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "model_type": "qwen3_vl_moe",
        **{key: dense[key] for key in _KEPT_TOP if key in dense},
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "text_config": text,
        "vision_config": {**dense["vision_config"], "model_type": "qwen3_vl_moe"},
        **kinds.entry(kinds.Apart(router=options.router, heads=options.heads)),
    }


def upcycle(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    options: Options,
    *,
    layout: hf_names.ExpertLayout,
    max_shard_bytes: int,
) -> None:
    """Write a mixture of experts, made from a dense checkpoint folder, to a new folder.

    Tensors keep their stored types. The same seed gives the same bytes, and the two layouts give
    the same values.
    Raises ValueError for a source that is not a whole dense Qwen3-VL and a target that is not
    empty.
    """
    dense_json = hf_checkpoint.read_config(source)
    moe_json = moe_config(dense_json, options)
    names = hf_names.naming(dense_json)
    with hf_reader.open_folder(source, check_manifest=False) as reader:
        hf_check.refuse_sizes(reader, config_lib.from_hf(dense_json), names)
    dense_shapes = _shapes(config_lib.from_hf(dense_json))
    moe_shapes = _shapes(config_lib.from_hf(moe_json))
    entries = [hf_names.weight(path, s, names, layout) for path, s in moe_shapes.items()]
    shapes = {name: entry.disk_shape for entry in entries for name in entry.names}
    with hf_reader.open_folder(source, check_manifest=True) as reader:
        hf_check.table(reader, dense_shapes, names, ())
        planned = [
            hf_writer.Planned(name, _dtype(reader, name), shape) for name, shape in shapes.items()
        ]
        planned.sort(key=lambda tensor: hf_checkpoint.natural(tensor.name))
        hf_writer.write_folder(
            pathlib.Path(target),
            hf_writer.shards(planned, max_shard_bytes),
            functools.partial(_produce, reader, options, layout),
            config_json=moe_json,
            copy_from=pathlib.Path(source),
        )


def _shapes(config: config_lib.Qwen3VLConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the model's parameters by path."""
    _, state = qwen3_vl.abstract(
        lambda: qwen3_vl.Qwen3VL(
            config,
            has_head=True,
            moe_implementation=None if config.text.moe is None else "dense",
            rules=sharding.REPLICATED,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            rngs=nnx.Rngs(0),
        )
    )
    return {path: value.shape for path, value in hf_checkpoint.values_by_path(state).items()}


def _dtype(reader: hf_reader.Reader, name: str) -> str:
    """Return the type of a tensor of the mixture; a router takes that of its layer's dense MLP."""
    sources = hf_names.dense_sources(name) or hf_names.dense_sources(
        f"{name.removesuffix('gate.weight')}experts.down_proj"
    )
    kinds = {reader.tensors[source].dtype for source in sources}
    if len(kinds) > 1:
        raise ValueError(f"{reader.path}: {', '.join(sources)} must be of one type, got {kinds}")
    kind = kinds.pop()
    if kind == "F64":
        raise ValueError(
            f"{reader.path}: float64 is not upcycled; convert the folder there and back first, "
            "which makes it float32"
        )
    return kind


def _produce(
    reader: hf_reader.Reader,
    options: Options,
    layout: hf_names.ExpertLayout,
    tensor: hf_writer.Planned,
) -> Iterator[Any]:
    """Yield the bytes of one tensor of the mixture."""
    sources = hf_names.dense_sources(tensor.name)
    if sources == (tensor.name,):
        yield from reader.blocks(tensor.name, hf_stream.GROUP_BYTES)
        return
    if sources:
        stacks = [
            _stack(reader.read(name), tensor_key(options.seed, name), options, layout)
            for name in sources
        ]
        # [E, D, F] or [E, F, D] each: gate and up lie side by side on the axis of F.
        axis = 2 if layout == "4.57" else 1
        value = np.concatenate(stacks, axis) if len(stacks) > 1 else stacks[0]
    else:
        key = tensor_key(options.seed, tensor.name)
        weights = options.router_std * jax.random.normal(key, tensor.shape, jnp.float32)
        value = np.asarray(weights).astype(hf_files.DTYPES[tensor.dtype])
    yield value.reshape(-1).view(np.uint8)


def _stack(
    weight: np.ndarray, key: Key[Array, ""], options: Options, layout: hf_names.ExpertLayout
) -> np.ndarray:
    """Return the experts of one dense weight [out, in], in the layout's order of axes."""
    return np.asarray(
        _stack_jit(
            weight,
            key,
            num_experts=options.num_experts,
            noise_std=options.noise_std,
            noise=options.noise,
            transposed=layout == "5",
        )
    )


@functools.partial(jax.jit, static_argnames=("num_experts", "noise_std", "noise", "transposed"))
def _stack_jit(
    weight: jax.Array,
    key: jax.Array,
    *,
    num_experts: int,
    noise_std: float,
    noise: Noise,
    transposed: bool,
) -> jax.Array:
    stack = experts(weight.T, key, num_experts=num_experts, noise_std=noise_std, noise=noise)
    return stack.swapaxes(1, 2) if transposed else stack
