"""Discriminator warm-up on pairs of a teacher's and a student's segments.

    python -m prism_jax upcycle --from=Qwen3-VL-2B-Instruct --to=qwen3_vl_2b_moe4x
    python -m prism_jax warmup --config=configs/warmup.py:4b --workdir=runs/warmup \
        --config.model.folder=qwen3_vl_2b_moe4x --config.data.train=pairs.jsonl

Sizes: tiny (tests), demo (an upcycled model of 2 million parameters, 2 CPU cores), small (one GPU),
2b_one_gpu and 4b_one_gpu (one GPU of 80 GB), 4b and 8b (8 devices of 80 GB), the last four the
published 2B x 4 experts, which serves either policy. Options:

  new        tiny, demo, small: a new dense model; model.folder then names its tokenizer
  text_only  without pictures, the vision tower frozen (the paper's ablation). For the dense
             ablation name a dense folder.
  text_trunk the trunk is a Qwen3, which has no tower; data.words then names the policy's folder
  whole      whole responses in place of captions and cots (GAD); both: all three
  official   the released run with its errors, see `_official`

4b and 8b: not run here. Source: PRISM moe/train_moe_vl_warmup_fast.py and README §6; they agree.
"""

from ml_collections import ConfigDict, config_dict

from configs import common, sampled_training


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
        arg, ("new", "text_only", "text_trunk", "official", "whole", "both")
    )
    if {"whole", "both"} <= options:
        raise ValueError("options: one of whole, both must be chosen at most")
    is_large = size in ("4b", "8b")
    if is_large and "new" in options:
        raise ValueError(f"size {size} has no option new")
    config = ConfigDict()
    config.seed = 0
    config.model = common.new_model(size) if "new" in options else common.model(size)
    if is_large:
        config.model.remat = "full"
    config.data = _data(size, options)
    config.pairs = _pairs()
    config.rows = sampled_training.rows(
        *{"tiny": (512, 4, 2), "demo": (384, 4, 6), "small": (2048, 8, 8)}.get(
            size, (16_384, 16, 8)
        )
    )
    config.train = ConfigDict(
        {
            "num_steps": config_dict.placeholder(int),
            "num_epochs": config_dict.placeholder(int),
            # Published: 4 pairs of segments x 4 accumulations x 8 devices = 128, two a line.
            "num_pairs": {"tiny": 2, "demo": 4, "small": 32}.get(size, 64),
            "max_skipped_in_row": 3,
        }
    )
    if is_large:
        config.train.num_epochs = 1
    else:
        config.train.num_steps = {"tiny": 2, "demo": 40, "small": 100}[size]
    config.evaluate = ConfigDict(
        {
            "every_steps": {"tiny": 1, "demo": 40}.get(size, 100),
            "num_batches": {"tiny": 2, "demo": 8}.get(size, 16),
        }
    )
    config.honesty = common.honesty(
        every_steps={"tiny": 2, "demo": 40}.get(size, 100),
        num_pairs={"tiny": 4, "demo": 16, "small": 64}.get(size, 128),
    )
    config.optim = common.optim(peak={"tiny": 1e-3, "demo": 5e-4, "small": 1e-4}.get(size, 1e-5))
    config.optim.schedule = "cosine"
    config.optim.end_factor = 0.0
    config.optim.warmup_fraction = 0.1
    _without_pictures(config, options)
    config.mesh = common.mesh()
    config.checkpoint = common.checkpoint(every_steps={"tiny": 1, "demo": 20}.get(size, 100))
    config.resume = common.resume()
    config.log = common.log(every_steps={"tiny": 1, "demo": 10}.get(size, 10))
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
    """Choose what the released warm-up does where that is not what is right.

    Source: PRISM moe/train_moe_vl_warmup_fast.py at 6079044.
    """
    # :224-237: the template's line break behind the end of the turn is scored.
    config.data.scored_token = "newline"
    # Nothing is held out, and no format is asked for; this is the loosest gate that can be cut.
    config.data.held_out_fraction = 0.0
    config.data.gate = "official"
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
            "head_dropout": 0.0,
        }
    )


def _data(size: str, options: set[str]) -> ConfigDict:
    is_large = size in ("4b", "8b")
    return ConfigDict(
        {
            "train": (),
            # Not published: every pair was trained on there, and the accuracy was that of training.
            "held_out_fraction": {"tiny": 0.3, "demo": 0.1, "small": 0.1}.get(size, 0.02),
            "image_root": "",
            "cache_dir": "",
            "max_bad_rows": 0,
            "overlong": "filter" if is_large else "error",
            # Source: MAX_LENGTH.
            "max_tokens": {"tiny": 512, "demo": 512, "small": 1024}.get(size, 8192),
            "min_pixels": config_dict.placeholder(int),
            # Source: :63-75: pictures of at most 560 x 560 pixels. Alignment shows larger ones to
            # the released discriminator; here both stages have this limit.
            "max_pixels": 560 * 560 if is_large else config_dict.placeholder(int),
            "sees_images": True,
            "words": "",
            "view": next(iter(options & {"whole", "both"}), "caption_cot"),
            "scored_token": "last",
            "gate": "strict",
            "num_threads": 8 if is_large else 2,
        }
    )
