"""Stage 3, RL with verifiable rewards.

    python -m prism_jax rlvr --config=configs/rlvr.py:4b,dapo --workdir=runs/rlvr \
        --config.model.folder=runs/align \
        --config.prompts.path=rl_training_data_filtered_2k.parquet

Sizes: tiny (tests), demo (2 million parameters, 2 CPU cores), small (107 million, one GPU), 4b and
8b (1 to 256 devices; docs/fits.md names those that are large enough), 2b_one_gpu and 4b_one_gpu
(one GPU of 80 GB). Options, at most one algorithm:

  grpo         rewards over mean and deviation of their group, clipped loss (without any option)
  dapo         clip-higher, dual clip, dynamic sampling, overlong penalty
  gspo         one ratio a response
  dr_grpo      no deviation, constant length
  cispo        the clipped ratio is a constant weight
  rloo         against the mean of the others, no ratio
  reinforce++  returns whitened over the batch, no groups
  official     the released run of grpo, dapo or gspo, see `_official`
  adversary    a discriminator's advantages beside those of the reward, which fall to 0 over the
               first half of the run; any algorithm. Prompts need a teacher; see `_adversary`
  new          tiny, demo, small: a new model; model.folder then names its tokenizer

Every other choice is a field. Several updates of a rollout, a KL term in the loss or the reward,
and weights that correct for the sampler's log-probs are off, as in every released run; examples:

    --config.train.num_minibatches=4 --config.train.num_epochs=2
    --config.reference.loss_coefficient=0.001
    --config.reference.reward_coefficient=0.001 --config.reference.reward_target=0.1 \
        --config.reference.reward_horizon=10000.0
    --config.algorithm.sampler_weights=truncate --config.algorithm.sampler_high=2.0
    --config.rewards.custom=FILE.py:FUNCTION (docs/your_own_reward.md)

4b and 8b: not run here. Source: PRISM scripts/train/experiment/qwen3_vl_*_after_prism*.sh and
README §6. Where they disagree: the README names 8 GPUs, the scripts use 4; the 8B script reads a
`rl_training_data_10k.parquet` that is not published; the README speaks of a KL term "by
algorithm", every script sets use_kl_loss=False, so there is none; the README has weight decay 0.01
and no warm-up, which `official` takes from the scripts instead.
"""

from ml_collections import ConfigDict, config_dict

from configs import common, discriminators, sampled, sampled_training
from configs import held_out as held_out_config

_SIZES = common.table("""
         num_prompts  num_responses  max_response_tokens  num_steps  peak  save_every  log_every
  tiny   2            2              16                   2          1e-3  1           1
  demo   12           8              96                   40         2e-5  20          10
  small  32           8              320                  60         1e-5  50          1
  4b     32           16             8192                 1500       1e-6  50          1
  8b     32           16             8192                 1500       1e-6  50          1
""")
_ROWS = common.table("""
         row_tokens  row_sequences  num_rows  has_shared_prompts
  tiny   256         2              2         False
  demo   384         2              8         False
  small  1024        4              8         False
  4b     10240       8              -1        True
  8b     10240       8              -1        True
""")


# Of a discriminator, as in configs/align.py.
_PEAKS = {"tiny": 1e-3, "demo": 2e-4, "small": 2e-5, "4b": 1e-6, "8b": 1e-6}


def get_config(arg: str = "4b") -> ConfigDict:
    """Return the configuration of `SIZE,OPTION,…`."""
    arg, one_gpu = common.split_one_gpu(arg)
    config = _config(arg)
    if one_gpu is not None:
        _for_one_gpu(one_gpu, config)
    return config


def _for_one_gpu(size: str, config: ConfigDict) -> None:
    """Fit one GPU: of 4b weights and moments in bfloat16, 26.6 GB.

    The gradients and their float32 sum take 26.6 GB more in the update; in the rollout the
    sampler's copy takes 8.9 GB and 16 responses of 10 240 tokens 24.2. A policy of 2B keeps float32
    weights and moments, 25.5 GB, and its gradients add up in place, 8.5 GB.
    """
    config.model.remat = "full"
    if size == "4b_one_gpu":
        config.model.param_dtype = "bfloat16"
        common.narrow(config.optim)
    config.rollout.batch_responses = 16
    config.rows.num_rows = 1


def _config(arg: str) -> ConfigDict:
    """Return a configuration of any other size."""
    size, options = common.arguments(
        arg, ("new", "official", "adversary", "grpo", *_ALGORITHMS), _SIZES
    )
    if common.is_large(size) and "new" in options:
        raise ValueError(f"size {size} has no option new")
    algorithms = sorted(options - {"new", "official", "adversary"})
    if len(algorithms) > 1:
        raise ValueError(f"at most one algorithm must be named, got {', '.join(algorithms)}")
    name = algorithms[0] if algorithms else "grpo"
    config = _base(size)
    if "new" in options:
        config.model = common.new_model(size)
    if name != "grpo":
        _ALGORITHMS[name](config)
    if "official" in options:
        _official(config, name)
    if "adversary" in options:
        _adversary(config, size)
    return config


