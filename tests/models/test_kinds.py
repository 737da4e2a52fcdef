"""Experts and score heads of captions and cots: kept apart exactly, or not at all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from models import config as config_lib
from models import discriminator, inputs, kinds, moe, qwen3_vl, sharding
from prism_jax import batches
from prism_jax import mesh as mesh_lib
from tests.models import cases

_EXAMPLES = [*cases.ROWS["rows_of_different_length"], cases.ROWS["one_image"][0]]
_REPLICATED = sharding.REPLICATED
# Of the first row of two sequences, and the second.
_KINDS = [[kinds.CAPTION, kinds.COT], [kinds.WHOLE, kinds.COT]]


def _config_json(router: str, heads: int, name: str = "moe_untied") -> dict:
    return cases.CONFIGS[name] | {kinds.KEY: {"router": router, "heads": heads}}


@functools.cache
def _model(
    router: str, heads: int, implementation: str = "dense", rules: sharding.Rules = _REPLICATED
):
    config = config_lib.from_hf(_config_json(router, heads))
    graphdef, abstract = qwen3_vl.abstract(
        lambda: discriminator.Discriminator(
            config,
            moe_implementation=implementation,
            rules=rules,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            rngs=nnx.Rngs(0),
        )
    )
    filled = [
        (path, leaf.replace(jnp.asarray(cases.weight(".".join(map(str, path)), leaf.shape))))
        for path, leaf in nnx.to_flat_state(abstract)
    ]
    return config, graphdef, nnx.from_flat_state(filled)


def _inputs(config, rows: list[list[inputs.Example]], row_tokens: int, *, num_vision_rows: int = 1):
    shared = {"config": config, "num_vision_rows": num_vision_rows}
    text = inputs.pack_text(rows, row_tokens=row_tokens, max_segments=6, **shared)
    vision = inputs.pack_vision(rows, row_patches=128, max_segments=12, **shared)
    last = np.zeros((len(rows), 2), np.int32)
    for number, row in enumerate(rows):
        last[number, : len(row)] = np.cumsum([len(e.tokens) for e in row]) - 1
    return text, vision, last


@functools.cache
def _runner(router: str, heads: int, implementation: str = "dense"):
    graphdef = _model(router, heads, implementation)[1]

    @jax.jit
    def run(params, text, vision, last, kind):
        built = nnx.merge(graphdef, params)
        return built(text, vision, last, implementation="xla", remat="none", kind=kind)

    return run


def _packed(router: str, heads: int, kind=_KINDS, implementation: str = "dense"):
    config, _, params = _model(router, heads, implementation)
    rows = [_EXAMPLES[:2], _EXAMPLES[2:]]
    kind = None if kind is None else np.array(kind, np.int32)
    return _runner(router, heads, implementation)(params, *_inputs(config, rows, 64), kind)


def _alone(router: str, heads: int, kind: int, number: int) -> float:
    config, _, params = _model(router, heads)
    given = _inputs(config, [[_EXAMPLES[number]]], 64)
    kind = np.full((1, 2), kind, np.int32)
    return float(_runner(router, heads)(params, *given, kind)[0][0, 0])


@functools.cache
def _gradients(router: str) -> dict[int, dict[tuple, np.ndarray]]:
    """Return the gradient of the first caption's and the first cot's score, in a row together."""
    config, graphdef, params = _model(router, 2)
    given = jax.tree.map(jnp.asarray, _inputs(config, [_EXAMPLES[:2]], 64))
    kind = jnp.array(_KINDS[:1], jnp.int32)

    def scores(params):
        built = nnx.merge(graphdef, params)
        return built(*given, implementation="xla", remat="full", kind=kind)[0][0]

    found = jax.jit(jax.jacrev(scores))(params)
    flat = {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(found)}
    return {
        kind: {path: value[slot] for path, value in flat.items()}
        for slot, kind in enumerate((kinds.CAPTION, kinds.COT))
    }


def test_without_the_key_and_with_its_first_choices_the_model_is_the_same_bit_for_bit():
    bare = config_lib.from_hf(cases.CONFIGS["moe_untied"])
    assert config_lib.from_hf(_config_json("token", 1)) == bare
    assert kinds.entry(kinds.RELEASED) == {}
    told, told_stats = _packed("token", 1)
    untold, stats = _packed("token", 1, kind=None)
    np.testing.assert_array_equal(told, untold)
    for name in ("choices", "probability", "tokens"):
        np.testing.assert_array_equal(getattr(told_stats, name), getattr(stats, name))
    assert moe.load_balance(told_stats) == moe.load_balance(stats)
    assert stats.by_kind is None
    np.testing.assert_array_equal(told_stats.by_kind.choices.sum(-2), stats.choices)
    np.testing.assert_allclose(told_stats.by_kind.probability.sum(-2), stats.probability, 1e-5)


def test_with_a_segment_router_no_gradient_reaches_the_experts_of_the_other_kind():
    gradients = _gradients("segment")
    own = {kinds.CAPTION: slice(0, 2), kinds.COT: slice(2, 4)}
    for kind, of_score in gradients.items():
        for name in ("gate", "up", "down"):
            experts = of_score["trunk", "text", "layers", "moe", name]  # [L, E, …]
            other = own[kinds.CAPTION + kinds.COT - kind]
            assert (experts[:, other] == 0).all()
            # Both own experts, in every layer.
            assert (np.abs(experts[:, own[kind]]).max((2, 3)) > 0).all()
        router = of_score["trunk", "text", "layers", "moe", "router", "kernel"]  # [L, D, E]
        assert (router[..., other] == 0).all()
        assert (np.abs(router[..., own[kind]]).max(1) > 0).all()


def test_with_a_token_router_gradients_reach_the_experts_of_both_kinds():
    for of_score in _gradients("token").values():
        experts = of_score["trunk", "text", "layers", "moe", "down"]
        assert (np.abs(experts).max((0, 2, 3)) > 0).all()


@pytest.mark.parametrize("router", kinds.ROUTERS)
def test_with_two_heads_no_gradient_reaches_the_head_of_the_other_kind(router):
    gradients = _gradients(router)
    for kind, of_score in gradients.items():
        head = of_score["score", "kernel"]  # [D, 2]
        assert (head[:, kinds.COT - kind] == 0).all()
        assert np.abs(head[:, kind - kinds.CAPTION]).max() > 0


@pytest.mark.parametrize(("router", "heads"), [("segment", 1), ("segment", 2), ("token", 2)])
def test_segments_packed_together_score_as_they_do_alone(router, heads):
    scores, _ = _packed(router, heads)
    alone = [_alone(router, heads, kind, n) for n, kind in enumerate(np.ravel(_KINDS))]
    np.testing.assert_allclose(np.ravel(scores), alone, atol=2e-5)


def test_the_kind_changes_a_score_where_something_is_kept_apart_and_only_there():
    one = {
        key: [_alone(*key, kind, 0) for kind in range(len(kinds.NAMES))]
        for key in (("token", 1), ("segment", 1), ("token", 2))
    }
    assert len(set(one["token", 1])) == 1
    assert np.ptp(one["segment", 1]) > 1e-3
    whole, caption, cot = one["token", 2]
    assert abs(caption - cot) > 1e-3
    np.testing.assert_allclose(whole, (caption + cot) / 2, atol=1e-5)


def test_tokens_of_each_kind_go_to_its_half_of_the_experts_and_whole_responses_to_all():
    _, stats = _packed("segment", 1)
    lengths = np.array([len(e.tokens) for e in _EXAMPLES])
    of_kind = np.zeros(3)
    np.add.at(of_kind, np.ravel(_KINDS), lengths)
    for layer in range(3):
        choices = np.asarray(stats.by_kind.choices[layer])
        # Two experts for each kind and two a token: each of them has every token.
        np.testing.assert_array_equal(choices[kinds.CAPTION], [lengths[0]] * 2 + [0, 0])
        np.testing.assert_array_equal(choices[kinds.COT], [0, 0] + [of_kind[kinds.COT]] * 2)
        assert choices[kinds.WHOLE].sum() == 2 * lengths[2]
        assert (choices[kinds.WHOLE, :2].sum() > 0) and (choices[kinds.WHOLE, 2:].sum() > 0)
    np.testing.assert_array_equal(stats.by_kind.tokens, [of_kind] * 3)


def test_sorted_experts_answer_as_all_of_them_do():
    dense, _ = _packed("segment", 2)
    ragged, _ = _packed("segment", 2, implementation="ragged")
    np.testing.assert_allclose(dense, ragged, atol=2e-5)


@pytest.mark.parametrize("implementation", ["dense", "ragged"])
def test_experts_on_devices_of_their_own_answer_as_on_one(implementation):
    expected, expected_stats = _packed("segment", 2, implementation=implementation)
    rules = mesh_lib.rules(mesh_lib.DEFAULT_RULES)
    config, graphdef, params = _model("segment", 2, implementation, rules)
    mesh = mesh_lib.make({"data": 1, "fsdp": 2, "tensor": 1, "expert": 4})
    text, vision, last = _inputs(config, [_EXAMPLES[:2], _EXAMPLES[2:]], 64, num_vision_rows=2)
    places = batches.shardings((text, vision, last, last), mesh, rules)

    def without_microbatches(place):
        return NamedSharding(mesh, PartitionSpec(*place.spec[1:]))

    places = jax.tree.map(without_microbatches, places)
    given = jax.device_put((text, vision, last, np.array(_KINDS, np.int32)), places)
    params = jax.device_put(params, mesh_lib.param_shardings(params, mesh, rules))

    @jax.jit
    def run(params, text, vision, last, kind):
        built = nnx.merge(graphdef, params)
        return built(text, vision, last, implementation="xla", remat="none", kind=kind)

    with jax.set_mesh(mesh):
        found, stats = run(params, *given)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_array_equal(stats.by_kind.choices, expected_stats.by_kind.choices)


def test_a_segment_routers_balance_is_that_of_each_kind_averaged_over_tokens():
    def stats(choices, probability, tokens):
        zeros = [0.0] * 4
        return moe.RouterStats(
            choices=jnp.zeros(4),
            probability=jnp.zeros(4),
            tokens=jnp.array(sum(tokens)),
            by_kind=moe.RouterStats(
                choices=jnp.array([zeros, *choices]),
                probability=jnp.array([zeros, *probability]),
                tokens=jnp.array([0.0, *tokens]),
            ),
            router="segment",
        )

    # One expert a token. Captions: 10 tokens on two experts alike: 2 x (1/2 x 1/2 + 1/2 x 1/2) = 1.
    # Cots: 30 tokens, all on one expert with certainty: 2 x 1 x 1 = 2.
    found = moe.load_balance(
        stats([[5.0, 5, 0, 0], [0, 0, 30.0, 0]], [[5.0, 5, 0, 0], [0, 0, 30.0, 0]], [10.0, 30.0])
    )
    np.testing.assert_allclose(found, (10 * 1 + 30 * 2) / 40)


def test_the_balance_of_two_experts_for_two_a_token_is_constant():
    _, stats = _packed("segment", 1, kind=[[kinds.CAPTION, kinds.COT]] * 2)
    np.testing.assert_allclose(moe.load_balance(stats), 2.0, rtol=1e-6)


def test_a_model_that_keeps_kinds_apart_must_be_told_them():
    with pytest.raises(ValueError, match="must be told the kind"):
        _packed("segment", 1, kind=None)
    with pytest.raises(ValueError, match="two heads must be told"):
        _packed("token", 2, kind=None)


def test_head_dropout_is_right_on_average_drops_that_share_and_repeats_with_its_key():
    config, graphdef, params = _model("token", 1)
    given = jax.tree.map(jnp.asarray, _inputs(config, [_EXAMPLES[:2]], 64))

    def run(rate, keys):
        def score(params, key):
            built = nnx.merge(graphdef, params)
            drop = discriminator.HeadDropout(rate=rate, key=key)
            kwargs = {"implementation": "xla", "remat": "none", "head_dropout": drop}
            return built(*given, **kwargs)[0][0]

        return np.asarray(jax.jit(jax.vmap(score, (None, 0)))(params, keys))

    plain = np.asarray(_packed("token", 1)[0][0])
    keys = jax.random.split(jax.random.key(0), 4000)
    found = run(0.1, keys)
    deviation = found.std(0) / len(keys) ** 0.5
    assert (np.abs(found.mean(0) - plain) < 5 * deviation).all() and (deviation > 0).all()
    np.testing.assert_allclose(run(0.1, keys[:3]), found[:3], atol=1e-6)
    np.testing.assert_allclose(run(0.0, keys[:1])[0], plain, atol=1e-5)
    # The variance of a sum of h w with shares kept 1 - p and scaled by 1 / (1 - p).
    hidden_params = jax.tree.map(lambda x: x, params)
    head = np.asarray(params["score"]["kernel"][...])[:, 0]
    eye = jnp.eye(len(head))
    columns = []
    for column in range(len(head)):
        hidden_params["score"]["kernel"] = params["score"]["kernel"].replace(eye[:, column, None])
        kind = np.array(_KINDS[:1], np.int32)
        columns.append(_runner("token", 1)(hidden_params, *given, kind)[0][0])
    parts = np.stack(columns, -1) * head  # [2, D]
    expected = (parts**2).sum(-1) * 0.1 / 0.9
    np.testing.assert_allclose(found.var(0), expected, rtol=0.15)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("moe_untied", {"router": "experts", "heads": 1}, "router must be one of token, segment"),
        ("moe_untied", {"router": "token", "heads": 3}, "heads must be 1 or 2, got 3"),
        ("moe_untied", {"router": "token", "heads": True}, "heads must be 1 or 2, got True"),
        ("moe_untied", {"router": "token"}, "must hold router and heads"),
        ("moe_untied", {"router": "token", "heads": 1, "more": 0}, "must hold router and heads"),
        ("moe_untied", "segment", "must hold router and heads"),
        (
            "dense_tied_2_levels_head64",
            {"router": "segment", "heads": 1},
            "needs a mixture of experts",
        ),
    ],
)
def test_a_wrong_choice_in_config_json_is_refused(name, value, told):
    with pytest.raises(ValueError, match=told):
        config_lib.from_hf(cases.CONFIGS[name] | {kinds.KEY: value})


@pytest.mark.parametrize(("experts", "each"), [(3, 1), (4, 3), (2, 2)])
def test_experts_that_cannot_be_shared_out_are_refused(experts, each):
    with pytest.raises(ValueError, match="at least twice num_experts_per_token"):
        kinds.check_experts("segment", num_experts=experts, num_experts_per_token=each)
    kinds.check_experts("token", num_experts=experts, num_experts_per_token=each)
