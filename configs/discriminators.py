"""Pieces of the stages that train a discriminator: options beyond the released code, all off."""

from ml_collections import ConfigDict, config_dict


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
