"""Stage 1, supervised fine-tuning on demonstrations.

    python -m prism_jax sft --config=configs/sft.py:4b --workdir=runs/sft \
        --config.model.folder=Qwen3-VL-4B-Instruct \
        --config.data.train=gemini_public_mmr1/dataset_info.json#mmr1 \
        --config.data.train=gemini_distill/dataset_info.json#gemini

Sizes: tiny (tests), demo (2 million parameters, 2 CPU cores), small (107 million, one GPU), 4b and
8b (8 devices of 80 GB, or a v5p-16 with mesh.axes as they are), 2b_one_gpu and 4b_one_gpu (one GPU
of 80 GB, float32 weights and moments). Options:

  new           tiny, demo, small: a new model; model.folder then names its tokenizer
  train_vision  4b, 8b: train the vision tower and its mergers too

4b_one_gpu: XLA reports 46.5 GiB of arguments and 22.9 GiB of temporaries for the whole step, 15.0
of them the gradients (compiled for CPU, tower frozen; packed cuDNN attention needs 2.0 more for 8
segments a row). Set XLA_PYTHON_CLIENT_MEM_FRACTION=0.94. `--config.optim.memory=host` keeps the
moments in the host's memory, for several microbatches.

4b and 8b: not run here. Source: PRISM README §6 (learning rate 1e-5, cosine, warm-up 0.1, 1 epoch,
8192 tokens) and, for what it leaves open, the defaults of LLaMA-Factory, which it trains with.
"""

from ml_collections import ConfigDict, config_dict

from configs import common


def get_config(arg: str = "4b") -> ConfigDict:
    """Return the configuration of `SIZE,OPTION,…`."""
    arg, one_gpu = common.split_one_gpu(arg)
    config = _config(arg)
    if one_gpu is not None:
        _for_one_gpu(one_gpu, config)
    return config


def _for_one_gpu(size: str, config: ConfigDict) -> None:
    """Fit one row of 8192 tokens a step, weights and moments in float32.

    Of 4b they take 46.5 GiB, the gradients 15.0, and what else a step needs about 8: see the head.
    """
    config.train.num_rows = 1
    config.model.remat = "full" if size == "4b_one_gpu" else "save_attention"


def _config(arg: str) -> ConfigDict:
    """Return a configuration of any other size."""
    size, options = common.arguments(arg, ("new", "train_vision"))
    is_large = size in ("4b", "8b")
    if ("new" if is_large else "train_vision") in options:
        raise ValueError(f"size {size} has no option {', '.join(options)}")
    config = ConfigDict()
    config.seed = 0
    config.model = common.new_model(size) if "new" in options else common.model(size)
    config.data = _data(size)
    config.train = ConfigDict(
        {
            "num_steps": config_dict.placeholder(int),
            "num_epochs": config_dict.placeholder(int),
            # Packed rows of a microbatch over all devices. The README's "global batch 2" is almost
            # surely 2 sequences on each of 8 devices; a packed row holds several.
            "num_rows": {"tiny": 2, "demo": 8, "small": 16}.get(size, 8),
            "num_microbatches": 1,
            "head_chunk_tokens": 1024 if is_large else 2048,
            "head": "fused",
            # Source: transformers router_aux_loss_coef of Qwen3-VL-MoE.
            "load_balance": 0.001,
            "max_skipped_in_row": 3,
        }
    )
    if is_large:
        config.train.num_epochs = 1
    else:
        config.train.num_steps = {"tiny": 2, "demo": 300, "small": 100}[size]
    config.optim = _optim(size)
    if is_large and "train_vision" not in options:
        # Source: LLaMA-Factory freeze_vision_tower and freeze_multi_modal_projector, both on
        # unless asked otherwise; neither README nor paper say what the published run did.
        config.optim.frozen = ("vision/.*",)
    config.evaluate = ConfigDict(
        {
            "every_steps": {"tiny": 1, "demo": 100, "small": 50}.get(size, 1000),
            "num_batches": config_dict.placeholder(int),
        }
    )
    config.mesh = common.mesh()
    config.checkpoint = common.checkpoint(
        every_steps={"tiny": 1, "demo": 50, "small": 50}.get(size, 500)
    )
    config.resume = common.resume()
    config.log = common.log(every_steps={"tiny": 1, "demo": 20}.get(size, 10))
    return config


def _data(size: str) -> ConfigDict:
    rows = {  # tokens, examples, sizes of vision rows, images
        "tiny": (128, 4, (32,), 4),
        # Short rows, of two examples: attention by XLA computes whole rows, whatever they are
        # packed with.
        "demo": (352, 2, (32,), 2),
        "small": (2048, 16, (2048,), 16),
    }
    # An image of 768 x 768 pixels has 2304 patches and 576 tokens.
    tokens, examples, patches, images = rows.get(size, (8192, 32, (8192, 16_384), 32))
    is_large = size in ("4b", "8b")
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
            "row_tokens": tokens,
            "row_examples": examples,
            "row_patches": patches,
            "row_images": images,
            "num_open_rows": 64 if is_large else 16,
            "num_threads": {"tiny": 2, "demo": 2}.get(size, 8),
            "cache_mebibytes": 0 if is_large else 1024,
        }
    )


def _optim(size: str) -> ConfigDict:
    optim = common.optim(peak={"tiny": 1e-3, "demo": 3e-4, "small": 2e-4}.get(size, 1e-5))
    optim.schedule = "cosine"
    optim.end_factor = 0.0
    optim.warmup_fraction = 0.1
    # Not given for this stage; 0 is the default of transformers' trainer, which it uses.
    optim.weight_decay = 0.0
    return optim
