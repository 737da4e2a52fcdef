"""Pieces that the configurations of the stages share."""

import ast
import types
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict, config_dict

# Those of one GPU with 80 GB begin as 4b; each configuration says what it changes.
ONE_GPU = ("2b_one_gpu", "4b_one_gpu")


def table(text: str) -> dict[str, types.SimpleNamespace]:
    """Return the rows of a table of sizes by name, each with the columns as attributes.

    The first line names the columns, every other line begins with a size. Values are Python's, `-`
    is None.
    """
    head, *lines = (line.split() for line in text.strip().splitlines())
    rows = {}
    for size, *cells in lines:
        values = [None if cell == "-" else ast.literal_eval(cell) for cell in cells]
        rows[size] = types.SimpleNamespace(**dict(zip(head, values, strict=True)))
    return rows


# How a policy is computed. remat: the fastest that fits; of small measured on an H100, see
# benchmarks/results/h100_train_small.json.
_MODELS = table("""
         dtype       remat                 is_large
  tiny   "float32"   "none"                False
  demo   "float32"   "none"                False
  small  "bfloat16"  "save_attention"      False
  4b     "bfloat16"  "save_attention"      True
  8b     "bfloat16"  "full"                True
""")

# New models; their vocabulary is the tokenizer's. With a few hundred tokens: tiny 0.5 million
# parameters, demo 2.4, small 107.
_TEXTS = table("""
         hidden_size  intermediate_size  num_layers  num_heads  num_kv_heads  head_dim
  tiny   64           128                2           4          2             16
  demo   128          384                4           4          2             32
  small  640          2048               12          10         5             64
""")
_TOWERS = table("""
         hidden_size intermediate_size num_layers num_heads num_position_embeddings deepstack_layers
  tiny   64          128               2          4         16                      (0,1)
  demo   128         384               3          4         64                      (0,1)
  small  512         2048              8          8         576                     (2,5)
""")


def arguments(
    text: str, options: Sequence[str], sizes: Mapping[str, types.SimpleNamespace]
) -> tuple[str, set[str]]:
    """Return the size and the options of `configs/X.py:SIZE,OPTION,…`."""
    size, *given = text.split(",")
    if size not in sizes:
        raise ValueError(f"the size must be one of {', '.join(sizes)}, got {size!r}")
    unknown = [option for option in given if option not in options]
    if unknown:
        raise ValueError(f"options are {', '.join(options) or 'none'}, got {', '.join(unknown)}")
    return size, set(given)


def is_large(size: str) -> bool:
    """Return whether the size is that of a published model, whose checkpoint is read."""
    return _MODELS[size].is_large


def split_one_gpu(text: str) -> tuple[str, str | None]:
    """Return the argument with the size that one of one GPU begins with, and that size or None."""
    size, comma, rest = text.partition(",")
    return (f"4b{comma}{rest}", size) if size in ONE_GPU else (text, None)


def narrow(optim: ConfigDict) -> None:
    """Keep moments in bfloat16, rounded stochastically as the weights are."""
    optim.mu_dtype = optim.nu_dtype = "bfloat16"
    optim.rounding = "stochastic"


def mesh() -> ConfigDict:
    """Return rows and weights spread over all devices, of any number.

    A weight is spread over at most 128 devices: more hold copies, along `data`, as the slices of a
    TPU do. 128 divides every published size; the width of 8B's vision tower, 1152, is 9 x 128.
    """
    return ConfigDict(
        {
            "axes": {"data": -1, "fsdp": -1, "sequence": 1, "tensor": 1, "expert": 1},
            "max_fsdp": 128,
            "num_devices": config_dict.placeholder(int),
            "is_distributed": config_dict.placeholder(bool),
            "rules": (),
        }
    )


def model(size: str) -> ConfigDict:
    """Return a pretrained policy in bfloat16, tiny ones in float32; its folder must be set."""
    return ConfigDict(
        {
            "folder": "",
            "init": "pretrained",
            "sizes": config_dict.placeholder(ConfigDict),
            "dtype": _MODELS[size].dtype,
            "param_dtype": "float32",
            "attention": "auto",
            "remat": _MODELS[size].remat,
            "lora": lora(),
            # A number, or "best"; any type, so that a command line can give either.
            "step": config_dict.placeholder(object),
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
    """Return a new model; `folder` names its tokenizer."""
    new = model(size)
    new.init = "random"
    new.sizes = ConfigDict(
        {
            **vars(_TEXTS[size]),
            "rope_theta": 10_000.0,
            "tie_word_embeddings": True,
            **{f"vision_{name}": value for name, value in vars(_TOWERS[size]).items()},
            "initializer_range": 0.02,
        }
    )
    return new


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
    """Return checkpoints at an interval and every ten minutes, with the two newest kept."""
    return ConfigDict({"save_every_steps": every_steps, "save_every_minutes": 10.0, "num_kept": 2})


def resume() -> ConfigDict:
    """Return a continuation after the newest checkpoint of the same run."""
    return ConfigDict({"step": config_dict.placeholder(int), "allow_mismatch": False})


def log(*, every_steps: int) -> ConfigDict:
    """Return progress lines at an interval, for a standard error that is not a terminal."""
    return ConfigDict({"line_every_steps": every_steps, "wandb_project": ""})


def honesty(*, every_steps: int, num_pairs: int) -> ConfigDict:
    """Return the honesty panel, see docs/honesty.md; every_steps=None turns it off."""
    return ConfigDict({"every_steps": every_steps, "num_pairs": num_pairs})
