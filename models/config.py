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
    deepstack_layers: tuple[int, ...]  # tapped blocks, see `deepstack`

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
    router: kinds.Router  # which experts a token may go to; "segment" needs a discriminator


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
    score_heads: int  # of a discriminator, see `kinds`; a policy has none, whatever the number


def _rope(reader: config_reader.Reader) -> tuple[float, tuple[int, int, int]]:
    """Return theta and the M-RoPE sections from `rope_parameters` (5.x) or `rope_scaling`."""
    where = f"{reader.where}.rope_parameters"
    inner = config_reader.Reader(reader.part("rope_parameters", "rope_scaling", default={}), where)
    for key in ("rope_type", "type"):
        inner.fixed(key, ("default", "mrope"))
    inner.fixed("mrope_interleaved", (True,))
    inner.fixed("partial_rotary_factor", (1.0,))
    reader.seen.add("rope_theta")
    if "rope_theta" in inner.values:
        theta = inner.number("rope_theta")
    elif "rope_theta" in reader.values:
        theta = reader.number("rope_theta")
    else:
        raise ValueError(f"{where}.rope_theta is missing")
    section = config_reader.integers(
        inner.get("mrope_section", default=(24, 20, 20)), f"{where}.mrope_section"
    )
    inner.finish()
    if len(section) != 3:
        raise ValueError(f"{where}.mrope_section = {section} must hold time, height and width")
    return theta, (section[0], section[1], section[2])


def _layer_types(reader: config_reader.Reader, num_layers: int) -> None:
    """Refuse layers of any kind but full attention; the message stays short for many layers."""
    kinds_ = reader.get("layer_types", default=())
    if not isinstance(kinds_, list | tuple) or (
        kinds_ and (len(kinds_) != num_layers or any(k != "full_attention" for k in kinds_))
    ):
        raise ValueError(
            f"{reader.where}.layer_types is not implemented, only 'full_attention' for each of "
            f"the {num_layers} layers is; got {kinds_!r:.80}"
        )


def _text(
    values: Mapping[str, Any], where: str, *, tied: bool | None, router: kinds.Router
) -> TextConfig:
    reader = config_reader.Reader(values, where)
    reader.fixed("hidden_act", ("silu",))
    num_layers = reader.integer("num_hidden_layers", most=config_reader.MAX_LAYERS)
    _layer_types(reader, num_layers)
    hidden_size = reader.integer("hidden_size")
    num_heads = reader.integer("num_attention_heads")
    is_moe = "num_experts" in reader.values or "num_local_experts" in reader.values
    # In a dense model an absent value means 128; null, or an absent value in a mixture, means that
    # it follows from the sizes.
    is_128 = "head_dim" not in values and not is_moe
    head_dim = reader.integer("head_dim", default=128 if is_128 else hidden_size // num_heads)
    theta, section = _rope(reader)
    moe = None
    if is_moe:
        moe = MoEConfig(
            num_experts=reader.integer("num_experts", "num_local_experts"),
            num_experts_per_token=reader.integer("num_experts_per_tok"),
            intermediate_size=reader.integer("moe_intermediate_size"),
            router=router,
        )
    elif router != "token":
        raise ValueError(f"config.{kinds.KEY}.router = {router!r:.80} needs a mixture of experts")
    is_tied = reader.flag("tie_word_embeddings", default=False)
    config = TextConfig(
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=reader.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=reader.integer("num_key_value_heads", default=num_heads),
        head_dim=head_dim,
        rms_norm_eps=reader.number("rms_norm_eps"),
        rope_theta=theta,
        mrope_section=section,
        tie_word_embeddings=is_tied if tied is None else tied,
        moe=moe,
    )
    reader.finish()
    if config.num_heads % config.num_kv_heads:
        raise ValueError(f"{where}.num_attention_heads must be a multiple of num_key_value_heads")
    if head_dim % 2:
        raise ValueError(f"{where}.head_dim must be even, got {head_dim}")
    if moe is not None and moe.num_experts_per_token > moe.num_experts:
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
    rope = config_reader.Reader(
        reader.part("rope_parameters", default={}), f"{where}.rope_parameters"
    )
    rope.fixed("rope_type", ("axial",))
    config = VisionConfig(
        hidden_size=reader.integer("hidden_size"),
        intermediate_size=reader.integer("intermediate_size"),
        num_layers=reader.integer("depth", most=config_reader.MAX_LAYERS),
        num_heads=reader.integer("num_heads"),
        in_channels=reader.integer("in_channels", default=3),
        patch_size=config_reader.single(
            reader.get("patch_size", default=16), f"{where}.patch_size"
        ),
        temporal_patch_size=config_reader.single(
            reader.get("temporal_patch_size", default=2), f"{where}.temporal_patch_size"
        ),
        spatial_merge_size=reader.integer("spatial_merge_size", default=2),
        out_hidden_size=reader.integer("out_hidden_size"),
        num_position_embeddings=reader.integer("num_position_embeddings", default=2304),
        rope_theta=rope.number("rope_theta", default=10_000.0),
        deepstack_layers=config_reader.integers(
            reader.get("deepstack_visual_indexes", default=(8, 16, 24)),
            f"{where}.deepstack_visual_indexes",
        ),
    )
    reader.finish()
    if config.position_side**2 != config.num_position_embeddings:
        raise ValueError(f"{where}.num_position_embeddings must be a square")
    if config.hidden_size % (4 * config.num_heads):
        raise ValueError(f"{where}.hidden_size must be a multiple of 4 x num_heads")
    if any(i >= config.num_layers for i in config.deepstack_layers) or sorted(
        set(config.deepstack_layers)
    ) != list(config.deepstack_layers):
        raise ValueError(f"{where}.deepstack_visual_indexes must increase, below depth")
    return config


def _initializer_range(values: Mapping[str, Any], where: str) -> float:
    value = values.get("initializer_range")
    if value is None:
        return 0.02
    return (
        value
        if type(value) is float and value == 0
        else config_reader.number(value, f"{where}.initializer_range")
    )


def from_hf(values: Mapping[str, Any]) -> Qwen3VLConfig:
    """Read a Hugging Face `config.json` of Qwen3-VL, Qwen3-VL-MoE or text-only Qwen3.

    Raises ValueError naming the key and its value for each setting that is not implemented here,
    unknown keys included, so that no checkpoint runs with wrong settings.

    Source: transformers models/qwen3_vl{,_moe}/configuration_*.py, 4.57 and 5.23; the top level's
    `tie_word_embeddings` overrides that of the text part (modeling_utils.py tie_weights).
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
            initializer_range=_initializer_range(values, "config"),
            score_heads=apart.heads,
        )
    if model_type not in ("qwen3_vl", "qwen3_vl_moe"):
        raise ValueError(
            f"config.model_type = {model_type!r:.80}: only qwen3_vl, qwen3_vl_moe and qwen3 are "
            "known"
        )
    reader = config_reader.Reader(values, "config")
    text_values = reader.part("text_config")
    config = Qwen3VLConfig(
        text=_text(
            text_values,
            "config.text_config",
            tied=reader.flag("tie_word_embeddings", default=False),
            router=apart.router,
        ),
        vision=_vision(reader.part("vision_config"), "config.vision_config"),
        image_token_id=reader.integer("image_token_id", least=0),
        video_token_id=reader.integer("video_token_id", least=0),
        vision_start_token_id=reader.integer("vision_start_token_id", least=0),
        vision_end_token_id=reader.integer("vision_end_token_id", least=0),
        initializer_range=_initializer_range(text_values, "config.text_config"),
        score_heads=apart.heads,
    )
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
