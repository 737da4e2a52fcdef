"""The discriminator's scores and update over packed segments, against one segment at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import config as config_lib
from models import discriminator, inputs, kinds, qwen3_vl, sharding
from models import noise as noise_lib
from prism_jax import rows as packed_rows
from prism_jax.discriminator import batch as discriminator_batch
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.discriminator import penalty as penalty_lib
from prism_jax.discriminator import surrogate
from prism_jax.rows import Continuation
from tests.models import cases

_PROMPTS = [*cases.ROWS["rows_of_different_length"][:2], *cases.ROWS["one_image"]]
_CASE = "moe_untied"
_CONFIG = config_lib.from_hf(cases.CONFIGS[_CASE])
_SETTINGS = discriminator_loss.Settings(
    implementation="xla", remat="none", head_dropout=0.0, score_dtype="float32"
)
_PLAIN = discriminator_loss.PairRule(
    score_clip=None,
    regulariser=0.0,
    router=0.0,
    length_beta=(),
    microbatch_pairs=None,
    all_invalid="none",
    score_dtype="float32",
)
_RULE = dataclasses.replace(_PLAIN, score_clip=10.0, regulariser=0.1, length_beta=(("cot", 0.5),))
_KINDS = (kinds.CAPTION, kinds.COT)
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


def _shape(num_units, unit_sequences, row_tokens=96, microbatch_rows=2, shared_units=None):
    return packed_rows.row_shape(
        packed_rows.Largest(
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
        shared_units=shared_units,
        place="rows",
    )


def _singles(**layout):
    units = [[segment] for segment in _segments().values()]
    names = [name for _, name, _ in _segments()]
    return _pack(units, names, _shape(len(units), 1, **layout))


def _pack(units, names, shape, positions="mrope"):
    return discriminator_batch.segment_rows(
        _PROMPTS, units, names, _KINDS, shape, _CONFIG, positions=positions
    )


def _pairs(**layout):
    """Return the pairs of each teacher's segment with the first response's."""
    keys = [(p, name) for p in range(len(_PROMPTS)) for name in range(len(_NAMES))]
    units = [[_segments()[p, name, 0], _segments()[p, name, 1]] for p, name in keys]
    names = [name for _, name in keys]
    shape = _shape(len(units), 2, **layout)
    return _pack(units, names, shape)


@functools.cache
def _scorer():
    return discriminator_loss.make_scorer(_model()[0], _SETTINGS)


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


def test_prompts_computed_once_give_the_scores_of_one_segment_at_a_time():
    packed = _singles(shared_units=6)
    text = packed.batch.text
    assert (text.segments.ids > 0).sum() < (text.shared.segments.ids > 0).sum() - 100
    found = packed.read(_scorer()(_model()[1], packed.batch))
    np.testing.assert_allclose(found, _one_by_one(), atol=1e-4)


def test_an_update_with_prompts_computed_once_is_that_of_repeated_prompts():
    # Positions in one dimension: the test above has the others. One microbatch, because the
    # router's balance is asked for within each.
    rule = dataclasses.replace(_RULE, router=0.5)
    found = {}
    for shared_units in (None, 2):
        keys = [(p, name) for p in range(len(_PROMPTS)) for name in range(len(_NAMES))]
        units = [[_segments()[p, name, 0], _segments()[p, name, 1]] for p, name in keys]
        shape = _shape(len(units), 2, microbatch_rows=6, shared_units=shared_units)
        packed = _pack(units, [name for _, name in keys], shape, positions="text_1d")
        assert packed.batch.last.shape[0] == 1
        found[shared_units] = _whole_gradient(
            lambda model, part, key: discriminator_loss.pair_loss(
                model, part, _NAMES, rule, _SETTINGS, key
            ),
            lambda batch: discriminator_loss.pair_weights(batch, _NAMES, rule),
            packed.batch,
            rule.coefficients(_NAMES, of_segment=1.0),
        )
    _same(found[2][0], found[None][0])
    balance = [found[n][1][0][1]["discriminator/router_balance"] for n in (2, None)]
    np.testing.assert_allclose(balance[0].weight, balance[1].weight)
    np.testing.assert_allclose(balance[0].total, balance[1].total, rtol=1e-4)


def test_a_segment_is_scored_the_same_whoever_wrote_it_and_whatever_stands_beside_it():
    same = np.array([5, 6, 7], np.int32)
    units = [[Continuation(prompt=0, tokens=same)] for _ in range(3)]
    shape = _shape(len(_segments()), 1)
    packed = _pack(units, [0] * len(units), shape)
    scores = packed.read(_scorer()(_model()[1], packed.batch))
    np.testing.assert_allclose(scores, scores[0], atol=1e-5)


def _whole_gradient(loss, weights, packed, coefficients, key=None):
    """Return the gradient of all terms, summed over microbatches as the train step does."""
    graphdef, params = _model()
    whole = jax.jit(weights)(packed)

    def one(params, part, key):
        terms, told = loss(nnx.merge(graphdef, params), part, key)
        share = sum(coefficients[name] * terms[name].total / whole[name] for name in terms)
        return share, (terms, told)

    grad = jax.jit(jax.grad(one, has_aux=True))
    gradients, told = [], []
    for number in range(packed.last.shape[0]):
        part = jax.tree.map(lambda x, n=number: x[n], packed)
        gradient, aux = grad(params, part, None if key is None else jax.random.fold_in(key, number))
        gradients.append(gradient)
        told.append(aux)
    return jax.tree.map(lambda *leaves: sum(leaves), *gradients), told


@functools.cache
def _pair_gradient(rule=_RULE, microbatch_rows=2):
    return _whole_gradient(
        lambda model, part, key: discriminator_loss.pair_loss(
            model, part, _NAMES, rule, _SETTINGS, key
        ),
        lambda batch: discriminator_loss.pair_weights(batch, _NAMES, rule),
        _pairs(microbatch_rows=microbatch_rows).batch,
        rule.coefficients(_NAMES, of_segment=1.0),
    )


def _same(got, expected):
    for (path, a), (_, b) in zip(nnx.to_flat_state(got), nnx.to_flat_state(expected), strict=True):
        scale = float(jnp.abs(b[...]).max())
        np.testing.assert_allclose(
            a[...], b[...], rtol=1e-3, atol=2e-4 * scale + 1e-7, err_msg=str(path)
        )


def _score_gradients(scores, rule):
    return jax.jit(lambda scores: discriminator_loss.gradients_by_name(scores, rule))(scores)


def _places(packed, num_responses):
    """Return where the scores of the teacher's segments and of the first responses' stand."""
    index = dict(zip(_segments(), packed.indices(), strict=True))
    prompts = range(len(_PROMPTS))
    tokens = {key: len(segment.tokens) for key, segment in _segments().items()}
    found = {}
    for n, name in enumerate(_NAMES):
        teachers = [(p, n, 0) for p in prompts]
        students = [(p, n, 1 + r) for p in prompts for r in range(num_responses)]
        found[name] = discriminator_loss.Scores(
            teacher=np.array([index[key] for key in teachers]),
            student=np.array([index[key] for key in students]),
            is_pair=np.ones(len(students), bool),
            teacher_tokens=np.array([tokens[key] for key in teachers]),
            student_tokens=np.array([tokens[key] for key in students]),
        )
    return found


@functools.cache
def _pulled_gradient(rule=_RULE, settings=_SETTINGS, seed=None):
    """Return the update by scores that were known before, and the metrics of the pairs."""
    graphdef, params = _model()
    packed = _singles()
    key = None if seed is None else jax.random.key(seed)

    def pull(params, batch):
        model = nnx.merge(graphdef, params)
        found = discriminator_loss.all_scores(model, batch, settings, key)
        return discriminator_loss.gradients(found, _places(packed, 1), rule)

    found, told = jax.jit(pull)(params, packed.batch)
    gradient, _ = _whole_gradient(
        lambda model, part, key: surrogate.loss(model, part, 0.0, settings, key),
        lambda batch: surrogate.weights(batch, 0.0, settings),
        dataclasses.replace(packed.batch, score_gradients=found),
        {surrogate.SCORES: 1.0},
        key,
    )
    return gradient, told


def test_gradients_of_scores_known_beforehand_give_the_update_of_the_pair_loss():
    expected, told = _pair_gradient()
    got, measured = _pulled_gradient()
    _same(got, expected)
    for name in _NAMES:
        total = sum(terms[name].total for terms, _ in told)
        np.testing.assert_allclose(measured[f"discriminator/{name}_loss"].total, total, rtol=1e-4)


def test_a_bfloat16_head_gives_the_nearest_numbers_of_its_type_in_scores_and_update():
    packed = _singles()
    settings = dataclasses.replace(_SETTINGS, score_dtype="bfloat16")
    found = discriminator_loss.make_scorer(_model()[0], settings)(_model()[1], packed.batch)
    scores, exact = packed.read(found), packed.read(_scorer()(_model()[1], packed.batch))
    np.testing.assert_array_equal(scores, scores.astype(jnp.bfloat16).astype(np.float32))
    # Input and weights are rounded too, so the score need not be the nearest to the exact one.
    assert 0 < np.abs(scores - exact).max() < 2**-6 * np.abs(exact).max()
    rule = dataclasses.replace(_RULE, score_dtype="bfloat16")
    rounded, _ = _pulled_gradient(rule, settings)
    plain, _ = _pulled_gradient()
    leaves = zip(jax.tree.leaves(rounded), jax.tree.leaves(plain), strict=True)
    for one, other in leaves:
        one, other = np.asarray(one), np.asarray(other)
        assert np.abs(one - other).max() < 0.1 * np.abs(other).max() + 1e-6
    assert any(
        (np.asarray(x) != np.asarray(y)).any()
        for x, y in zip(jax.tree.leaves(rounded), jax.tree.leaves(plain), strict=True)
    )


def _numbers(teacher, student, is_pair):
    return discriminator_loss.Scores(
        teacher=np.array(teacher, np.float32),
        student=np.array(student, np.float32),
        is_pair=np.array(is_pair, bool),
        teacher_tokens=np.full(len(teacher), 9),
        student_tokens=np.full(len(student), 9),
    )


def test_gradients_of_a_teachers_score_add_up_over_its_responses():
    scores = _numbers([1.0, 0.0], [0.0, 2.0, 0.5, 0.0], [1, 1, 1, 0])
    gradients, told = _score_gradients({"caption": scores}, _PLAIN)
    # d/dT of -log sigmoid(T - S) is -sigmoid(S - T), and the loss is a mean over three pairs.
    pull = 1 / (1 + np.exp(-np.array([-1.0, 1.0, 0.5])))
    np.testing.assert_allclose(
        gradients["caption"].teacher, [-(pull[0] + pull[1]) / 3, -pull[2] / 3], rtol=1e-5
    )
    np.testing.assert_allclose(gradients["caption"].student, [*pull / 3, 0], rtol=1e-5)
    assert told["discriminator/caption_pair_accuracy"].value == np.float32(1 / 3)


def test_released_microbatches_average_the_means_of_their_pairs():
    scores = _numbers([1.0, 0.0], [0.0, 2.0, 0.5, 0.0], [1, 1, 1, 0])
    rule = dataclasses.replace(_PLAIN, microbatch_pairs=2)
    gradients, told = _score_gradients({"caption": scores}, rule)
    # Two microbatches of two responses: means over two pairs and over one pair, half of each.
    pull = 1 / (1 + np.exp(-np.array([-1.0, 1.0, 0.5])))
    expected = [pull[0] / 4, pull[1] / 4, pull[2] / 2, 0]
    np.testing.assert_allclose(gradients["caption"].student, expected, rtol=1e-5)
    assert told["discriminator/caption_pair_accuracy"].value == np.float32(1 / 3)


def test_a_step_without_a_pair_teaches_nothing_unless_the_released_fallback_is_chosen():
    scores = _numbers([1.0, 0.0], [0.0] * 4, [0] * 4)
    gradients, _ = _score_gradients({"caption": scores}, _PLAIN)
    assert not np.any(gradients["caption"].teacher)
    rule = dataclasses.replace(_PLAIN, all_invalid="released")
    gradients, _ = _score_gradients({"caption": scores}, rule)
    # 0.01 * -log sigmoid(mean of the teacher's scores), which is 0.5; each of two is half of it.
    expected = -0.01 / (1 + np.exp(0.5)) / 2
    np.testing.assert_allclose(gradients["caption"].teacher, [expected] * 2, rtol=1e-5)


def test_dropout_of_the_head_changes_the_update_and_its_scores_are_those_of_the_update():
    settings = dataclasses.replace(_SETTINGS, head_dropout=0.3, score_dtype="float32")
    graphdef, params = _model()
    packed = _singles()

    def both(params, batch, key):
        model = nnx.merge(graphdef, params)
        parts = [
            discriminator_loss.scores(
                model,
                jax.tree.map(lambda x, n=n: x[n], batch),
                settings,
                jax.random.fold_in(key, n),
            )[0]
            for n in range(batch.last.shape[0])
        ]
        whole = discriminator_loss.all_scores(model, batch, settings, key)
        return (
            whole,
            jnp.stack(parts),
            discriminator_loss.all_scores(model, batch, settings, None),
        )

    whole, parts, without = jax.jit(both)(params, packed.batch, jax.random.key(3))
    np.testing.assert_allclose(whole, parts, atol=1e-5)
    assert np.abs(packed.read(whole) - packed.read(without)).min() > 1e-6
    np.testing.assert_allclose(packed.read(without), _one_by_one(), atol=1e-4)


def test_positions_in_one_dimension_count_tokens_and_change_scores_of_pictures_alone():
    units = [[segment] for segment in _segments().values()]
    shape = _shape(len(units), 1)
    packed = _pack(units, [0] * len(units), shape, "text_1d")
    for segment, place in zip(_segments().values(), packed.places, strict=True):
        size = len(_PROMPTS[segment.prompt].tokens) + place.num_tokens
        first = place.start + place.num_tokens - size
        number, row = divmod(place.row, shape.microbatch_rows)
        got = packed.batch.text.positions[number, :, row, first : first + size]
        np.testing.assert_array_equal(got, np.broadcast_to(np.arange(size), (3, size)))
    found = packed.read(_scorer()(_model()[1], packed.batch))
    has_picture = [len(_PROMPTS[s.prompt].grids) > 0 for s in _segments().values()]
    moved = np.abs(found - _one_by_one()) > 1e-4
    assert moved.any()
    assert not moved[~np.array(has_picture)].any()


def test_any_split_of_the_pairs_gives_the_same_update():
    expected, _ = _pair_gradient()
    got, _ = _pair_gradient(microbatch_rows=1)
    _same(got, expected)


def test_the_router_term_is_weighted_by_tokens_and_has_a_gradient():
    rule = dataclasses.replace(_RULE, router=0.01)
    batch = _pairs().batch
    gradient, told = _pair_gradient(rule)
    weights = jax.jit(lambda b: discriminator_loss.pair_weights(b, _NAMES, rule))(batch)
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


def test_the_gradient_penalty_is_the_squared_gradient_by_the_embedded_tokens_of_segments():
    graphdef, params = _model()
    packed = _singles()
    microbatch = jax.tree.map(lambda x: jnp.asarray(x[0]), packed.batch)
    numbers = penalty_lib.Penalty(coefficient=1.0, noise=1e-2)
    noise = penalty_lib.noise_of(microbatch, numbers, jax.random.key(0))
    counts = microbatch.num_tokens.sum(-1)
    np.testing.assert_array_equal(noise.mask.sum(-1), counts)

    @jax.jit
    def squared(directions):
        """Return the mean over directions of (score after a small step - score)² / step²."""
        model = nnx.merge(graphdef, params)
        plain, _ = discriminator_loss.scores(model, microbatch, _SETTINGS, None)

        def one(key):
            moved = dataclasses.replace(noise, key=key)
            noisy, _ = discriminator_loss.scores(model, microbatch, _SETTINGS, None, moved)
            return jnp.square((noisy - plain) / numbers.noise)

        return jax.lax.map(one, directions).mean(0)

    @jax.jit
    def exact():
        """Return the squared norm of each score's gradient by the step along unit noise."""

        def of(step):
            model = nnx.merge(graphdef, params)
            moved = _Along(scale=1.0, key=step, mask=noise.mask)
            return discriminator_loss.scores(model, microbatch, _SETTINGS, None, moved)[0]

        sizes = (*microbatch.text.tokens.shape, _CONFIG.text.hidden_size)
        jacobian = jax.jacrev(of)(jnp.zeros(sizes))
        return jnp.square(jacobian).sum((-1, -2, -3))

    found = squared(jax.random.split(jax.random.key(1), 400))
    wanted = exact()
    is_there = np.asarray(microbatch.is_segment)
    assert is_there.sum() >= 2 and wanted[is_there].min() > 0
    np.testing.assert_allclose(found[is_there], wanted[is_there], rtol=0.35)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Along(noise_lib.EmbeddingNoise):
    """A step of each embedded token, in units of its size; `key` holds it."""

    def add(self, x):
        size = jnp.sqrt(jnp.square(x).mean(-1, keepdims=True))
        return jnp.where(self.mask[..., None], x + size * self.key, x)


