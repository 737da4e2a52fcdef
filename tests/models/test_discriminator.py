"""The discriminator: its trunks, its score, and no array of vocabulary size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import config as config_lib
from models import discriminator, inputs, moe, qwen3_vl, sharding
from tests.models import cases, weights

_TEXT_ONLY = {
    key: value
    for key, value in cases.CONFIGS["dense_tied_2_levels_head64"]["text_config"].items()
    if key != "rope_scaling"
} | {"model_type": "qwen3", "rope_scaling": None, "architectures": ["Qwen3ForCausalLM"]}
_CONFIGS = {
    "moe": cases.CONFIGS["moe_untied"],
    "dense": cases.CONFIGS["dense_untied_3_levels_head72"],
    "text_only": _TEXT_ONLY,
}


@functools.cache
def _model(trunk: str) -> tuple[nnx.GraphDef, nnx.State]:
    config = config_lib.from_hf(_CONFIGS[trunk])
    graphdef, abstract = qwen3_vl.abstract(
        lambda: discriminator.Discriminator(
            config,
            moe_implementation="dense" if config.text.moe else None,
            rules=sharding.REPLICATED,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            rngs=nnx.Rngs(0),
        )
    )
    return graphdef, weights.fill(abstract, _CONFIGS[trunk], cases.weight)


def _scores(trunk: str, rows: list[list[inputs.Example]], row_tokens: int):
    graphdef, params = _model(trunk)
    config = config_lib.from_hf(_CONFIGS[trunk])
    text = inputs.pack_text(
        rows, config=config, row_tokens=row_tokens, max_segments=6, num_vision_rows=1
    )
    vision = inputs.pack_vision(
        rows, config=config, row_patches=128, max_segments=12, num_vision_rows=1
    )
    last = np.zeros((len(rows), 4), np.int32)
    for number, row in enumerate(rows):
        last[number, : len(row)] = np.cumsum([len(e.tokens) for e in row]) - 1

    @jax.jit
    def run(params, text, vision, last):
        built = nnx.merge(graphdef, params)
        return built(text, vision, last, implementation="xla", remat="none")

    scores, stats = run(params, text, vision, last)
    found = [float(scores[r, m]) for r, row in enumerate(rows) for m in range(len(row))]
    return np.array(found), stats, params


def _examples(trunk: str) -> list[inputs.Example]:
    if trunk == "text_only":
        return [cases.example(f"s{n}", length) for n, length in enumerate((9, 4, 12, 7))]
    return [*cases.ROWS["rows_of_different_length"], cases.ROWS["one_image"][0]]


@pytest.mark.parametrize("trunk", _CONFIGS)
def test_segments_packed_into_rows_score_as_they_do_alone(trunk):
    examples = _examples(trunk)
    alone, stats, _ = _scores(trunk, [[e] for e in examples], 48)
    packed, packed_stats, _ = _scores(trunk, [examples[:2], examples[2:]], 96)
    np.testing.assert_allclose(packed, alone, atol=2e-5)
    assert (stats is None) == (trunk != "moe")
    if stats is not None:
        # Padding counts for no expert, so the counts are those of the tokens alone.
        np.testing.assert_allclose(packed_stats.choices, stats.choices)
        assert float(stats.tokens[0]) == sum(len(e.tokens) for e in examples)


@pytest.mark.torch
@pytest.mark.parametrize("trunk", _CONFIGS)
def test_scores_equal_the_head_on_hugging_faces_hidden_states(trunk):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    examples = _examples(trunk)
    found, _, params = _scores(trunk, [[e] for e in examples], 48)
    head = np.asarray(params["score"]["kernel"][...])[:, 0]
    if trunk == "text_only":
        config = transformers.AutoConfig.for_model(**_CONFIGS[trunk])
        built = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, value in built.named_parameters():
                value.copy_(torch.from_numpy(cases.weight(name, tuple(value.shape))))
        arguments = [{"input_ids": torch.from_numpy(e.tokens[None].astype(int))} for e in examples]
    else:
        reference = pytest.importorskip("tests.models.reference")
        built = reference.model(_CONFIGS[trunk])
        arguments = [reference.arguments([e]) for e in examples]
    for score, given in zip(found, arguments, strict=True):
        with torch.no_grad():
            hidden = built(**given, output_hidden_states=True).hidden_states[-1][0, -1].numpy()
        np.testing.assert_allclose(score, hidden @ head, rtol=1e-4, atol=1e-4)


def test_hidden_states_and_their_gradient_hold_no_array_of_vocabulary_size():
    config_json = cases.CONFIGS["dense_untied_3_levels_head72"]
    config_json = config_json | {"text_config": config_json["text_config"] | {"vocab_size": 4999}}
    config = config_lib.from_hf(config_json)
    graphdef, params = qwen3_vl.abstract(
        lambda: qwen3_vl.Qwen3VL(
            config,
            has_head=True,
            moe_implementation=None,
            rules=sharding.REPLICATED,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            rngs=nnx.Rngs(0),
        )
    )
    batch = cases.batch([[e] for e in cases.ROWS["rows_of_different_length"]], config)
    batch = jax.tree.map(jnp.asarray, batch)
    places = batch.text.tokens.shape[1]

    def loss(params, with_logits):
        built = nnx.merge(graphdef, params)
        hidden, _ = built(batch.text, batch.vision, implementation="xla", remat="full")
        return (built.logits(hidden) if with_logits else hidden).sum()

    def has_it(with_logits: bool) -> bool:
        jaxpr = str(jax.make_jaxpr(jax.grad(lambda p: loss(p, with_logits)))(params))
        return f"{places},4999]" in jaxpr

    assert has_it(True)
    assert not has_it(False)


def test_the_load_balance_term_is_least_when_experts_are_used_alike():
    def stats(choices, probability):
        return moe.RouterStats(
            choices=jnp.array([choices], jnp.float32),
            probability=jnp.array([probability], jnp.float32),
            tokens=jnp.array([10.0]),
        )

    # Ten tokens, two experts each, four experts: 4 x sum of (choices / 10) x (probability / 10).
    even = moe.load_balance(stats([5, 5, 5, 5], [2.5, 2.5, 2.5, 2.5]))
    uneven = moe.load_balance(stats([10, 10, 0, 0], [5, 5, 0, 0]))
    assert np.isclose(even, 2.0)
    assert np.isclose(uneven, 4.0)
