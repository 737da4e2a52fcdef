"""Sizes of every part of Qwen3-VL, read strictly from a Hugging Face `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from models import config_reader, kinds


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Sizes of the vision tower."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    in_channels: int
    patch_size: int  # pixels
    temporal_patch_size: int  # frames
    spatial_merge_size: int  # patches a side that become one token
    out_hidden_size: int
    num_position_embeddings: int  # a square table
    rope_theta: float
    deepstack_layers: tuple[int, ...]  # blocks whose output is tapped

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch: channels x frames x pixels."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def position_side(self) -> int:
        """Rows, and columns, of the square table of position embeddings."""
        return round(max(self.num_position_embeddings, 0) ** 0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Sizes of a sparse mixture of experts, the same in every decoder layer."""

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    router: kinds.Router  # what decides where a token may go; "segment" needs a discriminator


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Sizes of the text decoder; `moe` is None for a dense MLP."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]  # frequencies of time, height, width
    tie_word_embeddings: bool
    moe: MoEConfig | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3VLConfig:
    """Sizes and special tokens of the whole model; `vision` is None for a text-only trunk."""

    text: TextConfig
    vision: VisionConfig | None
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    initializer_range: float
    score_heads: int  # of a discriminator, see `kinds`; a policy has none whatever it says


def _rope(reader: config_reader.Reader) -> tuple[float, tuple[int, int, int]]:
    """Return theta and the M-RoPE sections from `rope_parameters` (5.x) or `rope_scaling`."""
    rope = reader.get("rope_parameters", "rope_scaling", default={})
    where = f"{reader.where}.rope_parameters"
    inner = config_reader.Reader(rope, where)
    for key in ("rope_type", "type"):
        inner.fixed(key, ("default", "mrope"))
    inner.fixed("mrope_interleaved", (True,))
    inner.fixed("partial_rotary_factor", (1.0,))
    theta = rope.get("rope_theta", reader.values.get("rope_theta"))
    reader.seen.add("rope_theta")
    inner.seen.add("rope_theta")
    if theta is None:
        raise ValueError(f"{where}.rope_theta is missing")
    section = inner.get("mrope_section", default=(24, 20, 20))
    inner.finish()
    if len(section) != 3:
        raise ValueError(f"{where}.mrope_section = {section} must hold time, height and width")
    return float(theta), (int(section[0]), int(section[1]), int(section[2]))


