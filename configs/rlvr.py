"""Stage 3, RL with verifiable rewards: GRPO.

    python -m prism_jax rlvr --config=configs/rlvr.py:4b --workdir=runs/rlvr \
        --config.model.folder=runs/align \
        --config.prompts.path=rl_training_data_filtered_2k.parquet

Sizes: tiny (tests), demo (2 million parameters, 2 CPU cores), small (107 million, one GPU), 4b and
8b (8 devices of 80 GB, or a v5p-16 with mesh.axes as they are). Options:

  new   tiny, demo, small: a new model; model.folder then names its tokenizer

4b and 8b: not run here. Source: PRISM scripts/train/experiment/qwen3_vl_grpo_after_prism*.sh and
README §6. Where they disagree: the README names 8 GPUs, the scripts use 4; the 8B script reads a
`rl_training_data_10k.parquet` that is not published; the README speaks of a KL term "by
algorithm", every script sets use_kl_loss=False, so there is none.
"""

from ml_collections import ConfigDict

from configs import common, sampled, sampled_training


def get_config(arg: str = "4b") -> ConfigDict:
    """Return the configuration of `SIZE,OPTION,…`."""
    size, options = common.arguments(arg, ("new",))
    is_large = size in ("4b", "8b")
    if is_large and options:
        raise ValueError(f"size {size} has no option {', '.join(options)}")
    config = ConfigDict()
    config.seed = 0
    config.model = common.new_model(size) if "new" in options else common.model(size)
    config.prompts = sampled.prompts(size)
    if is_large:
        # Source: filter_overlong_prompts; every row that is left out is named.
        config.prompts.overlong = "filter"
    prompts, responses, tokens = {
        "tiny": (2, 2, 16),
        "demo": (16, 8, 96),
        "small": (32, 8, 320),
    }.get(size, (32, 16, 8192))
    config.rollout = sampled_training.rollout(
        size, num_prompts=prompts, num_responses=responses, max_tokens=tokens
    )
    config.rewards = sampled.rewards(is_official=False)
    # Source: PRISM verl/verl/trainer/ppo/core_algos.py compute_grpo_outcome_advantage: eps 1e-6.
    config.advantage = ConfigDict({"kind": "grpo", "eps": 1e-6})
    # Source: loss_agg_mode token-mean, of the whole batch here.
    config.algorithm = sampled_training.algorithm(aggregation="token-mean")
    config.rows = sampled_training.rows(
        *{"tiny": (256, 2, 2), "demo": (256, 2, 8), "small": (1024, 4, 8)}.get(
            size, (10_240, 16, 8)
        )
    )
    config.train = ConfigDict(
        {
            "num_steps": {"tiny": 2, "demo": 100, "small": 200}.get(size, 1500),
            "head_chunk_tokens": 1024 if is_large else 2048,
            "has_entropy": True,
            "num_threads": 2,
            "max_skipped_in_row": 3,
        }
    )
    config.optim = common.optim(peak={"tiny": 1e-3, "demo": 3e-4, "small": 3e-5}.get(size, 1e-6))
    config.mesh = common.mesh()
    config.checkpoint = common.checkpoint(every_steps={"tiny": 1, "demo": 20}.get(size, 50))
    config.resume = common.resume()
    config.log = common.log(every_steps={"tiny": 1, "demo": 10}.get(size, 1))
    return config
