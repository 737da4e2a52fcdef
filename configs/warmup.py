"""Discriminator warm-up on pairs of a teacher's and a student's segments.

    python -m prism_jax upcycle --from=Qwen3-VL-2B-Instruct --to=qwen3_vl_2b_moe4x
    python -m prism_jax warmup --config=configs/warmup.py:4b --workdir=runs/warmup \
        --config.model.folder=qwen3_vl_2b_moe4x --config.data.train=pairs.jsonl

Sizes: tiny (tests), demo (an upcycled model of 2 million parameters, 2 CPU cores), small (one GPU),
2b_one_gpu and 4b_one_gpu (one GPU of 80 GB), 4b and 8b (1 to 256 devices, see docs/fits.md), the
last four the published 2B x 4 experts, which serves either policy. Options:

  new        tiny, demo, small: a new dense model; model.folder then names its tokenizer
  text_only  without pictures, the vision tower frozen (the paper's ablation). For the dense
             ablation name a dense folder.
  text_trunk the trunk is a Qwen3, which has no tower; data.words then names the policy's folder
  whole      whole responses in place of captions and cots (GAD); both: all three
  official   the released run with its errors, see `_official`

4b and 8b: not run here. Source: PRISM moe/train_moe_vl_warmup_fast.py and README §6; they agree.
"""

from ml_collections import ConfigDict, config_dict

from configs import common, discriminators

# num_pairs: published are 4 pairs of segments x 4 accumulations x 8 devices = 128, two a line.
# max_tokens: source MAX_LENGTH. held_out: the release trains on every pair, its accuracy is that of
# training.
_SIZES = common.table("""
         num_pairs num_steps num_epochs peak max_tokens held_out num_threads save_every log_every
  tiny   2         2         -          1e-3 512        0.3      2           1          1
  demo   4         40        -          5e-4 512        0.1      2           20         10
  small  32        100       -          1e-4 1024       0.1      2           100        10
  4b     64        -         1          1e-5 8192       0.02     8           100        10
  8b     64        -         1          1e-5 8192       0.02     8           100        10
""")
_ROWS = common.table("""
         row_tokens  row_sequences  num_rows  has_shared_prompts
  tiny   512         4              2         False
  demo   384         4              6         False
  small  2048        8              8         False
  4b     16384       16             -1        True
  8b     16384       16             -1        True
""")
# When held-out pairs are scored, and how many; likewise of the honesty panel.
_EVALUATIONS = common.table("""
         every_steps  num_batches  panel_every  panel_pairs
  tiny   1            2            2            4
  demo   40           8            40           16
  small  100          16           100          64
  4b     100          16           100          128
  8b     100          16           100          128
""")


def get_config(arg: str = "4b") -> ConfigDict:
    """Return the configuration of `SIZE,OPTION,…`."""
    arg, one_gpu = common.split_one_gpu(arg)
    config = _config(arg)
    if one_gpu is not None:
        _for_one_gpu(one_gpu, config)
    return config


def _for_one_gpu(size: str, config: ConfigDict) -> None:
    """Fit 2B x 4 experts, 5.3 billion parameters, whatever the size of the policy.

    Weights in bfloat16 take 10.6 GB, their gradients 10.6 and the float32 sum over microbatches
    21.2; the moments are in the host's memory, 21.2 GB.
    """
    del size
    config.model.param_dtype = "bfloat16"
    common.narrow(config.optim)
    config.optim.memory = "host"
    config.rows.num_rows = 1


