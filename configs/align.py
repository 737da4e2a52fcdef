"""Stage 2, alignment: the policy against a discriminator that learns with it.

    python -m prism_jax align --config=configs/align.py:4b --workdir=runs/align \
        --config.model.folder=runs/sft --config.discriminator.folder=runs/warmup \
        --config.prompts.path=rl_training_data_5.9k.parquet

Sizes: tiny (tests), demo (models of 2 million parameters, 2 CPU cores), small (107 million, one
GPU), 4b and 8b (1 to 256 devices; docs/fits.md names those that are large enough), 2b_one_gpu and
4b_one_gpu (one GPU of 80 GB and 80 GB of the host's memory). Options:

  new        tiny, demo, small: new models; both folders then name their tokenizer
  text_only  the discriminator reads without pictures, its vision tower frozen
  text_trunk the discriminator is a Qwen3 without a tower, warmed up as such
  whole      it scores the whole response (GAD); both: caption, cot and the whole
  acc_gating, gated_align, rlvr, rlvr_v2, sign_align
             another advantage, which needs the judge: see prism_jax/losses/advantage.py
  official   the released run with its errors, see `_official`

4b and 8b: not run here. Source: PRISM scripts/train/experiment/qwen3_vl_prism*.sh and README §6.
Where they disagree: the README names 500 steps, the script allows 1500 and saves every 500.
"""

from ml_collections import ConfigDict, config_dict

from configs import common, discriminators, sampled_training
from configs import held_out as held_out_config

_SIZES = common.table("""
         num_prompts  num_responses  max_response_tokens  num_steps  peak  discriminator_peak
  tiny   2            2              16                   2          1e-3  1e-3
  demo   4            6              96                   14         2e-5  2e-4
  small  8            8              320                  30         1e-5  2e-5
  4b     4            16             6144                 500        1e-6  1e-6
  8b     4            16             6144                 500        1e-6  1e-6
""")
# Of the policy and of the discriminator.
_ROWS = common.table("""
         row_tokens  row_sequences  num_rows  has_shared_prompts
  tiny   256         2              2         False
  demo   384         2              8         False
  small  1024        4              8         False
  4b     8192        8              -1        True
  8b     8192        8              -1        True
""")
_INTERVALS = common.table("""
         panel_steps  panel_pairs  save_steps  log_steps
  tiny   2            2            1           1
  demo   7            16           7           10
  small  20           32           50          1
  4b     50           32           50          1
  8b     50           32           50          1
""")
_MODES = ("acc_gating", "gated_align", "rlvr", "rlvr_v2", "sign_align")


def get_config(arg: str = "4b") -> ConfigDict:
    """Return the configuration of `SIZE,OPTION,…`."""
    arg, one_gpu = common.split_one_gpu(arg)
    config = _config(arg)
    if one_gpu is not None:
        _for_one_gpu(one_gpu, config)
    return config


def _for_one_gpu(size: str, config: ConfigDict) -> None:
    """Fit a policy and 2B x 4 experts on one GPU.

    Weights in bfloat16: 8.9 GB for a policy of 4B, 10.6 for the discriminator. While one is
    updated its gradients and their float32 sum take 26.6 or 31.8 GB. The sampler's copy takes
    8.9 GB, 16 responses of 8192 tokens 19.3. The moments take 39 GB, 36 of them in the host's
    pinned memory; a save copies 23 GB more there: both fit the 64 GiB that JAX pins by default.
    """
    del size
    config.model.param_dtype = "bfloat16"
    config.model.remat = "full"
    for optim in (config.optim, config.discriminator.optim):
        common.narrow(optim)
        optim.memory = "host"
    config.rollout.batch_responses = 16
    config.rows.num_rows = config.discriminator.rows.num_rows = 1


def _config(arg: str) -> ConfigDict:
    """Return a configuration of any other size."""
    size, options = common.arguments(
        arg, ("new", "text_only", "text_trunk", "official", *discriminators.VIEWS, *_MODES), _SIZES
    )
    for alternatives in (discriminators.VIEWS, _MODES):
        if len(options & set(alternatives)) > 1:
            raise ValueError(f"options: one of {', '.join(alternatives)} must be chosen at most")
    row, intervals, is_large = _SIZES[size], _INTERVALS[size], common.is_large(size)
    if is_large and "new" in options:
        raise ValueError(f"size {size} has no option new")
    config = ConfigDict()
    config.seed = 0
    config.model = common.new_model(size) if "new" in options else common.model(size)
    config.discriminator = discriminators.discriminator(
        size,
        options,
        config.model,
        rows=ConfigDict(vars(_ROWS[size])),
        peak=row.discriminator_peak,
    )
    config.prompts = sampled_training.prompts(size)
    if is_large:
        # Source: filter_overlong_prompts; every row that is left out is named.
        config.prompts.overlong = "filter"
    config.gate = "strict"
    config.rollout = sampled_training.rollout(
        size,
        num_prompts=row.num_prompts,
        num_responses=row.num_responses,
        max_tokens=row.max_response_tokens,
    )
    # All at a time: 4 prompts on 8 devices are one a device, 16 responses x 8192 tokens = 19.3 GB
    # beside both models' states, 16 GB for 4B, 23 GB for 8B; see configs/rlvr.py.
    config.judge = ConfigDict(
        {"rule": "strict", "num_workers": 2, "deadline_seconds": 10.0, "memory_bytes": 2 << 30}
    )
    config.advantage = _advantage(options)
    config.pace, config.distill = _pace(), sampled_training.distill()
    config.algorithm = sampled_training.weighing(aggregation="token-mean")
    config.rows = ConfigDict(vars(_ROWS[size]))
    config.train = ConfigDict(
        {
            "num_steps": row.num_steps,
            "head_chunk_tokens": 1024 if is_large else 2048,
            "has_entropy": True,
            "num_threads": 2,
            "max_skipped_in_row": 3,
        }
    )
    config.honesty = common.honesty(
        every_steps=intervals.panel_steps, num_pairs=intervals.panel_pairs
    )
    config.optim = common.optim(peak=row.peak)
    config.held_out = held_out_config.held_out()
    config.mesh = common.mesh()
    config.checkpoint = common.checkpoint(every_steps=intervals.save_steps)
    config.resume = common.resume()
    config.log = common.log(every_steps=intervals.log_steps)
    if "official" in options:
        _official(config)
    return config


