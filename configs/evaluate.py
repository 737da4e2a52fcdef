"""Accuracy of a policy on a test split, with its 95 % interval.

    python -m prism_jax evaluate --config=configs/evaluate.py:4b --workdir=runs/sft_test \
        --config.policy.folder=runs/sft --config.prompts.path=test.parquet

Sizes: tiny (tests), demo (2 million parameters, 2 CPU cores), small (107 million, one GPU), 4b and
8b (one GPU of 80 GB each; set mesh.axes.tensor for more). Options:

  samples   ask each prompt 4 times at temperature 1 besides greedily: the mean of 4 and how often
            one of them is right
  official  as published: one sample at temperature 1 and top-p 0.7, the released judge
  benchmarks  responses as long as each benchmark allows, prompts of up to 16384 tokens
  llm_judge   a model also judges what a benchmark's rules call wrong, as published; give
              --config.llm_judge.endpoint.base_url=… and .model=…

`configs/evaluate.py:4b,official,benchmarks,llm_judge` is the published evaluation, whose judge is
Qwen2.5-32B-Instruct; see docs/benchmarks.md.

Source of `official` and of the judge: PRISM scripts/eval/eval_qwen3vl.sh.
"""

from ml_collections import ConfigDict, config_dict

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
    names = ("samples", "official", "benchmarks", "llm_judge")
    size, options = common.arguments(arg, names, _SIZES)
    is_official = "official" in options
    config = ConfigDict()
    config.seed = 0
    config.policy = sampled.policy(size)
    config.prompts = sampled.prompts(size)
    config.mesh = sampled.mesh()
    config.has_greedy = not is_official
    config.num_samples = 4 if "samples" in options else 1 if is_official else 0
    config.sampling = sampled.sampling(top_p=0.7 if is_official else None)
    config.max_tokens = config_dict.placeholder(int)
    config.max_tokens = _SIZES[size].max_tokens
    config.batch_responses = _SIZES[size].batch_responses
    config.rewards = sampled.rewards(is_official=is_official)
    config.llm_judge = config_dict.placeholder(ConfigDict)
    if "llm_judge" in options:
        config.llm_judge = _llm_judge()
    if "benchmarks" in options:
        config.max_tokens = None
        # The largest picture of HallusionBench is 5291 x 4536 pixels; max_pixels scales it.
        config.prompts.max_prompt_tokens = 16384
    config.line_every_steps = 1
    return config


def _llm_judge() -> ConfigDict:
    """Return a judge behind an endpoint that is asked greedily."""
    texts = {name: config_dict.placeholder(str) for name in ("right", "clear", "extract")}
    return ConfigDict(
        {
            "endpoint": {
                "base_url": "",
                "model": "",
                "api_key_env": "",
                "num_concurrent": 16,
                "deadline_seconds": 120.0,
                "max_attempts": 6,
                "backoff_seconds": 2.0,
                "max_wait_seconds": 120.0,
            },
            "sampling": {
                "max_tokens": 256,
                "max_tokens_field": "max_tokens",
                "temperature": 0.0,
                "top_p": config_dict.placeholder(float),
                "reasoning_effort": config_dict.placeholder(str),
            },
            "prompts": texts,
        }
    )