def test_a_penalty_adds_its_term_to_the_update_and_leaves_the_others_as_they_are():
    packed = _singles()
    batch = dataclasses.replace(
        packed.batch, score_gradients=np.ones(packed.batch.is_segment.shape, np.float32)
    )
    settings = dataclasses.replace(
        _SETTINGS, penalty=penalty_lib.Penalty(coefficient=3.0, noise=0.1)
    )
    weights = surrogate.weights(batch, 0.0, settings)
    assert weights.keys() - surrogate.weights(batch, 0.0, _SETTINGS).keys() == {"gradient_penalty"}
    assert weights["gradient_penalty"] == batch.is_segment.sum()
    assert surrogate.coefficients(0.0, settings) == {"scores": 1.0, "gradient_penalty": 3.0}
    microbatch = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)
    (terms, logged), (plain, _) = jax.jit(
        lambda part, key: [
            surrogate.loss(nnx.merge(*_model()), part, 0.0, each, key)
            for each in (settings, _SETTINGS)
        ]
    )(microbatch, jax.random.key(0))
    np.testing.assert_allclose(terms["scores"].total, plain["scores"].total, rtol=1e-6)
    assert logged["discriminator/gradient_penalty"].value > 0
    empty = dataclasses.replace(batch, score_gradients=np.zeros_like(batch.score_gradients))
    assert not any(surrogate.weights(empty, 0.0, settings).values())
