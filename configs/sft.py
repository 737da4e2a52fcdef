"""Stage 1, supervised fine-tuning on demonstrations.

    python -m prism_jax sft --config=configs/sft.py:4b --workdir=runs/sft \
        --config.model.folder=Qwen3-VL-4B-Instruct \
        --config.data.train=gemini_public_mmr1/dataset_info.json#mmr1 \
        --config.data.train=gemini_distill/dataset_info.json#gemini

Sizes: tiny (tests), demo (2 million parameters, 2 CPU cores), small (107 million, one GPU), 4b and
8b (1 to 256 devices; docs/fits.md names those that are large enough), 2b_one_gpu and 4b_one_gpu
(one GPU of 80 GB; 4b_one_gpu with bfloat16 weights and moments), 8b_32k (rows of 32768 tokens, each
split over 8 devices, see docs/training.md). Options:

  new           tiny, demo, small: a new model; model.folder then names its tokenizer
  train_vision  2b_one_gpu, 4b_one_gpu, 4b, 8b, 8b_32k: train the vision tower and its mergers too

4b_one_gpu: with float32 weights and moments a step did not fit an H100 of 80 GB (46.5 GiB of
arguments, 30.5 of temporaries, benchmarks/results/train_float32.json), so they are bfloat16 with
stochastic rounding. `--config.optim.memory=host` keeps the moments in the host's memory instead.

4b, 8b and 8b_32k: not run here. Source: PRISM README §6 (learning rate 1e-5, cosine, warm-up 0.1,
1 epoch, 8192 tokens) and, for the rest, the defaults of LLaMA-Factory, with which it trains.
"""

from ml_collections import ConfigDict, config_dict

from configs import common

# step_rows: packed rows of an update, on any devices; num_rows: those of a microbatch, -1 is one on
# each part of the mesh, so that 4b and 8b take 8 microbatches on one device and one on 8 (more than
# 8 compute empty rows: give them a larger step_rows). The README's "global batch 2" is almost
# surely 2 sequences on each of 8 devices, 16 an update. 8 rows of 8192 tokens hold about 64 with a
# mean of 1000 tokens: 4 times as many, so a quarter of the updates at the same learning rate.
# data.row_examples=2 bounds an update to those 16, at the price of mostly empty rows; a row of one
# sequence is data.row_examples=1. Which of them the published run had is not known.
_SIZES = common.table("""
         step_rows num_rows  num_steps  num_epochs  peak  evaluate_every  save_every  log_every
  tiny   2         2         2          -           1e-3  1               1           1
  demo   8         8         300        -           3e-4  100             50          20
  small  16        16        100        -           2e-4  50              50          10
  4b     8         -1        -          1           1e-5  1000            500         10
  8b     8         -1        -          1           1e-5  1000            500         10
""")
# demo has short rows of two examples: attention by XLA computes whole rows, whatever is packed into
# them. An image of 768 x 768 pixels has 2304 patches and 576 tokens.
_ROWS = common.table("""
         row_tokens row_examples row_patches  row_images num_open_rows num_threads cache_mebibytes
  tiny   128        4            (32,)        4          16            2           1024
  demo   352        2            (32,)        2          16            2           1024
  small  2048       16           (2048,)      16         16            8           1024
  4b     8192       32           (8192,16384) 32         64            8           0
  8b     8192       32           (8192,16384) 32         64            8           0
""")


_LONG = "8b_32k"


def get_config(arg: str = "4b") -> ConfigDict:
    """Return the configuration of `SIZE,OPTION,…`."""
    arg, one_gpu = common.split_one_gpu(arg)
    size, comma, rest = arg.partition(",")
    config = _config(f"8b{comma}{rest}" if size == _LONG else arg)
    if one_gpu is not None:
        _for_one_gpu(one_gpu, config)
    if size == _LONG:
        _for_long_rows(config)
    return config


def _for_long_rows(config: ConfigDict) -> None:
    """Split each row over 8 devices: four times the tokens of a row, a quarter of the rows."""
    config.mesh.axes.sequence = 8
    config.train.step_rows //= 4
    config.data.row_tokens *= 4
    config.data.row_patches = (16_384, 32_768)
    config.data.row_images = 64


def _for_one_gpu(size: str, config: ConfigDict) -> None:
    """Fit one row of 8192 tokens a step; 4b with bfloat16 weights and moments, see the head."""
    config.train.step_rows = config.train.num_rows = 1
    config.model.remat = "save_attention"
    if size == "4b_one_gpu":
        config.model.param_dtype = "bfloat16"
        common.narrow(config.optim)


def _config(arg: str) -> ConfigDict:
    """Return a configuration of any other size."""
    size, options = common.arguments(arg, ("new", "train_vision"), _SIZES)
    row, is_large = _SIZES[size], common.is_large(size)
    if ("new" if is_large else "train_vision") in options:
        raise ValueError(f"size {size} has no option {', '.join(sorted(options))}")
    config = ConfigDict()
    config.seed = 0
    config.model = common.new_model(size) if "new" in options else common.model(size)
    config.data = _data(size)
    config.train = ConfigDict(
        {
            "num_steps": config_dict.placeholder(int),
            "num_epochs": config_dict.placeholder(int),
            "step_rows": row.step_rows,
            "num_rows": row.num_rows,
            "head_chunk_tokens": 1024 if is_large else 2048,
            "head": "fused",
            # Source: transformers router_aux_loss_coef of Qwen3-VL-MoE.
            "load_balance": 0.001,
            "max_skipped_in_row": 3,
        }
    )
    config.train.num_steps, config.train.num_epochs = row.num_steps, row.num_epochs
    config.optim = _optim(row.peak)
    if is_large and "train_vision" not in options:
        # Source: LLaMA-Factory freeze_vision_tower and freeze_multi_modal_projector, both on
        # by default; neither README nor paper name the setting of the published run.
        config.optim.frozen = ("vision/.*",)
    config.evaluate = ConfigDict(
        {
            "every_steps": row.evaluate_every,
            "num_batches": config_dict.placeholder(int),
        }
    )
    config.mesh = common.mesh()
    config.checkpoint = common.checkpoint(every_steps=row.save_every)
    config.resume = common.resume()
    config.log = common.log(every_steps=row.log_every)
    return config


def _data(size: str) -> ConfigDict:
    is_large = common.is_large(size)
    return ConfigDict(
        {
            "train": (),
            "weights": (),
            "held_out": (),
            "image_root": "",
            "cache_dir": "",
            "max_bad_rows": 0,
            "overlong": "filter" if is_large else "error",
            # Source: LLaMA-Factory hparams/model_args.py image_min_pixels, image_max_pixels. Its
            # Qwen3-VL example has 262144; which one the published run had is not said. Train and
            # test with the same bounds.
            "min_pixels": 32 * 32 if is_large else config_dict.placeholder(int),
            "max_pixels": 768 * 768 if is_large else config_dict.placeholder(int),
            "limit_image_pixels": 60_000_000,
            **vars(_ROWS[size]),
        }
    )


def _optim(peak: float) -> ConfigDict:
    optim = common.optim(peak=peak)
    optim.schedule = "cosine"
    optim.end_factor = 0.0
    optim.warmup_fraction = 0.1
    # Not given for this stage; 0 is the default of transformers' trainer, which it uses.
    optim.weight_decay = 0.0
    return optim
