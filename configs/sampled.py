"""Pieces of the commands that sample from a policy: evaluate, pairs, curate."""

from ml_collections import ConfigDict, config_dict

from configs import common

# max_prompt_tokens: source PRISM scripts/train/experiment, max_prompt_length 2048 of all stages
# after SFT.
_SIZES = common.table("""
         dtype       max_prompt_tokens
  tiny   "float32"   512
  demo   "float32"   512
  small  "bfloat16"  1024
  4b     "bfloat16"  2048
  8b     "bfloat16"  2048
""")


def policy(size: str) -> ConfigDict:
    """Return a policy in bfloat16, tiny ones in float32; its folder must be set."""
    return ConfigDict(
        {
            "folder": "",
            # A number, or "best".
            "step": config_dict.placeholder(object),
            "dtype": _SIZES[size].dtype,
            "attention": "auto",
        }
    )


def prompts(size: str) -> ConfigDict:
    """Return all rows of a data set, whose path must be set; a wrong or long row is an error."""
    return ConfigDict(
        {
            "path": "",
            "image_root": config_dict.placeholder(str),
            "cache_dir": config_dict.placeholder(str),
            "max_rows": config_dict.placeholder(int),
            "max_prompt_tokens": _SIZES[size].max_prompt_tokens,
            "overlong": "error",
            "max_bad_rows": 0,
            # Give the bounds of training here.
            "min_pixels": config_dict.placeholder(int),
            "max_pixels": config_dict.placeholder(int),
            "limit_image_pixels": 60_000_000,
        }
    )


def mesh() -> ConfigDict:
    """Return prompts spread over all devices, each with all weights: decoding gathers nothing."""
    mesh = common.mesh()
    mesh.axes.data, mesh.axes.fsdp = -1, 1
    return mesh


def sampling(*, top_p: float | None) -> ConfigDict:
    """Return sampling at temperature 1."""
    return ConfigDict(
        {
            "temperature": 1.0,
            "top_k": config_dict.placeholder(int),
            "top_p": config_dict.placeholder(float) if top_p is None else top_p,
        }
    )


def rewards(*, is_official: bool) -> ConfigDict:
    """Return the judge, the mixture of its rewards, and its limits."""
    return ConfigDict(
        {
            "judge": "official" if is_official else "strict",
            # FILE.py:FUNCTION in place of the judge, see docs/your_own_reward.md.
            "custom": config_dict.placeholder(str),
            # Source: PRISM verl/verl/utils/reward_score/mm_gad_no_llm.py:354-378.
            "accuracy_weight": 0.8,
            "format_weight": 0.2,
            "num_workers": 2,
            "deadline_seconds": 10.0,
            "memory_bytes": 2 << 30,
        }
    )
