"""Pieces of the stages that learn from samples of the policy: align, rlvr."""

from ml_collections import ConfigDict, config_dict

from configs import common, sampled

# Models of 2 or 107 million parameters mix up their words at temperature 1.
_SIZES = common.table("""
         temperature  dump_every
  tiny   1.0          1
  demo   0.7          10
  small  0.7          25
  4b     1.0          25
  8b     1.0          25
""")


def rollout(size: str, *, num_prompts: int, num_responses: int, max_tokens: int) -> ConfigDict:
    """Return sampling from the whole vocabulary.

    Source: PRISM scripts/train/experiment: temperature 1.0, top_p 1.0 in every stage.
    """
    return ConfigDict(
        {
            "num_prompts": num_prompts,
            "num_responses": num_responses,
            "batch_responses": config_dict.placeholder(int),
            "tensor": config_dict.placeholder(int),
            "max_response_tokens": max_tokens,
            "temperature": _SIZES[size].temperature,
            "top_k": config_dict.placeholder(int),
            "top_p": config_dict.placeholder(float),
            "is_cut_allowed": False,
            "chunk_tokens": 64,
            "dump_every_steps": _SIZES[size].dump_every,
        }
    )


def prompts(size: str) -> ConfigDict:
    """Return all rows of the data sets, whose paths must be set; a wrong or long row is an error.

    Several data sets: --config.prompts.path=A --config.prompts.path=B, each row once an epoch;
    --config.prompts.weights="(0.7, 0.3)" shares out an epoch by weight.
    """
    prompts = sampled.prompts(size)
    del prompts.path
    prompts.path, prompts.weights = (), ()
    return prompts


def weighing(*, aggregation: str) -> ConfigDict:
    """Return the weights of tokens, without a correction for the sampler's log-probs."""
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
    loss = weighing(aggregation=aggregation)
    loss.loss = "ppo"
    loss.clip_low = loss.clip_high = 0.2
    loss.dual_clip = config_dict.placeholder(float)
    return loss


def distill() -> ConfigDict:
    """Return no open teacher; see prism_jax/policy/distill.py and teaching.py.

    --config.distill.folder=TEACHER --config.distill.kind=reverse --config.distill.coefficient=1.0
    """
    return ConfigDict(
        {
            "folder": config_dict.placeholder(str),
            "kind": "k1",
            "teacher_share": config_dict.placeholder(float),
            "coefficient": config_dict.placeholder(float),
            "end_coefficient": config_dict.placeholder(float),
            "decay_steps": config_dict.placeholder(int),
            "has_reward": True,
        }
    )
