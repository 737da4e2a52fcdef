"""A sampler that answers from a script, and the files of a small evaluation."""

import pathlib
from collections.abc import Callable

import jax
import ml_collections
import numpy as np

from prism_jax.data import encode, processor, records, sources
from prism_jax.data.numerals import corpus as numerals_corpus
from prism_jax.data.numerals import examples as numerals_examples
from prism_jax.rollout import engine
from tests import data_files, tiny_checkpoint

# A response's text and whether it ends, from the row, the number of the response and a key.
Script = Callable[[records.PromptRow, int, jax.Array], tuple[str, bool]]


class Interrupted(Exception):
    """Stand for the end of a process in the middle of its work."""


def write_files(root: pathlib.Path, *, num_rows: int) -> pathlib.Path:
    """Write a policy and a test split of `numerals` with teacher texts; return the split."""
    tiny_checkpoint.write(root / "policy")
    none = dict.fromkeys(numerals_examples.STREAMS, 0)
    rows = numerals_corpus.rows_of("tiny", none | {"rl_test": num_rows})
    slips = numerals_corpus.slips_of("tiny", {})
    numerals_corpus.write(
        root / "corpus", level="tiny", seed=0, rows=rows, slips=slips, num_processes=1
    )
    return root / "corpus" / "rl" / "test.parquet"


def read_rows(path: pathlib.Path) -> list[records.PromptRow]:
    """Return the rows of a split."""
    return data_files.read_all(sources.Source(kind="prompts", path=str(path)))[0]


def configure(
    module, root: pathlib.Path, path: pathlib.Path, changes: dict | None = None
) -> ml_collections.ConfigDict:
    """Return the tiny configuration of a stage on one device, with some fields changed."""
    config = module.get_config("tiny")
    config.policy.folder = str(root / "policy")
    config.prompts.path = str(path)
    config.mesh.num_devices = 1
    config.max_tokens = 512
    config.update_from_flattened_dict(changes or {})
    return config


def by_key(row: records.PromptRow, number: int, key: jax.Array) -> tuple[str, bool]:
    """Respond in other words for each key: rightly, wrongly, without a caption, or cut."""
    del number
    kind, word = (int(n) for n in jax.random.randint(key, (2,), 0, np.array([6, 1000])))
    caption = row.teacher_caption.replace("</caption>", f"- Read {word}.\n</caption>")
    cot = row.teacher_cot.replace("</think>", f"Surely {word}.\n</think>")
    if kind in (3, 4):
        cot = cot.replace(f"<answer>\n{row.ground_truth}\n", f"<answer>\n{word}\n")
    return (cot if kind == 5 else caption + cot), kind != 2


def open_by_key(source, policy, devices) -> "ScriptedSampler":
    """Open a sampler that answers the split of `write_files` by `by_key`."""
    del source, devices
    root = pathlib.Path(policy.folder).parent
    rows = read_rows(root / "corpus" / "rl" / "test.parquet")
    return ScriptedSampler(root / "policy", rows, by_key)


class ScriptedSampler:
    """Answer every prompt as the script says; stop after so many batches."""

    def __init__(
        self,
        policy: pathlib.Path,
        rows: list[records.PromptRow],
        script: Script,
        *,
        num_batches: int | None = None,
    ):
        self._words = processor.Processor.from_folder(policy)
        self._rows = {}
        for row in rows:
            asked = encode.example(
                row.prompt, records.get_media(row), self._words, add_generation_prompt=True
            )
            self._rows[self._key(asked)] = row
        self._script = script
        self._batches_left = num_batches
        self.num_opened = 0
        self.max_tokens: set[int] = set()  # of a response, as the batches were asked
        self.batches: list[list[str]] = []  # ids of the rows of each batch that was asked

    def open(self, source, policy, devices) -> "ScriptedSampler":
        """Stand for the loading of a policy."""
        del source, policy, devices
        self.num_opened += 1
        return self

    def __call__(self, prompts, sampling, key, *, num_responses, shapes) -> engine.Rollout:
        """Return the script's responses as tokens."""
        del shapes
        if self._batches_left is not None:
            if self._batches_left == 0:
                raise Interrupted
            self._batches_left -= 1
        self.max_tokens.add(sampling.max_tokens)
        rows = [self._rows[self._key(prompt)] for prompt in prompts]
        self.batches.append([row.id for row in rows])
        size = len(rows) * num_responses
        tokens = np.zeros((size, sampling.max_tokens), np.int32)
        lengths, ended = np.zeros(size, np.int32), np.zeros(size, bool)
        for place in range(size):
            row = rows[place // num_responses]
            one_key = jax.random.fold_in(key, place)
            text, ended[place] = self._script(row, place % num_responses, one_key)
            # Piece by piece, so that the name of a special token is spelt in ordinary tokens.
            pieces = text.split("\0")
            ids = [i for p in pieces for i in self._words.tokenizer.encode(p)]
            ids += [self._words.tokenizer.eos_token_id] if ended[place] else []
            assert len(ids) <= sampling.max_tokens, "the script is too long for the test's limit"
            tokens[place, : len(ids)], lengths[place] = ids, len(ids)
        return engine.Rollout(
            tokens=tokens,
            logprobs=np.zeros(tokens.shape, np.float32),
            lengths=lengths,
            ended=ended,
        )

    def _key(self, prompt) -> bytes:
        return prompt.tokens.tobytes() + b"".join(pixels.tobytes() for pixels in prompt.pixels)
