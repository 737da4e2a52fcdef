"""The discriminator's scores and update over packed segments, against one segment at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import config as config_lib
from models import discriminator, inputs, qwen3_vl, sharding
from prism_jax import continuations, discriminator_update
from prism_jax.continuations import Continuation
from tests.models import cases

_PROMPTS = [*cases.ROWS["rows_of_different_length"][:2], *cases.ROWS["one_image"]]
_CASE = "moe_untied"
_CONFIG = config_lib.from_hf(cases.CONFIGS[_CASE])
_SETTINGS = discriminator_update.Settings(implementation="xla", remat="none")
_RULE = discriminator_update.PairRule(score_clip=10.0, regulariser=0.1, router=0.0)
_NAMES = ("caption", "cot")
_NUM_RESPONSES = 2


@functools.cache
def _model():
    graphdef, params = qwen3_vl.abstract(
        lambda: discriminator.Discriminator(
            _CONFIG,
            moe_implementation="dense",
            rules=sharding.REPLICATED,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            rngs=nnx.Rngs(0),
        )
    )
    values = {
        path: leaf.replace(jnp.asarray(cases.weight(".".join(map(str, path)), leaf.shape)))
        for path, leaf in nnx.to_flat_state(params)
    }
    return graphdef, nnx.from_flat_state(list(values.items()))


def _segment(prompt, name, number):
    rng = np.random.default_rng([prompt, name, number])
    return Continuation(
        prompt=prompt, tokens=rng.integers(1, 180, rng.integers(2, 9)).astype(np.int32)
    )


@functools.cache
def _segments():
    """Return {(prompt, name, number): segment}; number 0 is the teacher's."""
    return {
        (prompt, name, number): _segment(prompt, name, number)
        for prompt in range(len(_PROMPTS))
        for name in range(len(_NAMES))
        for number in range(1 + _NUM_RESPONSES)
    }


def _shape(num_units, unit_sequences, row_tokens=96, microbatch_rows=2):
    return continuations.row_shape(
        continuations.Largest(
            num_units=num_units,
            unit_sequences=unit_sequences,
            unit_tokens=unit_sequences * (20 + 9),
            continued_tokens=unit_sequences * 9,
            prompt_patches=24,
            prompt_frames=1,
        ),
        row_tokens=row_tokens,
        row_sequences=6,
        microbatch_rows=microbatch_rows,
        patch_multiple=1,
        place="rows",
    )


def _singles(**layout):
    units = [[segment] for segment in _segments().values()]
    return discriminator_update.pack(
        _PROMPTS, units, None, _shape(len(units), 1, **layout), _CONFIG
    )


def _pairs(**layout):
    """Return the pairs of each teacher's segment with the first response's."""
    keys = [(p, name) for p in range(len(_PROMPTS)) for name in range(len(_NAMES))]
    units = [[_segments()[p, name, 0], _segments()[p, name, 1]] for p, name in keys]
    names = [name for _, name in keys]
    shape = _shape(len(units), 2, **layout)
    return discriminator_update.pack(_PROMPTS, units, names, shape, _CONFIG)


@functools.cache
def _scorer():
    return discriminator_update.make_scorer(_model()[0], _SETTINGS)


@functools.cache
def _one_by_one():
    """Return the score of every segment from a row of its own, in the order of `_segments`."""
    graphdef, params = _model()
    rows = [[inputs.continued(_PROMPTS[s.prompt], s.tokens)] for s in _segments().values()]
    batch = cases.batch(rows, _CONFIG)
    last = np.array([[len(row[0].tokens) - 1] for row in rows], np.int32)

    def score(params, batch, last):
        model = nnx.merge(graphdef, params)
        return model(batch.text, batch.vision, last, implementation="xla", remat="none")[0]

    return np.asarray(jax.jit(score)(params, batch, last))[:, 0]


def test_scores_of_packed_segments_equal_one_by_one():
    packed = _singles()
    found = packed.read(_scorer()(_model()[1], packed.batch))
    np.testing.assert_allclose(found, _one_by_one(), atol=1e-4)
    assert np.ptp(found) > 0.1


def test_a_segment_is_scored_the_same_whoever_wrote_it_and_whatever_stands_beside_it():
    same = np.array([5, 6, 7], np.int32)
    units = [[Continuation(prompt=0, tokens=same)] for _ in range(3)]
    shape = _shape(len(_segments()), 1)
    packed = discriminator_update.pack(_PROMPTS, units, None, shape, _CONFIG)
    scores = packed.read(_scorer()(_model()[1], packed.batch))
    np.testing.assert_allclose(scores, scores[0], atol=1e-5)


def _whole_gradient(loss, weights, packed, coefficients):
    """Return the gradient of all terms, summed over microbatches as the train step does."""
    graphdef, params = _model()
    whole = jax.jit(weights)(packed)

    def one(params, part):
        terms, told = loss(nnx.merge(graphdef, params), part)
        share = sum(coefficients[name] * terms[name].total / whole[name] for name in terms)
        return share, (terms, told)

    grad = jax.jit(jax.grad(one, has_aux=True))
    gradients, told = [], []
    for number in range(packed.last.shape[0]):
        gradient, aux = grad(params, jax.tree.map(lambda x, n=number: x[n], packed))
        gradients.append(gradient)
        told.append(aux)
    return jax.tree.map(lambda *leaves: sum(leaves), *gradients), told


