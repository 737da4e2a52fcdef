"""Responses of a policy beside a teacher's, for the discriminator's warm-up.

    python -m prism_jax pairs --config=configs/pairs.py:4b --workdir=runs/pairs \
        --config.policy.folder=runs/sft --config.prompts.path=rl_training_data_5.9k.parquet

Sizes: tiny (tests), demo (2 million parameters, 2 CPU cores), small (107 million, one GPU), 4b and
8b (one GPU of 80 GB each; set mesh.axes.tensor for more). Options:

  equal   keep a response of which one segment, caption or cot, equals the teacher's; that segment
          teaches the discriminator nothing, but the other does

The published 120K pairs came with no word on how they were sampled; temperature, top-p and lengths
here are those of alignment, whose responses the discriminator will meet.
Source: PRISM scripts/train/experiment/qwen3_vl_prism.sh.
"""

from ml_collections import ConfigDict

from configs import common, sampled

# temperature: as in alignment.
_SIZES = common.table("""
         max_tokens  batch_responses  temperature
  tiny   16          4                1.0
  demo   112         128              0.7
  small  512         256              0.7
  4b     6144        64               1.0
  8b     6144        64               1.0
""")


def get_config(arg: str = "4b") -> ConfigDict:
    """Return the configuration of `SIZE,OPTION,…`."""
    size, options = common.arguments(arg, ("equal",), _SIZES)
    config = ConfigDict()
    config.seed = 0
    config.policy = sampled.policy(size)
    config.prompts = sampled.prompts(size)
    config.mesh = sampled.mesh()
    config.sampling = sampled.sampling(top_p=None)
    config.sampling.temperature = _SIZES[size].temperature
    config.num_responses = 1
    config.max_tokens = _SIZES[size].max_tokens
    config.batch_responses = _SIZES[size].batch_responses
    config.has_equal_segments = "equal" in options
    config.line_every_steps = 1
    return config
