"""The inputs of `benchmarks.eight_gpus` and `one_gpu`: random checkpoints and a small corpus.

Both are made on the machine itself, in one folder, and kept when they exist.
"""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks import rollout_cases, sizes
from models import config as config_lib
from models import sharding, upcycle
from models.hf import checkpoint as hf_checkpoint
from models.hf import names as hf_names
from models.hf import writer as hf_writer
from prism_jax.checkpoints import pretrained

# The discriminator of each size of a policy, upcycled from a dense model of this size.
_DISCRIMINATORS = {"tiny": "tiny", "2b": "2b", "4b": "2b", "8b": "2b"}
_NUM_EXPERTS = 4
_STD = 0.02
_BLOCK = 1 << 24  # numbers that are made anew; larger tensors repeat them
# Rows of each part of the corpus, enough for five steps of every configuration.
_ROWS = {"public": 1024, "align": 512, "rl_train": 256, "rl_test": 192}
_TINY_ROWS = {"public": 48, "align": 48, "rl_train": 16, "rl_test": 8}
_CAPTION_END, _THINK_END = "</caption>", "\n</think>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """The folders and files of one size."""

    folder: pathlib.Path
    size: str  # of the configurations: tiny, 4b, 4b_one_gpu, …

    @property
    def policy_size(self) -> str:
        """Return the size of the policy, by its name in `sizes`."""
        return self.size.removesuffix("_one_gpu")

    @property
    def dense_size(self) -> str:
        """Return the size of the dense model from which the discriminator is upcycled."""
        return _DISCRIMINATORS[self.policy_size]

    @property
    def tokenizer(self) -> pathlib.Path:
        """Return the folder of the tokenizer that all models have."""
        return self.folder / "tokenizer"

    @property
    def policy(self) -> pathlib.Path:
        """Return the folder of the policy."""
        return self.folder / "models" / self.policy_size

    @property
    def dense(self) -> pathlib.Path:
        """Return the folder of the dense model from which a trunk is upcycled."""
        return self.folder / "models" / self.dense_size

    @property
    def trunk(self) -> pathlib.Path:
        """Return the folder that `upcycle` writes."""
        return self.folder / "models" / f"{self.dense_size}_upcycled"

    @property
    def discriminator(self) -> pathlib.Path:
        """Return the folder of the discriminator, with its score head."""
        return self.folder / "models" / f"{self.dense_size}_x{_NUM_EXPERTS}"

    @property
    def corpus(self) -> pathlib.Path:
        """Return the folder of the corpus; its pictures are larger for larger models."""
        return self.folder / ("corpus_tiny" if self.size == "tiny" else "corpus")

    @property
    def demonstrations(self) -> str:
        """Return the data set of SFT."""
        return f"{self.corpus / 'sft' / 'dataset_info.json'}#long"

    @property
    def pairs(self) -> pathlib.Path:
        """Return the pairs of the warm-up."""
        return self.corpus / "sft" / "pairs.jsonl"


def _command(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "prism_jax", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def write(inputs: Inputs, *, mean_tokens: int) -> None:
    """Write the policy and the corpus, where they do not exist yet.

    Args:
      mean_tokens: of a demonstration's and a student's reasoning, about; lengths are log-normal.
    """
    write_dense(inputs, inputs.policy, inputs.policy_size)
    if not inputs.pairs.exists():
        _write_corpus(inputs, mean_tokens=mean_tokens)


def write_dense(inputs: Inputs, folder: pathlib.Path, size: str) -> None:
    """Write a dense model, where it does not exist yet."""
    ids = _write_tokenizer(inputs.tokenizer)
    folder.parent.mkdir(exist_ok=True)
    if not folder.exists():
        write_checkpoint(folder, _json(size, ids), inputs.tokenizer, has_score=False)


def write_discriminator(inputs: Inputs) -> None:
    """Write the discriminator, where it does not exist yet."""
    ids = _write_tokenizer(inputs.tokenizer)
    if not inputs.discriminator.exists():
        options = upcycle.Options(
            num_experts=_NUM_EXPERTS,
            num_experts_per_token=2,
            noise_std=0.01,
            noise="absolute",
            router_std=0.02,
            seed=0,
            router="token",
            heads=1,
        )
        values = upcycle.moe_config(_json(inputs.dense_size, ids), options)
        write_checkpoint(inputs.discriminator, values, inputs.tokenizer, has_score=True)


def _write_tokenizer(folder: pathlib.Path) -> dict[str, Any]:
    """Write a tokenizer of the corpus's language; return the ids that models must have."""
    marker = folder / "ids.json"
    if not marker.exists():
        ids = json.loads(_command("data", "tokenizer", f"--out={folder}"))
        ends = [ids["eos_token_id"], ids["pad_token_id"]]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        marker.write_text(json.dumps(ids))
    return json.loads(marker.read_text())


