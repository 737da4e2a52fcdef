"""Pieces of the stages that train a discriminator; options beyond the released code are off."""

import copy

from ml_collections import ConfigDict, config_dict

from configs import common

VIEWS = ("whole", "both")


def pair_lengths() -> ConfigDict:
    """Return pairs of any lengths, none cut; see prism_jax/discriminator/lengths.py."""
    return ConfigDict(
        {
            "match_ratio": config_dict.placeholder(float),
            "equal_min_tokens": config_dict.placeholder(int),
        }
    )


def lengths() -> ConfigDict:
    """Return the same, without a fitted effect of length and without other pictures."""
    options = pair_lengths()
    options.is_fitted = False
    options.swap_coefficient = config_dict.placeholder(float)
    return options


def steadying() -> ConfigDict:
    """Return no stabiliser; see prism_jax/discriminator/steadying.py."""
    return ConfigDict(
        {
            "gradient_penalty": config_dict.placeholder(float),
            "penalty_noise": config_dict.placeholder(float),
            "ema_decay": config_dict.placeholder(float),
            "replay_prompts": config_dict.placeholder(int),
            "replay_steps": config_dict.placeholder(int),
        }
    )


def discriminator(
    size: str, options: set[str], policy: ConfigDict, *, rows: ConfigDict, peak: float
) -> ConfigDict:
    """Return the section of a discriminator that learns with the policy.

    Args:
      options: of `VIEWS`, text_only and text_trunk.
      policy: section of the policy.
      peak: learning rate.
    """
    is_large = common.is_large(size)
    is_text_only = "text_only" in options
    has_tower = "text_trunk" not in options
    section = ConfigDict(
        {
            "folder": "",
            "init": policy.init,
            # A copy: with the policy's struct an override of either would change both.
            "sizes": copy.deepcopy(policy.sizes),
            "remat": "full" if is_large else "none",
            "sees_images": has_tower and not is_text_only,
            "min_pixels": config_dict.placeholder(int),
            # As in warm-up. The released run shows it pictures of any size here, but of at most
            # 560 x 560 pixels there.
            "max_pixels": 560 * 560 if is_large else config_dict.placeholder(int),
            "view": "caption_cot",
            "scored_token": "last",
            "teacher_max_tokens": config_dict.placeholder(int),
            "positions": "mrope",
            "score_clip": 10.0,
            "length_beta": (),
            "regulariser": 1e-3,
            # The released update drops the router's term of the warm-up.
            "router": 0.0,
            "score_dtype": "float32",
            "head_dropout": 0.0,
            "microbatch_pairs": config_dict.placeholder(int),
            "all_invalid": "none",
            "rows": rows,
            "optim": common.optim(peak=peak),
            "lengths": lengths(),
            "steadying": steadying(),
        }
    )
    for view in VIEWS:
        if view in options:
            section.view = view
    if not has_tower:
        # It has no bias.
        section.optim.no_decay = (".*/scale",)
    if is_text_only:
        section.optim.frozen = ("trunk/vision/.*",)
    return section