def _base(size: str) -> ConfigDict:
    """Return GRPO."""
    row, is_large = _SIZES[size], common.is_large(size)
    config = ConfigDict()
    config.seed = 0
    config.model = common.model(size)
    config.prompts = sampled_training.prompts(size)
    if is_large:
        # Source: filter_overlong_prompts; every row that is left out is named.
        config.prompts.overlong = "filter"
    config.rollout = sampled_training.rollout(
        size,
        num_prompts=row.num_prompts,
        num_responses=row.num_responses,
        max_tokens=row.max_response_tokens,
    )
    config.rewards = sampled.rewards(is_official=False)
    # Source: PRISM verl/verl/trainer/ppo/core_algos.py compute_grpo_outcome_advantage: eps 1e-6.
    config.advantage = ConfigDict(
        {
            "kind": "grpo",
            "eps": 1e-6,
            "discount": config_dict.placeholder(float),
            "credit": "response",
        }
    )
    # Source: loss_agg_mode token-mean, of the whole batch here.
    config.algorithm = sampled_training.algorithm(aggregation="token-mean")
    _add_unused_sections(config, is_large=is_large)
    config.rows = ConfigDict(vars(_ROWS[size]))
    config.train = ConfigDict(
        {
            "num_steps": row.num_steps,
            # Source: ppo_mini_batch_size = train_batch_size in every script, ppo_epochs 1.
            "num_minibatches": 1,
            "num_epochs": 1,
            "head_chunk_tokens": 1024 if is_large else 2048,
            "has_entropy": True,
            "num_threads": 2,
            "max_skipped_in_row": 3,
        }
    )
    config.optim = common.optim(peak=row.peak)
    config.held_out = held_out_config.held_out()
    config.mesh = common.mesh()
    config.checkpoint = common.checkpoint(every_steps=row.save_every)
    config.resume = common.resume()
    config.log = common.log(every_steps=row.log_every)
    return config