def _config(arg: str) -> ConfigDict:
    """Return a configuration of any other size."""
    size, options = common.arguments(
        arg, ("new", "text_only", "text_trunk", "official", "whole", "both"), _SIZES
    )
    if {"whole", "both"} <= options:
        raise ValueError("options: one of whole, both must be chosen at most")
    row, evaluation, is_large = _SIZES[size], _EVALUATIONS[size], common.is_large(size)
    if is_large and "new" in options:
        raise ValueError(f"size {size} has no option new")
    config = ConfigDict()
    config.seed = 0
    config.model = common.new_model(size) if "new" in options else common.model(size)
    if is_large:
        config.model.remat = "full"
    config.data = _data(size, options)
    config.pairs = _pairs()
    config.rows = ConfigDict(vars(_ROWS[size]))
    config.train = ConfigDict(
        {
            "num_steps": config_dict.placeholder(int),
            "num_epochs": config_dict.placeholder(int),
            "num_pairs": row.num_pairs,
            "max_skipped_in_row": 3,
        }
    )
    config.train.num_steps, config.train.num_epochs = row.num_steps, row.num_epochs
    config.evaluate = ConfigDict(
        {"every_steps": evaluation.every_steps, "num_batches": evaluation.num_batches}
    )
    config.honesty = common.honesty(
        every_steps=evaluation.panel_every, num_pairs=evaluation.panel_pairs
    )
    config.optim = common.optim(peak=row.peak)
    config.optim.schedule = "cosine"
    config.optim.end_factor = 0.0
    config.optim.warmup_fraction = 0.1
    _without_pictures(config, options)
    config.mesh = common.mesh()
    config.checkpoint = common.checkpoint(every_steps=row.save_every)
    config.resume = common.resume()
    config.log = common.log(every_steps=row.log_every)
    if "official" in options:
        _official(config)
    return config


def _without_pictures(config: ConfigDict, options: set[str]) -> None:
    """Read texts alone, where an option says so."""
    if "text_only" in options:
        config.data.sees_images = False
        config.optim.frozen = ("trunk/vision/.*",)
    if "text_trunk" in options:
        config.data.sees_images = False
        # It has no bias.
        config.optim.no_decay = (".*/scale",)


def _official(config: ConfigDict) -> None:
    """Choose the released behaviour where it differs from the right one.

    Source: PRISM moe/train_moe_vl_warmup_fast.py at 6079044.
    """
    # :224-237: the template's line break behind the end of the turn is scored.
    config.data.scored_token = "newline"
    # Nothing is held out, and no format is required; this is the loosest gate that can be cut.
    config.data.held_out_fraction = 0.0
    config.data.gate = "official"
    # moe/value_head.py:332, moe/train_moe_vl_warmup_fast.py:465: a bfloat16 head under DeepSpeed,
    # whose outputs nothing widens before the log-sigmoid.
    config.pairs.score_dtype = "bfloat16"
    # moe/value_head.py:318 switches checkpointing on without arguments, which is the reentrant one
    # in transformers 4.57.0 (modeling_utils.py:3696): router logits are then recorded without a
    # gradient, so the term that is added to the loss teaches nothing.
    config.pairs.router = 0.0
    # moe/value_head.py:295.
    config.pairs.head_dropout = 0.1
    # :380: AdamW over all parameters, norms and biases decay as well.
    config.optim.no_decay = ()


def _pairs() -> ConfigDict:
    """Return the released loss.

    Source: :465-475, the router's coefficient; clip and regulariser are those of alignment.
    """
    return ConfigDict(
        {
            "score_clip": config_dict.placeholder(float),
            "regulariser": 0.0,
            "router": 0.01,
            "length_beta": (),
            "lengths": discriminators.pair_lengths(),
            "score_dtype": "float32",
            "head_dropout": 0.0,
        }
    )


def _data(size: str, options: set[str]) -> ConfigDict:
    row, is_large = _SIZES[size], common.is_large(size)
    return ConfigDict(
        {
            "train": (),
            "held_out_fraction": row.held_out,
            "image_root": "",
            "cache_dir": "",
            "max_bad_rows": 0,
            "overlong": "filter" if is_large else "error",
            "max_tokens": row.max_tokens,
            "min_pixels": config_dict.placeholder(int),
            # Source: :63-75: pictures of at most 560 x 560 pixels. Alignment shows larger ones to
            # the released discriminator; here both stages have this limit.
            "max_pixels": 560 * 560 if is_large else config_dict.placeholder(int),
            "limit_image_pixels": 60_000_000,
            "sees_images": True,
            "words": "",
            "view": next(iter(options & {"whole", "both"}), "caption_cot"),
            "scored_token": "last",
            "gate": "strict",
            "num_threads": row.num_threads,
        }
    )