def _text(
    values: Mapping[str, Any], where: str, *, tied: bool | None, router: kinds.Router
) -> TextConfig:
    reader = config_reader.Reader(values, where)
    reader.fixed("hidden_act", ("silu",))
    reader.fixed("layer_types", (["full_attention"] * values.get("num_hidden_layers", 0), None))
    num_heads = reader.get("num_attention_heads")
    is_moe = "num_experts" in values or "num_local_experts" in values
    # Absent from a dense model it is 128; null, or absent from a mixture, it follows.
    is_128 = "head_dim" not in values and not is_moe
    by_width = 128 if is_128 else reader.get("hidden_size") // num_heads
    head_dim = reader.get("head_dim", default=by_width)
    theta, section = _rope(reader)
    moe = None
    if is_moe:
        moe = MoEConfig(
            num_experts=reader.get("num_experts", "num_local_experts"),
            num_experts_per_token=reader.get("num_experts_per_tok"),
            intermediate_size=reader.get("moe_intermediate_size"),
            router=router,
        )
    elif router != "token":
        raise ValueError(f"config.{kinds.KEY}.router = {router!r} needs a mixture of experts")
    own = reader.get("tie_word_embeddings", default=False)
    config = TextConfig(
        vocab_size=reader.get("vocab_size"),
        hidden_size=reader.get("hidden_size"),
        intermediate_size=reader.get("intermediate_size"),
        num_layers=reader.get("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=reader.get("num_key_value_heads", default=num_heads),
        head_dim=head_dim,
        rms_norm_eps=float(reader.get("rms_norm_eps")),
        rope_theta=theta,
        mrope_section=section,
        tie_word_embeddings=own if tied is None else tied,
        moe=moe,
    )
    reader.finish()
    if config.num_heads % config.num_kv_heads:
        raise ValueError(f"{where}.num_attention_heads must be a multiple of num_key_value_heads")
    if head_dim % 2 or min(section) < 0:
        raise ValueError(f"{where}: head_dim must be even, mrope_section not negative")
    if moe is not None and not 1 <= moe.num_experts_per_token <= moe.num_experts:
        raise ValueError(f"{where}.num_experts_per_tok must be between 1 and num_experts")
    if moe is not None:
        kinds.check_experts(
            router,
            num_experts=moe.num_experts,
            num_experts_per_token=moe.num_experts_per_token,
        )
    return config


def _vision(values: Mapping[str, Any], where: str) -> VisionConfig:
    reader = config_reader.Reader(values, where)
    reader.fixed("hidden_act", ("gelu_pytorch_tanh",))
    rope = reader.get("rope_parameters", default={})
    if rope.get("rope_type", "axial") != "axial":
        raise ValueError(f"{where}.rope_parameters.rope_type = {rope['rope_type']!r}, only 'axial'")
    config = VisionConfig(
        hidden_size=reader.get("hidden_size"),
        intermediate_size=reader.get("intermediate_size"),
        num_layers=reader.get("depth"),
        num_heads=reader.get("num_heads"),
        in_channels=reader.get("in_channels", default=3),
        patch_size=config_reader.single(
            reader.get("patch_size", default=16), f"{where}.patch_size"
        ),
        temporal_patch_size=config_reader.single(
            reader.get("temporal_patch_size", default=2), f"{where}.temporal_patch_size"
        ),
        spatial_merge_size=reader.get("spatial_merge_size", default=2),
        out_hidden_size=reader.get("out_hidden_size"),
        num_position_embeddings=reader.get("num_position_embeddings", default=2304),
        rope_theta=float(rope.get("rope_theta", 10_000.0)),
        deepstack_layers=tuple(reader.get("deepstack_visual_indexes", default=(8, 16, 24))),
    )
    reader.finish()
    if config.position_side**2 != config.num_position_embeddings:
        raise ValueError(f"{where}.num_position_embeddings must be a square")
    if config.hidden_size % (4 * config.num_heads):
        raise ValueError(f"{where}.hidden_size must be a multiple of 4 x num_heads")
    if any(not 0 <= i < config.num_layers for i in config.deepstack_layers) or sorted(
        set(config.deepstack_layers)
    ) != list(config.deepstack_layers):
        raise ValueError(f"{where}.deepstack_visual_indexes must increase, below depth")
    return config


def from_hf(values: Mapping[str, Any]) -> Qwen3VLConfig:
    """Read a Hugging Face `config.json` of Qwen3-VL, Qwen3-VL-MoE or text-only Qwen3.

    Raises ValueError naming the key and its value for every setting that is not implemented here,
    unknown keys included, so that no checkpoint is run as something that it is not.

    Source: transformers models/qwen3_vl{,_moe}/configuration_*.py, 4.57 and 5.23; the top level's
    `tie_word_embeddings` decides where the text part has another (modeling_utils.py tie_weights).
    """
    apart, values = kinds.split(values)
    model_type = values.get("model_type")
    if model_type == "qwen3":
        text = _text(values, "config", tied=None, router=apart.router)
        return Qwen3VLConfig(
            text=text,
            vision=None,
            image_token_id=-1,
            video_token_id=-1,
            vision_start_token_id=-1,
            vision_end_token_id=-1,
            initializer_range=float(values.get("initializer_range", 0.02)),
            score_heads=apart.heads,
        )
    if model_type not in ("qwen3_vl", "qwen3_vl_moe"):
        raise ValueError(
            f"config.model_type = {model_type!r}: only qwen3_vl, qwen3_vl_moe and qwen3 are known"
        )
    reader = config_reader.Reader(values, "config")
    text_values = reader.get("text_config")
    config = Qwen3VLConfig(
        text=_text(
            text_values,
            "config.text_config",
            tied=values.get("tie_word_embeddings", False),
            router=apart.router,
        ),
        vision=_vision(reader.get("vision_config"), "config.vision_config"),
        image_token_id=reader.get("image_token_id"),
        video_token_id=reader.get("video_token_id"),
        vision_start_token_id=reader.get("vision_start_token_id"),
        vision_end_token_id=reader.get("vision_end_token_id"),
        initializer_range=float(text_values.get("initializer_range", 0.02)),
        score_heads=apart.heads,
    )
    reader.seen.add("tie_word_embeddings")
    reader.finish()
    if (config.text.moe is not None) != (model_type == "qwen3_vl_moe"):
        raise ValueError(f"config.model_type = {model_type} contradicts text_config.num_experts")
    if config.vision.out_hidden_size != config.text.hidden_size:
        raise ValueError(
            f"config.vision_config.out_hidden_size = {config.vision.out_hidden_size} must equal "
            f"text_config.hidden_size = {config.text.hidden_size}"
        )
    if len(config.vision.deepstack_layers) > config.text.num_layers:
        raise ValueError("vision_config.deepstack_visual_indexes has more levels than layers")
    return config
