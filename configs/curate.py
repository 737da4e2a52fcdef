"""Choose prompts by difficulty, and have a teacher answer the hard ones.

    export TEACHER_API_KEY=…
    python -m prism_jax curate --config=configs/curate.py:4b --workdir=runs/curated \
        --config.difficulty.policy.folder=runs/sft --config.difficulty.prompts.path=data.parquet \
        --config.teacher.endpoint.base_url=https://… --config.teacher.endpoint.model=… \
        --config.teacher.prices.input_million=0.5 --config.teacher.prices.output_million=3 \
        --config.teacher.budget=100

Sizes are the policy's: tiny (tests), demo (2 million parameters, 2 CPU cores), small (107 million,
one GPU), 4b and 8b (one GPU of 80 GB each; set mesh.axes.tensor for more). Options:

  difficulty   the first step alone
  teacher      the second step alone, any machine: --config.teacher.prompts.path=… names the prompts

The paper filters RL prompts by pass rate, and its teacher (Gemini 3 Flash) answers the
unsolved ones, with dense captions and step-by-step reasoning. Number of samples, thresholds and the
wording of the instruction were not published; those here are ours. The policy's sampling is that
of alignment and RLVR.
"""

from ml_collections import ConfigDict, config_dict

from configs import common, sampled

_SIZES = common.table("""
         num_samples  max_tokens  batch_responses
  tiny   2            16          4
  demo   8            256         64
  small  8            512         256
  4b     8            8192        64
  8b     8            8192        64
""")
_INSTRUCTION = (
    "In the caption, write down everything in the image that the question could need: every "
    "object, label, number and relation, exactly as shown. Reason from what the caption says, one "
    "small step at a time, and check the result. Put the final answer alone, without words around "
    "it, into the answer. Write nothing outside of the three parts, and each tag exactly once."
)


def get_config(arg: str = "4b") -> ConfigDict:
    """Return the configuration of `SIZE,OPTION`."""
    size, options = common.arguments(arg, ("difficulty", "teacher"), _SIZES)
    has_both = len(options) != 1
    config = ConfigDict()
    config.difficulty = config_dict.placeholder(ConfigDict)
    config.teacher = config_dict.placeholder(ConfigDict)
    if has_both or "difficulty" in options:
        config.difficulty = _difficulty(size)
    if has_both or "teacher" in options:
        config.teacher = _teacher()
        if not has_both:
            config.teacher.prompts = ConfigDict(
                {"path": "", "image_root": config_dict.placeholder(str)}
            )
    return config


def _difficulty(size: str) -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.policy = sampled.policy(size)
    config.prompts = sampled.prompts(size)
    config.mesh = sampled.mesh()
    config.sampling = sampled.sampling(top_p=None)
    row = _SIZES[size]
    config.num_samples = row.num_samples
    config.max_tokens = row.max_tokens
    config.batch_responses = row.batch_responses
    config.judge = _judge()
    config.judge.rule = "strict"
    # Kept for RL: more often right than never, less often than always.
    config.rl_above = 0.0
    config.rl_below = 1.0
    config.hard_at_most = 0.0
    config.line_every_steps = 1
    return config


def _teacher() -> ConfigDict:
    config = ConfigDict()
    config.prompts = config_dict.placeholder(ConfigDict)
    config.rows_cache_dir = config_dict.placeholder(str)
    config.max_rows = config_dict.placeholder(int)
    config.max_bad_rows = 0
    config.limit_image_pixels = 60_000_000
    config.endpoint = ConfigDict(
        {
            "base_url": "",
            "model": "",
            "api_key_env": "TEACHER_API_KEY",
            "num_concurrent": 8,
            "deadline_seconds": 300.0,
            "max_attempts": 6,
            "backoff_seconds": 2.0,
            "max_wait_seconds": 120.0,
        }
    )
    config.sampling = ConfigDict(
        {
            "max_tokens": 8192,
            "max_tokens_field": "max_tokens",
            "temperature": 1.0,
            "top_p": config_dict.placeholder(float),
            "reasoning_effort": config_dict.placeholder(str),
        }
    )
    config.instruction = _INSTRUCTION
    config.num_tries = 2
    config.max_failed_in_row = 20
    config.prices = ConfigDict({"input_million": 0.0, "output_million": 0.0})
    config.budget = config_dict.placeholder(float)
    config.cache_dir = config_dict.placeholder(str)
    config.judge = _judge()
    config.line_every_steps = 100
    return config


def _judge() -> ConfigDict:
    """Return the limits of judging, as in the other stages."""
    rewards = sampled.rewards(is_official=False)
    names = ("num_workers", "deadline_seconds", "memory_bytes")
    return ConfigDict({name: rewards[name] for name in names})
