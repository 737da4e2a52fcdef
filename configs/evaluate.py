"""Accuracy of a policy on a test split, with its 95 % interval.

    python -m prism_jax evaluate --config=configs/evaluate.py:4b --workdir=runs/sft_test \
        --config.policy.folder=runs/sft --config.prompts.path=test.parquet

Sizes: tiny (tests), demo (2 million parameters, 2 CPU cores), small (107 million, one GPU), 4b and
8b (one GPU of 80 GB each; set mesh.axes.tensor for more). Options:

  samples   ask each prompt 4 times at temperature 1 besides greedily: the mean of 4 and how often
            one of them is right
  official  as published: one sample at temperature 1 and top-p 0.7, the released judge. Its judge
            by a large language model, which follows there when rules say wrong, is not built.

Source of `official`: PRISM scripts/eval/eval_qwen3vl.sh.
"""

from ml_collections import ConfigDict

from configs import common, sampled

# max_tokens of 4b, 8b: the limit of RLVR; published evaluations allow 8192 to 49152, by benchmark.
_SIZES = common.table("""
         max_tokens  batch_responses
  tiny   16          4
  demo   112         128
  small  512         256
  4b     8192        64
  8b     8192        64
""")


def get_config(arg: str = "4b") -> ConfigDict:
    """Return the configuration of `SIZE,OPTION,…`."""
    size, options = common.arguments(arg, ("samples", "official"), _SIZES)
    is_official = "official" in options
    config = ConfigDict()
    config.seed = 0
    config.policy = sampled.policy(size)
    config.prompts = sampled.prompts(size)
    config.mesh = sampled.mesh()
    config.has_greedy = not is_official
    config.num_samples = 4 if "samples" in options else 1 if is_official else 0
    config.sampling = sampled.sampling(top_p=0.7 if is_official else None)
    config.max_tokens = _SIZES[size].max_tokens
    config.batch_responses = _SIZES[size].batch_responses
    config.rewards = sampled.rewards(is_official=is_official)
    config.line_every_steps = 1
    return config
