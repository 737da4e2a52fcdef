"""The evaluation of align and rlvr on held-out prompts, off until a path is given."""

from ml_collections import ConfigDict, config_dict


def held_out() -> ConfigDict:
    """Return no evaluation; see prism_jax/policy/held_out.py.

    --config.held_out.path=FILE --config.held_out.every_steps=20 --config.held_out.patience=5
    """
    return ConfigDict(
        {
            "path": (),
            "every_steps": config_dict.placeholder(int),
            "num_prompts": config_dict.placeholder(int),
            "num_responses": 1,
            "temperature": 0.0,
            "is_best_kept": True,
            "patience": config_dict.placeholder(int),
        }
    )
