"""Make a small tokenizer of Qwen's kind and the processor files that stand beside it.

python -m tests.make_tokenizer FOLDER
"""

import json
import pathlib
import sys
from collections.abc import Sequence

from prism_jax.data import tokenizer_files

Ids = tokenizer_files.Ids
SENTENCES = (
    "What is the sum of the numbers in the picture?",
    "The first image shows three red bars and two blue bars, the second image shows a digit.",
    "Let me think: 3 + 4 = 7, so the answer is 7.",
    "You are a helpful assistant. Describe the image, then answer the question about it.",
    "<caption>A chart with four bars.</caption><think>The tallest bar is green.</think>",
    "<answer>12</answer>",
)


def write(
    folder: str | pathlib.Path,
    *,
    num_merges: int = 64,
    min_pixels: int = 65536,
    max_pixels: int = 16777216,
    video_min_pixels: int = 4096,
    video_max_pixels: int = 25165824,
    texts: Sequence[str] = SENTENCES,
) -> Ids:
    """Write tokenizer and processor files, its merges learned from `texts`; return the ids."""
    return tokenizer_files.write(
        folder,
        texts,
        num_merges=num_merges,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        video_min_pixels=video_min_pixels,
        video_max_pixels=video_max_pixels,
    )


def write_config(folder: str | pathlib.Path, ids: Ids) -> None:
    """Write the part of `config.json` that a processor reads, and `generation_config.json`."""
    folder = pathlib.Path(folder)
    config = {
        "model_type": "qwen3_vl",
        "image_token_id": ids.image_token_id,
        "video_token_id": ids.video_token_id,
        "vision_start_token_id": ids.vision_start_token_id,
        "vision_end_token_id": ids.vision_end_token_id,
        "text_config": {"model_type": "qwen3_vl_text", "vocab_size": ids.vocab_size},
    }
    _write_json(folder / "config.json", config)
    generation = {"eos_token_id": [ids.eos_token_id, ids.pad_token_id]}
    _write_json(folder / "generation_config.json", generation)


def _write_json(path: pathlib.Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    made = write(sys.argv[1])
    write_config(sys.argv[1], made)
    print(made)
