"""Pieces that the configurations of the stages share."""

from collections.abc import Sequence

from ml_collections import ConfigDict, config_dict

# Those of one GPU with 80 GB begin as 4b; each configuration says what it changes.
ONE_GPU = ("2b_one_gpu", "4b_one_gpu")
SIZES = ("tiny", "demo", "small", "4b", "8b", *ONE_GPU)


def arguments(text: str, options: Sequence[str]) -> tuple[str, set[str]]:
    """Return the size and the options of `configs/X.py:SIZE,OPTION,…`."""
    size, *chosen = text.split(",")
    if size not in SIZES:
        raise ValueError(f"the size must be one of {', '.join(SIZES)}, got {size!r}")
    unknown = [option for option in chosen if option not in options]
    if unknown:
        raise ValueError(f"options are {', '.join(options) or 'none'}, got {', '.join(unknown)}")
    return size, set(chosen)


def split_one_gpu(text: str) -> tuple[str, str | None]:
    """Return the argument with the size that one of one GPU begins with, and that size or None."""
    size, comma, rest = text.partition(",")
    return (f"4b{comma}{rest}", size) if size in ONE_GPU else (text, None)


def narrow(optim: ConfigDict) -> None:
    """Keep moments in bfloat16, rounded stochastically as the weights are."""
    optim.mu_dtype = optim.nu_dtype = "bfloat16"
    optim.rounding = "stochastic"


def mesh() -> ConfigDict:
    """Return rows and weights spread over all devices."""
    return ConfigDict(
        {
            "axes": {"data": 1, "fsdp": -1, "tensor": 1, "expert": 1},
            "num_devices": config_dict.placeholder(int),
            "is_distributed": False,
            "rules": (),
        }
    )


def model(size: str) -> ConfigDict:
    """Return a pretrained policy in bfloat16, tiny ones in float32; its folder is to be named."""
    return ConfigDict(
        {
            "folder": "",
            "init": "pretrained",
            "sizes": config_dict.placeholder(ConfigDict),
            "dtype": "float32" if size in ("tiny", "demo") else "bfloat16",
            "param_dtype": "float32",
            "attention": "auto",
            # Also the fastest for small, on an H100: benchmarks/results/h100_train_small.json.
            "remat": {"small": "save_attention", "4b": "save_attention", "8b": "full"}.get(
                size, "none"
            ),
            "lora": lora(),
        }
    )


def lora() -> ConfigDict:
    """Return no adapters; `--config.model.lora.rank=16` trains such instead of the model."""
    return ConfigDict(
        {
            "rank": config_dict.placeholder(int),
            "alpha": 32.0,
            "targets": (r".*text/layers/attn/(q|k|v|o)", r".*text/layers/mlp/(gate|up|down)"),
        }
    )


def new_model(size: str) -> ConfigDict:
    """Return a model that is made anew; `folder` names its tokenizer.

    With a vocabulary of a few hundred tokens: tiny 0.5 million parameters, demo 2.4, small 107.
    """
    widths = {  # hidden, mlp, layers, heads, kv heads, head size
        "tiny": (64, 128, 2, 4, 2, 16),
        "demo": (128, 384, 4, 4, 2, 32),
        "small": (640, 2048, 12, 10, 5, 64),
    }
    towers = {  # hidden, mlp, layers, heads, positions, taps
        "tiny": (64, 128, 2, 4, 16, (0, 1)),
        "demo": (128, 384, 3, 4, 64, (0, 1)),
        "small": (512, 2048, 8, 8, 576, (2, 5)),
    }
    text, vision = widths[size], towers[size]
    chosen = model(size)
    chosen.init = "random"
    chosen.sizes = ConfigDict(
        {
            "hidden_size": text[0],
            "intermediate_size": text[1],
            "num_layers": text[2],
            "num_heads": text[3],
            "num_kv_heads": text[4],
            "head_dim": text[5],
            "rope_theta": 10_000.0,
            "tie_word_embeddings": True,
            "vision_hidden_size": vision[0],
            "vision_intermediate_size": vision[1],
            "vision_num_layers": vision[2],
            "vision_num_heads": vision[3],
            "vision_num_position_embeddings": vision[4],
            "vision_deepstack_layers": vision[5],
            "initializer_range": 0.02,
        }
    )
    return chosen


def optim(*, peak: float) -> ConfigDict:
    """Return AdamW at a constant rate, everything trained."""
    return ConfigDict(
        {
            "kind": "adamw",
            "schedule": "constant",
            "peak": peak,
            "warmup_steps": config_dict.placeholder(int),
            "warmup_fraction": 0.0,
            "end_factor": 1.0,
            # Source: torch.optim.AdamW's betas and eps, which no script of PRISM changes.
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.01,
            # Source: transformers trainer.py get_decay_parameter_names: norms and biases.
            "no_decay": (".*/scale", ".*/bias"),
            "frozen": (),
            "factors": (),
            "clip_norm": 1.0,
            "mu_dtype": "float32",
            "nu_dtype": "float32",
            "rounding": "nearest",
            "memory": "device",
        }
    )


def checkpoint(*, every_steps: int) -> ConfigDict:
    """Return saving every so many steps, the two newest kept."""
    return ConfigDict({"save_every_steps": every_steps, "num_kept": 2})


def resume() -> ConfigDict:
    """Return going on after the newest checkpoint of the same run."""
    return ConfigDict({"step": config_dict.placeholder(int), "allow_mismatch": False})


def log(*, every_steps: int) -> ConfigDict:
    """Return a progress line every so many steps where there is no terminal."""
    return ConfigDict({"line_every_steps": every_steps, "wandb_project": ""})


def honesty(*, every_steps: int, num_pairs: int) -> ConfigDict:
    """Return measuring the honesty panel, see docs/honesty.md; every_steps=None turns it off."""
    return ConfigDict({"every_steps": every_steps, "num_pairs": num_pairs})