def _json(size: str, ids: dict[str, Any]) -> dict[str, Any]:
    """Return `config.json` of a dense model with its published vocabulary and these special ids."""
    config = sizes.SIZES[size]
    vocab_size = max(config.text.vocab_size, ids["vocab_size"])
    text = dataclasses.replace(config.text, vocab_size=vocab_size)
    values = sizes.config_json(dataclasses.replace(config, text=text))
    return values | {name: ids[name] for name in values if name in ids}


def write_checkpoint(
    folder: pathlib.Path, config_json: dict[str, Any], tokenizer: pathlib.Path, *, has_score: bool
) -> None:
    """Write a folder of random bfloat16 weights as the hub has it; scales are 1, biases 0."""
    _, params = pretrained.abstract(
        config_lib.from_hf(config_json),
        is_discriminator=has_score,
        rules=sharding.REPLICATED,
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
    )
    names = hf_names.naming(config_json)
    leaves = hf_checkpoint.values_by_path(params).items()
    entries = [hf_names.weight(path, leaf.shape, names, "4.57") for path, leaf in leaves]
    shapes = {name: entry.disk_shape for entry in entries for name in entry.names}
    planned = [hf_writer.Planned(name, "BF16", shape) for name, shape in sorted(shapes.items())]
    hf_writer.write_folder(
        folder,
        hf_writer.shards(planned, hf_writer.SHARD_BYTES),
        _random,
        config_json=config_json,
        copy_from=tokenizer,
    )


@functools.cache
def _block() -> np.ndarray:
    numbers = np.random.default_rng(0).standard_normal(_BLOCK, np.float32) * _STD
    return numbers.astype(jnp.bfloat16)


def _random(tensor: hf_writer.Planned) -> Iterable[bytes]:
    """Yield a tensor's bytes: a part of the block that its name chooses, and so on around it."""
    count = tensor.num_bytes // tensor.item_bytes
    if len(tensor.shape) == 1:
        value = 0 if tensor.name.endswith("bias") else 1
        yield np.full(count, value, jnp.bfloat16).tobytes()
        return
    block, place = _block(), zlib.crc32(tensor.name.encode()) % _BLOCK
    while count:
        piece = block[place : place + count]
        yield piece.tobytes()
        count, place = count - len(piece), 0


def _write_corpus(inputs: Inputs, *, mean_tokens: int) -> None:
    """Write the corpus, demonstrations with reasoning of log-normal length, and pairs."""
    is_tiny = inputs.size == "tiny"
    rows = {"base": 0, "teacher": 0, **(_TINY_ROWS if is_tiny else _ROWS)}
    options = [f"--rows={part}={count}" for part, count in rows.items()]
    level = f"--level={'tiny' if is_tiny else 'small'}"
    _command("data", "numerals", level, f"--out={inputs.corpus}", *options)
    path = inputs.corpus / "sft" / "public.json"
    demonstrations = json.loads(path.read_text())
    lengths = rollout_cases.lengths(len(demonstrations), mean=mean_tokens, most=6 * mean_tokens)
    for row, length in zip(demonstrations, lengths, strict=True):
        row["messages"][-1]["content"] = _lengthened(row["messages"][-1]["content"], int(length))
    path.with_name("long.json").write_text(json.dumps(demonstrations))
    info_path = path.with_name("dataset_info.json")
    info = json.loads(info_path.read_text())
    info["long"] = info["numerals_public"] | {"file_name": "long.json"}
    info_path.write_text(json.dumps(info))
    # Last: it marks a finished corpus.
    lines = [json.dumps(pair) + "\n" for pair in _pairs(demonstrations)]
    inputs.pairs.write_text("".join(lines))


def _lengthened(text: str, num_words: int) -> str:
    """Return a text whose reasoning has so many words more."""
    return text.replace(_THINK_END, " even" * num_words + _THINK_END)


def _pairs(demonstrations: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a pair a demonstration: the student's texts are those of the next demonstration."""
    segments = [
        _segments(demonstration["messages"][-1]["content"]) for demonstration in demonstrations
    ]
    for number, demonstration in enumerate(demonstrations):
        teacher, student = segments[number], segments[(number + 1) % len(segments)]
        yield {
            "prompt": demonstration["messages"][1]["content"],
            "image": demonstration["images"][0],
            "teacher_caption": teacher[0],
            "teacher_cot": teacher[1],
            "student_caption": student[0],
            "student_cot": student[1],
        }


def _segments(response: str) -> tuple[str, str]:
    """Return caption and reasoning with the answer."""
    caption, end, rest = response.partition(_CAPTION_END)
    return caption + end, rest.lstrip()
