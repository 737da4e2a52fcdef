"""The demo's base checkpoint, as it is in the repository."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from models import sharding
from prism_jax.checkpoints import pretrained
from prism_jax.data import encode, examples, processor, prompts, records
from prism_jax.data.numerals import corpus as numerals_corpus
from prism_jax.data.numerals import examples as numerals_examples
from prism_jax.rollout import engine, serving
from prism_jax.rollout.sampling import Sampling

FOLDER = pathlib.Path(__file__).parents[1] / "launch" / "demo_base"
NUM_PICTURES = 64


@pytest.fixture(scope="module", params=[False, True], ids=["alone", "under a system prompt"])
def answers(request) -> list[tuple[str, set[str]]]:
    """Return greedy answers on handwriting of the test split, and both right ones of each."""
    words = processor.Processor.from_folder(FOLDER)
    model = pretrained.load(
        FOLDER, mesh=None, rules=sharding.REPLICATED, dtype=jnp.float32, param_dtype=jnp.float32
    )
    graphdef, params = serving.prepare(
        model.graphdef,
        model.params,
        dtype=jnp.float32,
        donate=False,
        mesh=None,
        rules=sharding.REPLICATED,
    )
    sampler = engine.Engine(
        graphdef=graphdef,
        config=model.config,
        shapes=engine.Shapes(prompt_tokens=320, prompt_patches=16, prompt_images=1),
        prefill_implementation="xla",
        decode_implementation="xla",
        chunk_tokens=64,
        num_slots=None,
        mesh=None,
        rules=sharding.REPLICATED,
        say=print,
    )
    rows = list(numerals_corpus.stream(level="tiny", seed=0, name="rl_test", rows=NUM_PICTURES))
    encoded = []
    for row in rows:
        asked = [records.Message(role="user", content=prompts.user_turn(row.question.text))]
        if request.param:
            asked.insert(0, records.Message(role="system", content=prompts.SYSTEM_PROMPT))
        found = words.encode(
            encode.messages(asked), images=[row.picture()], add_generation_prompt=True
        )
        encoded.append(examples.from_encoded(found, words))
    sampling = Sampling(
        temperature=0.0, top_k=None, top_p=None, max_tokens=96, end_token_ids=words.ids.ends
    )
    drawn = sampler.generate(params, encoded, sampling, jax.random.key(0), num_responses=1)
    return [
        (words.decode(tokens[:length]), _right_ones(row))
        for tokens, length, row in zip(drawn.tokens, drawn.lengths, rows, strict=True)
    ]


def _right_ones(row: numerals_examples.Example) -> set[str]:
    return {row.untagged(is_detailed=is_detailed).response for is_detailed in (False, True)}


def test_it_reads_handwriting_it_has_never_seen(answers):
    right = [given in wanted for given, wanted in answers]
    # A blind guess of the answer alone is right in a fifth of them.
    assert sum(right) > 0.75 * NUM_PICTURES


def test_it_does_not_know_the_format_of_the_method(answers):
    assert not any("<caption>" in given or "<answer>" in given for given, _ in answers)