def _pace() -> ConfigDict:
    """Return an update of each model in each step, whatever the discriminator's accuracy."""
    return ConfigDict(
        {
            "discriminator_updates": 1,
            "policy_every_steps": 1,
            "discriminator_warmup_steps": 0,
            "discriminator_max_accuracy": config_dict.placeholder(float),
            "policy_min_accuracy": config_dict.placeholder(float),
        }
    )


def _official(config: ConfigDict) -> None:
    """Choose the released behaviour where it differs from the right one.

    Source: PRISM at 6079044; paths below verl/verl/ where none is given.
    """
    discriminator = config.discriminator
    # utils/dataset/rl_dataset.py:395,410: the configured length does not reach the teacher.
    discriminator.teacher_max_tokens = 512
    # workers/rollout/vllm_rollout/vllm_rollout_spmd.py:474,504,526: a teacher's segment is scored
    # on its first padding, a student's on its last token.
    discriminator.scored_token = "pad"
    # workers/critic/dp_critic.py:177: row 0 of the position ids, a number a token.
    discriminator.positions = "text_1d"
    # utils/dataset/rl_dataset.py: no limit on pictures, while warm-up had 560 x 560 pixels.
    discriminator.max_pixels = config_dict.placeholder(int)
    # workers/critic/dp_critic.py:165, workers/fsdp_workers.py:1346: autocast and bfloat16 weights;
    # clamp, difference and log-sigmoid stay bfloat16 (:289,962-965).
    discriminator.score_dtype = "bfloat16"
    # moe/value_head.py:295 and workers/critic/dp_critic.py:742: active in every update.
    discriminator.head_dropout = 0.1
    # workers/critic/dp_critic.py:965,1006: a mean over each microbatch. Those hold up to 8192
    # tokens, which are about two responses of 4096 with their prompts.
    discriminator.microbatch_pairs = 2
    # workers/critic/dp_critic.py:969-975.
    discriminator.all_invalid = "released"
    # workers/critic/dp_critic.py:389: tags may repeat, segments may be empty.
    config.gate = "official"
    config.judge.rule = "official"
    # trainer/ppo/ray_trainer.py:1221-1231: the reward's format replaces the discriminator's where
    # a mode asks for accuracy; :1211: gated_align never gets one.
    if config.advantage.mode == "gated_align":
        config.advantage.accuracy = "nobody"
    elif config.advantage.mode != "align":
        config.advantage.format_of = "judge"
    # workers/actor/dp_actor.py:434: token-mean of each microbatch.
    config.algorithm.aggregation = "official"
    # torch.optim.AdamW over all parameters: norms and biases decay as well.
    config.optim.no_decay = discriminator.optim.no_decay = ()


def _advantage(options: set[str]) -> ConfigDict:
    """Return the advantage with the released numbers; `None` for those that its mode does not read.

    Source: PRISM scripts/train/experiment/qwen3_vl_prism.sh; verl/verl/trainer/ppo/
    core_algos.py:415 (eps), ray_trainer.py:260-271 (the numbers of the modes that no script runs).
    """
    mode = next((mode for mode in _MODES if mode in options), "align")
    has_reward = mode in ("rlvr", "rlvr_v2", "sign_align")
    advantage = ConfigDict(
        {
            "mode": mode,
            "caption_weight": 0.5,
            "cot_weight": 0.5,
            "response_weight": config_dict.placeholder(float),
            # Source: core_algos.py:536: the sum of both stands on every token.
            "credit": "response",
            "scale": "group",
            "std_floor": config_dict.placeholder(float),
            "teacher_gate": "off",
            "eps": 1e-6,
            "align_coef": config_dict.placeholder(float) if mode == "align" else 1.0,
            "accuracy_weight": 1.0 if has_reward else config_dict.placeholder(float),
            "format_weight": 1.0 if has_reward else config_dict.placeholder(float),
            "wrong_penalty": config_dict.placeholder(float) if mode in ("align", "rlvr") else 1.0,
            "format_penalty": config_dict.placeholder(float) if mode == "rlvr" else 1.5,
            "accuracy": "off" if mode == "align" else "judge",
            "format_of": "gate",
        }
    )
    if "whole" in options:
        advantage.caption_weight = advantage.cot_weight = config_dict.placeholder(float)
        advantage.response_weight = 1.0
    if "both" in options:
        advantage.caption_weight, advantage.cot_weight, advantage.response_weight = 0.25, 0.25, 0.5
    return advantage
