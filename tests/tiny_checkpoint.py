"""A tiny checkpoint folder that is complete: weights, tokenizer, chat template, image settings."""

import json
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from models import config as config_lib
from models import sharding
from prism_jax.checkpoints import pretrained
from tests import hf_checkpoints, make_tokenizer
from tests.models import cases, weights


def config_json(ids: make_tokenizer.Ids, *, num_experts: int | None, tied: bool) -> dict:
    """Return the `config.json` of a tiny model with real patch sizes and this tokenizer's ids."""
    config = cases.config_json(
        num_experts=num_experts, tied=tied, num_layers=2, vision_heads=(2, 16), deepstack=[0, 2]
    )
    config["vision_config"]["patch_size"] = 16
    config["text_config"]["vocab_size"] = ids.vocab_size
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    for name in names:
        config[name] = ids.__getattribute__(name)
    return config


def write(
    folder: pathlib.Path,
    *,
    num_experts: int | None = None,
    tied: bool = True,
    dtype=np.float32,
    score: bool = False,
    texts: Sequence[str] = make_tokenizer.SENTENCES,
    num_merges: int = 64,
) -> pathlib.Path:
    """Write the folder; every tensor's values follow from its name.

    The tokenizer's merges are learnt from `texts`.
    """
    folder.mkdir(parents=True)
    pixels = {"min_pixels": 32 * 32, "max_pixels": 128 * 128}
    ids = make_tokenizer.write(folder, num_merges=num_merges, texts=texts, **pixels)
    config = config_json(ids, num_experts=num_experts, tied=tied)
    _, params = pretrained.abstract(
        config_lib.from_hf(config),
        is_discriminator=score,
        rules=sharding.REPLICATED,
        dtype=dtype,
        param_dtype=dtype,
    )
    shapes = weights.disk_shapes(params, config, "4.57")
    tensors = {name: cases.weight(name, shape).astype(dtype) for name, shape in shapes.items()}
    written = hf_checkpoints.write_tensors(folder / "written", config, tensors, num_files=1)
    for path in written.iterdir():
        path.rename(folder / path.name)
    written.rmdir()
    ends = [ids.eos_token_id, ids.pad_token_id]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


def picture(folder: pathlib.Path, name: str, size: tuple[int, int]) -> pathlib.Path:
    """Write a smooth PNG of (width, height) pixels."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    pixels = np.stack([x, y, 255 - x], -1).astype(np.uint8)
    path = folder / name
    Image.fromarray(pixels).save(path)
    return path