@functools.cache
def _pair_gradient(rule=_RULE, microbatch_rows=2):
    return _whole_gradient(
        lambda model, part: discriminator_update.pair_loss(model, part, _NAMES, rule, _SETTINGS),
        lambda batch: discriminator_update.pair_weights(batch, _NAMES, rule),
        _pairs(microbatch_rows=microbatch_rows).batch,
        rule.coefficients(_NAMES),
    )


def _same(got, expected):
    for (path, a), (_, b) in zip(nnx.to_flat_state(got), nnx.to_flat_state(expected), strict=True):
        scale = float(jnp.abs(b[...]).max())
        np.testing.assert_allclose(
            a[...], b[...], rtol=1e-3, atol=2e-4 * scale + 1e-7, err_msg=str(path)
        )


def _score_gradients(scores, rule):
    return jax.jit(lambda scores: discriminator_update.score_gradients(scores, rule))(scores)


def _scores_of_first_response():
    """Return the one-by-one scores as the alignment reads them, with the first response only."""
    by_key = dict(zip(_segments(), _one_by_one(), strict=True))
    prompts = range(len(_PROMPTS))
    return {
        name: discriminator_update.Scores(
            teacher=np.array([by_key[p, n, 0] for p in prompts]),
            student=np.array([by_key[p, n, 1] for p in prompts]),
            is_pair=np.ones(len(_PROMPTS), bool),
        )
        for n, name in enumerate(_NAMES)
    }


def test_gradients_of_scores_known_beforehand_give_the_update_of_the_pair_loss():
    expected, told = _pair_gradient()
    gradients, measured = _score_gradients(_scores_of_first_response(), _RULE)
    pulls = {}
    for n, name in enumerate(_NAMES):
        for p in range(len(_PROMPTS)):
            pulls[p, n, 0] = float(gradients[name].teacher[p])
            pulls[p, n, 1] = float(gradients[name].student[p])
    packed = _singles()
    found = packed.pulls(np.array([pulls.get(key, 0.0) for key in _segments()]))
    batch = dataclasses.replace(packed.batch, pulls=found)
    got, _ = _whole_gradient(
        lambda model, part: discriminator_update.pulled_loss(model, part, 0.0, _SETTINGS),
        lambda batch: discriminator_update.pulled_weights(batch, 0.0),
        batch,
        {discriminator_update.PULLS: 1.0},
    )
    _same(got, expected)
    total = sum(terms["caption"].total for terms, _ in told)
    np.testing.assert_allclose(measured["discriminator/caption_loss"].total, total, rtol=1e-4)


def test_gradients_of_a_teachers_score_add_up_over_its_responses():
    scores = discriminator_update.Scores(
        teacher=np.array([1.0, 0.0], np.float32),
        student=np.array([0.0, 2.0, 0.5, 0.0], np.float32),
        is_pair=np.array([True, True, True, False]),
    )
    rule = discriminator_update.PairRule(score_clip=None, regulariser=0.0, router=0.0)
    gradients, told = _score_gradients({"caption": scores}, rule)
    # d/dT of -log sigmoid(T - S) is -sigmoid(S - T), and the loss is a mean over three pairs.
    pull = 1 / (1 + np.exp(-np.array([-1.0, 1.0, 0.5])))
    np.testing.assert_allclose(
        gradients["caption"].teacher, [-(pull[0] + pull[1]) / 3, -pull[2] / 3], rtol=1e-5
    )
    np.testing.assert_allclose(gradients["caption"].student, [*pull / 3, 0], rtol=1e-5)
    assert told["discriminator/caption_pair_accuracy"].value == np.float32(1 / 3)


def test_any_split_of_the_pairs_gives_the_same_update():
    expected, _ = _pair_gradient()
    got, _ = _pair_gradient(microbatch_rows=1)
    _same(got, expected)


def test_the_router_term_is_weighted_by_tokens_and_has_a_gradient():
    rule = dataclasses.replace(_RULE, router=0.01)
    batch = _pairs().batch
    gradient, told = _pair_gradient(rule)
    weights = jax.jit(lambda b: discriminator_update.pair_weights(b, _NAMES, rule))(batch)
    tokens = sum(terms["router"].weight for terms, _ in told)
    assert tokens == weights["router"] == (batch.text.segments.ids > 0).sum()
    # Two experts a token: 2 is the least, which balanced experts reach.
    seen = [metrics["discriminator/router_balance"] for _, metrics in told]
    assert all(metric.value > 2 for metric in seen if metric.exists())
    without, _ = _pair_gradient()
    routers = [
        np.abs(a[...] - b[...]).max()
        for (path, a), (_, b) in zip(
            nnx.to_flat_state(gradient), nnx.to_flat_state(without), strict=True
        )
        if "router" in path
    ]
    assert routers and min(routers) > 1e-6
