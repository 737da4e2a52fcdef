"""Pieces of the stages that learn from their own samples: align, rlvr."""

from ml_collections import ConfigDict, config_dict

from configs import sampled


def rollout(size: str, *, num_prompts: int, num_responses: int, max_tokens: int) -> ConfigDict:
    """Return drawing from the whole vocabulary, at temperature 1.

    Models of 2 or 107 million parameters mix up their words at 1: demo and small draw at 0.7.
    Source: PRISM scripts/train/experiment: temperature 1.0, top_p 1.0 in every stage.
    """
    return ConfigDict(
        {
            "num_prompts": num_prompts,
            "num_responses": num_responses,
            "batch_responses": config_dict.placeholder(int),
            "tensor": config_dict.placeholder(int),
            "max_response_tokens": max_tokens,
            "temperature": 0.7 if size in ("demo", "small") else 1.0,
            "top_k": config_dict.placeholder(int),
            "top_p": config_dict.placeholder(float),
            "chunk_tokens": 64,
            "dump_every_steps": {"tiny": 1, "demo": 10}.get(size, 25),
        }
    )


def prompts(size: str) -> ConfigDict:
    """Return every row of the data sets that are to be named; a wrong or too long one is an error.

    Several data sets: --config.prompts.path=A --config.prompts.path=B, every row once an epoch;
    with --config.prompts.weights="(0.7, 0.3)" an epoch is shared out so.
    """
    chosen = sampled.prompts(size)
    del chosen.path
    chosen.path, chosen.weights = (), ()
    return chosen


def rows(row_tokens: int, row_sequences: int, num_rows: int) -> ConfigDict:
    """Return packed rows; their number follows from the largest prompts and responses."""
    return ConfigDict(
        {"row_tokens": row_tokens, "row_sequences": row_sequences, "num_rows": num_rows}
    )


def weighing(*, aggregation: str) -> ConfigDict:
    """Return how tokens are weighed, without a correction for the sampler's other log-probs."""
    return ConfigDict(
        {
            "aggregation": aggregation,
            "norm_tokens": config_dict.placeholder(int),
            "sampler_weights": "off",
            "sampler_level": "token",
            "sampler_low": config_dict.placeholder(float),
            "sampler_high": config_dict.placeholder(float),
        }
    )


def algorithm(*, aggregation: str) -> ConfigDict:
    """Return the clipped loss.

    While one update follows each rollout, the ratio is 1 and the clip never binds, as in every
    released run. Source: PRISM verl/verl/trainer/config/actor/actor.yaml: clip_ratio 0.2.
    """
    chosen = weighing(aggregation=aggregation)
    chosen.loss = "ppo"
    chosen.clip_low = chosen.clip_high = 0.2
    chosen.dual_clip = config_dict.placeholder(float)
    return chosen