def _adversary(config: ConfigDict, size: str) -> None:
    """Add a discriminator; `adversary.discriminator.folder` must be set.

    The weights and the updates are those of alignment. That its advantages count as much as the
    reward's at first, and not at all from the middle of the run on, is a choice made here.
    """
    config.adversary = ConfigDict(
        {
            "discriminator": discriminators.discriminator(
                size, set(), config.model, rows=ConfigDict(vars(_ROWS[size])), peak=_PEAKS[size]
            ),
            "coefficient": 1.0,
            "end_coefficient": 0.0,
            "decay_steps": max(1, config.train.num_steps // 2),
            "updates": 1,
            "caption_weight": 0.5,
            "cot_weight": 0.5,
            "response_weight": config_dict.placeholder(float),
            "eps": 1e-6,
            "scale": "group",
            "std_floor": config_dict.placeholder(float),
        }
    )


def _add_unused_sections(config: ConfigDict, *, is_large: bool) -> None:
    """Add the sections that GRPO does not use."""
    config.groups = ConfigDict(
        {
            "keep": "all",
            "generation_prompts": config_dict.placeholder(int),
            "max_generations": config_dict.placeholder(int),
            # The published sizes stop; small data sets may run out of prompts that vary.
            "when_short": "error" if is_large else "train",
            "surplus_steps": config_dict.placeholder(int),
        }
    )
    config.overlong = ConfigDict(
        {
            "buffer_tokens": config_dict.placeholder(int),
            "penalty_factor": config_dict.placeholder(float),
            "is_filtered": False,
        }
    )
    config.adversary = config_dict.placeholder(ConfigDict)
    config.distill = sampled_training.distill()
    config.reference = ConfigDict(
        {
            "folder": config_dict.placeholder(str),
            # Source: kl_loss_type=low_var_kl of the scripts, whose coefficient nothing uses. Its
            # gradient is that of KL(reference, policy); "k2" and "k3+" have that of the usual KL.
            "loss_estimator": "k3",
            "loss_coefficient": config_dict.placeholder(float),
            # Source: PRISM verl/verl/trainer/config/ppo_trainer.yaml: kl_penalty kl.
            "reward_estimator": "k1",
            "reward_coefficient": config_dict.placeholder(float),
            "reward_target": config_dict.placeholder(float),
            "reward_horizon": config_dict.placeholder(float),
        }
    )


def _dapo(config: ConfigDict) -> None:
    """Make it DAPO.

    Source: arXiv 2503.14476 for the method; PRISM qwen3_vl_dapo_after_prism.sh for the numbers:
    clip_ratio 0.2 / 0.28, clip_ratio_c 10, filter_groups on the accuracy, 3 x 32 prompts at a time,
    at most 10 times, overlong_buffer_len 4096 of 8192, penalty 1. The paper keeps the penalty's
    buffer at a fifth of the length. Groups that are left over wait for the next step and learn with
    the log-probs that drew them; the released code throws them away.
    """
    config.algorithm.clip_high = 0.28
    config.algorithm.dual_clip = 10.0
    config.groups.keep = "accuracy"
    config.groups.generation_prompts = 3 * config.rollout.get_ref("num_prompts")
    config.groups.max_generations = 10
    config.groups.surplus_steps = 1
    config.overlong.buffer_tokens = config.rollout.get_ref("max_response_tokens") // 2
    config.overlong.penalty_factor = 1.0


def _gspo(config: ConfigDict) -> None:
    """Make it GSPO.

    Source: arXiv 2507.18071 §5.1; PRISM qwen3_vl_gspo_after_prism.sh.
    """
    config.algorithm.loss = "gspo"
    config.algorithm.clip_low = 3e-4
    config.algorithm.clip_high = 4e-4
    config.algorithm.aggregation = "seq-mean-token-mean"


def _dr_grpo(config: ConfigDict) -> None:
    """Make it Dr. GRPO: neither the deviation nor a response's length divides.

    Source: arXiv 2503.20783 §3.2: the constant is the length limit.
    """
    config.advantage.kind = "dr_grpo"
    config.advantage.eps = None
    config.algorithm.aggregation = "seq-mean-token-sum-norm"
    config.algorithm.norm_tokens = config.rollout.get_ref("max_response_tokens")


def _cispo(config: ConfigDict) -> None:
    """Make it CISPO: a clipped token keeps its gradient, and only the upper side is clipped.

    Source: arXiv 2506.13585 §3.1 for the method. It gives no number for the clip; ratios of at most
    2 are a choice made here, of no effect with one update of a rollout.
    """
    config.algorithm.loss = "cispo"
    config.algorithm.clip_low = None
    config.algorithm.clip_high = 1.0


def _rloo(config: ConfigDict) -> None:
    """Make it RLOO: the policy gradient of whole responses, without ratio or clip.

    Source: arXiv 2402.14740 §3.3.
    """
    config.advantage.kind = "rloo"
    config.advantage.eps = None
    config.algorithm.loss = "reinforce"
    config.algorithm.clip_low = None
    config.algorithm.clip_high = None
    config.algorithm.aggregation = "seq-mean-token-sum"


def _reinforce_plus_plus(config: ConfigDict) -> None:
    """Make it REINFORCE++: returns whitened over the tokens of the batch, clipped as in GRPO.

    Its paper has a KL term in the reward, k1; with `reference.reward_estimator` and
    `reference.reward_coefficient` it is here too.
    Source: arXiv 2501.03262; PRISM verl/verl/trainer/ppo/core_algos.py:764 (eps 1e-8, gamma 1).
    """
    config.advantage.kind = "reinforce++"
    config.advantage.eps = 1e-8
    config.advantage.discount = 1.0


_ALGORITHMS = {
    "dapo": _dapo,
    "gspo": _gspo,
    "dr_grpo": _dr_grpo,
    "cispo": _cispo,
    "rloo": _rloo,
    "reinforce++": _reinforce_plus_plus,
}


def _official(config: ConfigDict, name: str) -> None:
    """Take the behaviour of the released script of this algorithm where it differs.

    The judge with its errors; means over a GPU's tokens at a time; DAPO's surplus thrown away;
    weight decay and warm-up of the scripts. Not offered: pictures that are scaled to multiples of
    28 and then of 32 pixels, and prompts that vanish when anything about them fails.
    Source: PRISM verl/verl/workers/actor/dp_actor.py:434; the scripts: lr_warmup_steps 10 (dapo),
    lr_warmup_steps_ratio 0.05 (gspo), weight_decay 0.1 (both), clip_ratio_c 3 where none is set.
    """
    if name not in ("grpo", "dapo", "gspo"):
        raise ValueError(f"{name} has no released run: the option official is of grpo, dapo, gspo")
    config.rewards = sampled.rewards(is_official=True)
    # workers/fsdp_workers.py: AdamW over all parameters: norms and biases decay as well.
    config.optim.no_decay = ()
    if name == "grpo":
        config.algorithm.dual_clip = 3.0
    if name == "gspo":
        config.optim.warmup_fraction = 0.05
    else:
        config.algorithm.aggregation = "official"
    if name == "dapo":
        config.optim.warmup_fraction = None
        config.optim.warmup_steps = min(10, config.train.num_steps)
        config.groups.surplus_steps = 0
    if name != "grpo":
        config.optim.weight_decay = 0.1
