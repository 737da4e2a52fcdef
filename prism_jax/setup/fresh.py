"""A folder for a new model: tokenizer files, and a `config.json` of the configured sizes."""

import contextlib
import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from models import config as config_lib
from models.hf import files as hf_files
from models.hf import writer as hf_writer
from prism_jax import configuration, errors
from prism_jax.data import chat, image_settings

_TOKENS = {
    "image_token_id": chat.IMAGE_TOKEN,
    "video_token_id": chat.VIDEO_TOKEN,
    "vision_start_token_id": chat.VISION_START_TOKEN,
    "vision_end_token_id": chat.VISION_END_TOKEN,
}


@contextlib.contextmanager
def folder(
    tokenizer_folder: str | pathlib.Path, sizes: configuration.Sizes
) -> Iterator[pathlib.Path]:
    """Yield a temporary folder with the small files of a Qwen3-VL of these sizes.

    Raises:
      InputError: the folder lacks a file, or the sizes do not fit each other.
    """
    source = pathlib.Path(tokenizer_folder)
    if not source.is_dir():
        raise errors.InputError(f"config.model.folder = {source}: no such folder")
    with tempfile.TemporaryDirectory() as name:
        made = pathlib.Path(name)
        for file in hf_writer.COPIED:
            if (source / file).exists():
                try:
                    shutil.copyfile(hf_files.inside(source, file), made / file)
                except ValueError as error:
                    raise errors.InputError(str(error)) from error
        values = config_json(made, sizes)
        try:
            config_lib.from_hf(values)
        except ValueError as error:
            raise errors.InputError(f"config.model.sizes: {error}") from error
        (made / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        yield made


def config_json(files: pathlib.Path, sizes: configuration.Sizes) -> dict:
    """Return the Hugging Face `config.json` of these sizes, ids and patches from the folder.

    Source: the form of Qwen/Qwen3-VL-2B-Instruct's. Of the frequencies of M-RoPE time has the
    larger part, as 24, 20, 20 of the published head size 128.
    """
    vocabulary = _vocabulary(files)
    images = image_settings.ImageSettings.from_folder(files)
    missing = [token for token in _TOKENS.values() if token not in vocabulary]
    if missing:
        raise errors.InputError(f"config.model.folder: the tokenizer has no {', '.join(missing)}")
    side = sizes.head_dim * 20 // 128
    text = {
        "model_type": "qwen3_vl_text",
        "vocab_size": max(vocabulary.values()) + 1,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "rope_theta": sizes.rope_theta,
        "rope_scaling": {
            "rope_type": "default",
            "mrope_section": [sizes.head_dim // 2 - 2 * side, side, side],
            "mrope_interleaved": True,
        },
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": sizes.initializer_range,
        "tie_word_embeddings": sizes.tie_word_embeddings,
    }
    vision = {
        "model_type": "qwen3_vl",
        "depth": sizes.vision_num_layers,
        "hidden_size": sizes.vision_hidden_size,
        "hidden_act": "gelu_pytorch_tanh",
        "intermediate_size": sizes.vision_intermediate_size,
        "num_heads": sizes.vision_num_heads,
        "in_channels": 3,
        "patch_size": images.patch_size,
        "spatial_merge_size": images.merge_size,
        "temporal_patch_size": images.temporal_patch_size,
        "out_hidden_size": sizes.hidden_size,
        "num_position_embeddings": sizes.vision_num_position_embeddings,
        "deepstack_visual_indexes": list(sizes.vision_deepstack_layers),
    }
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "text_config": text,
        "vision_config": vision,
        **{name: vocabulary[token] for name, token in _TOKENS.items()},
        "tie_word_embeddings": sizes.tie_word_embeddings,
    }


def _vocabulary(files: pathlib.Path) -> dict[str, int]:
    """Return the id of every token, added ones included."""
    path = files / "tokenizer.json"
    if not path.is_file():
        raise errors.InputError("config.model.folder: a new model needs a tokenizer.json there")
    try:
        tokenizer = image_settings.read_json(path)
        added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
        return tokenizer["model"]["vocab"] | added
    except (KeyError, TypeError) as error:
        raise errors.InputError(f"{path}: not a byte-level BPE tokenizer: {error}") from error
