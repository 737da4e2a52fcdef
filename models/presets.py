"""Sizes of the published models.

Source: the `config.json` of Qwen/Qwen3-VL-{2B,4B,8B,32B}-Instruct and
Qwen3-VL-{30B-A3B,235B-A22B}-Instruct; the discriminator is PRISM moe/create_vl_moe.py on the 2B.
"""

import dataclasses

from models.config import MoEConfig, Qwen3VLConfig, TextConfig, VisionConfig


def _small_tower(out_hidden_size: int) -> VisionConfig:
    return VisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_layers=24,
        num_heads=16,
        in_channels=3,
        patch_size=16,
        temporal_patch_size=2,
        spatial_merge_size=2,
        out_hidden_size=out_hidden_size,
        num_position_embeddings=2304,
        rope_theta=10_000.0,
        deepstack_layers=(5, 11, 17),
    )


def _large_tower(out_hidden_size: int) -> VisionConfig:
    return dataclasses.replace(
        _small_tower(out_hidden_size),
        hidden_size=1152,
        intermediate_size=4304,
        num_layers=27,
        deepstack_layers=(8, 16, 24),
    )


def _model(
    vision: VisionConfig,
    *,
    mlp: int,
    num_layers: int,
    heads: tuple[int, int],  # query, kv
    tied: bool,
    moe: MoEConfig | None,
) -> Qwen3VLConfig:
    return Qwen3VLConfig(
        text=TextConfig(
            vocab_size=151_936,
            hidden_size=vision.out_hidden_size,
            intermediate_size=mlp,
            num_layers=num_layers,
            num_heads=heads[0],
            num_kv_heads=heads[1],
            head_dim=128,
            rms_norm_eps=1e-6,
            rope_theta=5_000_000.0,
            mrope_section=(24, 20, 20),
            tie_word_embeddings=tied,
            moe=moe,
        ),
        vision=vision,
        image_token_id=151_655,
        video_token_id=151_656,
        vision_start_token_id=151_652,
        vision_end_token_id=151_653,
        initializer_range=0.02,
        score_heads=1,
    )


def upcycled(
    dense: Qwen3VLConfig, *, num_experts: int, num_experts_per_token: int
) -> Qwen3VLConfig:
    """Return the sizes of a dense model with each MLP replaced by `num_experts` experts."""
    moe = MoEConfig(
        num_experts=num_experts,
        num_experts_per_token=num_experts_per_token,
        intermediate_size=dense.text.intermediate_size,
        router="token",
    )
    return dataclasses.replace(dense, text=dataclasses.replace(dense.text, moe=moe))


QWEN3_VL_2B = _model(
    _small_tower(2048), mlp=6144, num_layers=28, heads=(16, 8), tied=True, moe=None
)
QWEN3_VL_4B = _model(
    _small_tower(2560), mlp=9728, num_layers=36, heads=(32, 8), tied=True, moe=None
)
QWEN3_VL_8B = _model(
    _large_tower(4096), mlp=12_288, num_layers=36, heads=(32, 8), tied=False, moe=None
)
QWEN3_VL_32B = _model(
    _large_tower(5120), mlp=25_600, num_layers=64, heads=(64, 8), tied=False, moe=None
)
QWEN3_VL_30B_A3B = _model(
    _large_tower(2048),
    mlp=6144,
    num_layers=48,
    heads=(32, 4),
    tied=False,
    moe=MoEConfig(num_experts=128, num_experts_per_token=8, intermediate_size=768, router="token"),
)
QWEN3_VL_235B_A22B = _model(
    _large_tower(4096),
    mlp=12_288,
    num_layers=94,
    heads=(64, 4),
    tied=False,
    moe=MoEConfig(num_experts=128, num_experts_per_token=8, intermediate_size=1536, router="token"),
)
DISCRIMINATOR_2B_MOE4X = upcycled(QWEN3_VL_2B, num_experts=4, num_experts_per_token=2)

# A model for tests on a CPU, with all parts of the large models.
TINY = dataclasses.replace(
    QWEN3_VL_2B,
    text=dataclasses.replace(
        QWEN3_VL_2B.text,
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        mrope_section=(4, 2, 2),
    ),
    vision=dataclasses.replace(
        QWEN3_VL_2B.vision,
        hidden_size=64,
        intermediate_size=128,
        num_layers=4,
        num_heads=4,
        out_hidden_size=64,
        num_position_embeddings=64,
        deepstack_layers=(0, 1, 2),
    ),
)
