"""The policy's update over packed responses, against one response at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import inputs, sharding
from prism_jax import batches
from prism_jax import mesh as mesh_lib
from prism_jax import rows as packed_rows
from prism_jax.policy import batch as policy_batch
from prism_jax.policy import loss as policy_loss
from prism_jax.policy import teaching as teaching_lib
from prism_jax.rollout import engine, serving
from prism_jax.rollout.sampling import Sampling
from prism_jax.rows import Continuation
from tests.models import cases, ours

_PROMPTS = [*cases.ROWS["rows_of_different_length"], *cases.ROWS["text_alone"][1:]]
_NUM_RESPONSES, _MAX_TOKENS, _TEMPERATURE = 3, 10, 0.7
_SETTINGS = policy_loss.Settings(
    temperature=_TEMPERATURE,
    max_response_tokens=_MAX_TOKENS,
    chunk_tokens=16,
    has_entropy=True,
    implementation="xla",
    remat="none",
)


def _algorithm(**changes):
    usual = {"loss": "ppo", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": None}
    usual |= {"aggregation": "token-mean", "norm_tokens": None, "sampler_weights": "off"}
    usual |= {"sampler_level": "token", "sampler_low": None, "sampler_high": None}
    return policy_loss.Algorithm(**(usual | changes))


@functools.cache
def _model():
    graphdef, params = ours.model("dense_tied_2_levels_head64")
    return graphdef, params, nnx.merge(graphdef, params).config


@functools.cache
def _rollout():
    graphdef, params, config = _model()
    graphdef, params = serving.prepare(
        graphdef,
        params,
        dtype=jnp.float32,
        donate=False,
        mesh=None,
        rules=sharding.REPLICATED,
    )
    sampler = engine.Engine(
        graphdef=graphdef,
        config=config,
        shapes=engine.Shapes(prompt_tokens=32, prompt_patches=96, prompt_images=4),
        prefill_implementation="xla",
        decode_implementation="xla",
        chunk_tokens=64,
        num_slots=None,
        mesh=None,
        rules=sharding.REPLICATED,
        say=print,
    )
    sampling = Sampling(
        temperature=_TEMPERATURE,
        top_k=None,
        top_p=None,
        max_tokens=_MAX_TOKENS,
        end_token_ids=tuple(range(1, 30)),
    )
    return sampler.generate(
        params, _PROMPTS, sampling, jax.random.key(3), num_responses=_NUM_RESPONSES
    )


def _responses():
    rollout = _rollout()
    return [
        Continuation(prompt=n // _NUM_RESPONSES, tokens=rollout.tokens[n, :length])
        for n, length in enumerate(rollout.lengths)
    ]


def _advantages(seed=0):
    return np.random.default_rng(seed).normal(size=len(_responses())).astype(np.float32)


@functools.cache
def _batch(row_tokens=128, microbatch_rows=2, row_sequences=8, shared_units=None, seed=0):
    shape = packed_rows.row_shape(
        packed_rows.Largest(
            num_units=len(_responses()),
            unit_sequences=1,
            unit_tokens=22 + _MAX_TOKENS,
            continued_tokens=_MAX_TOKENS,
            prompt_patches=52,
            prompt_frames=2,
        ),
        row_tokens=row_tokens,
        row_sequences=row_sequences,
        microbatch_rows=microbatch_rows,
        patch_multiple=1,
        shared_units=shared_units,
        place="rows",
    )
    logprobs = [_rollout().logprobs[n, : len(r.tokens)] for n, r in enumerate(_responses())]
    return policy_batch.on_policy_batch(
        _PROMPTS, _responses(), logprobs, _advantages(seed), shape, _model()[2]
    )


@functools.cache
def _grad_of_microbatch(algorithm):
    graphdef, _, _ = _model()

    def loss(params, part, weight):
        model = nnx.merge(graphdef, params)
        terms, told = policy_loss.loss(model, part, algorithm, _SETTINGS, None)
        return terms[policy_loss.TERM].total / weight, told

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def _update(batch, algorithm):
    """Return loss, metrics and gradient, summed over microbatches as the train step does."""
    _, params, _ = _model()
    weigh = jax.jit(lambda batch: policy_loss.weights(batch, algorithm, _SETTINGS, None))
    weights = weigh(batch)
    weight = weights[policy_loss.TERM]
    parts = [jax.tree.map(lambda x, n=n: x[n], batch) for n in range(batch.lengths.shape[0])]
    losses, metrics, gradients = [], [], []
    for part in parts:
        (loss, told), gradient = _grad_of_microbatch(algorithm)(params, part, weight)
        losses.append(loss)
        metrics.append(told)
        gradients.append(gradient)
    told = {
        name: functools.reduce(lambda a, b: a.merge(b), [one[name] for one in metrics])
        for name in metrics[0]
    }
    return sum(losses), told, jax.tree.map(lambda *leaves: sum(leaves), *gradients)


@functools.cache
def _rows_of_one():
    """Return the responses, each in a row of its own, and the places that predict their tokens."""
    _, _, config = _model()
    rows = [[inputs.continued(_PROMPTS[r.prompt], r.tokens)] for r in _responses()]
    batch = cases.batch(rows, config)
    starts = np.array([len(_PROMPTS[r.prompt].tokens) for r in _responses()])
    places = starts[:, None] + np.arange(_MAX_TOKENS)
    return batch, np.minimum(places, batch.text.tokens.shape[1] - 1)


def _distributions(graphdef, params):
    """Return the log-probs of all tokens at each response token, [N, T, V]."""
    batch, places = _rows_of_one()
    batch = jax.tree.map(jnp.asarray, batch)
    model = nnx.merge(graphdef, params)
    hidden, _ = model(batch.text, batch.vision, implementation="xla", remat="none")
    hidden = jnp.take_along_axis(hidden, (places - 1)[..., None], axis=1)
    return jax.nn.log_softmax(model.logits(hidden) / _TEMPERATURE)


@functools.cache
def _one_by_one():
    """Return weights [N, T] -> gradient of sum(weights x log-probs), a response in each row."""
    graphdef, params, _ = _model()
    batch, places = _rows_of_one()
    tokens = jnp.take_along_axis(batch.text.tokens, places, axis=1)

    def total(params, weights):
        logprobs = _distributions(graphdef, params)
        logprobs = jnp.take_along_axis(logprobs, tokens[..., None], axis=2)[..., 0]
        return jnp.where(weights != 0, weights * logprobs, 0).sum()

    grad = jax.jit(jax.grad(total))
    return lambda weights: grad(params, jnp.asarray(weights))


def _same(got, expected):
    for (path, a), (_, b) in zip(nnx.to_flat_state(got), nnx.to_flat_state(expected), strict=True):
        scale = float(jnp.abs(b[...]).max())
        np.testing.assert_allclose(
            a[...], b[...], rtol=1e-3, atol=2e-4 * scale + 1e-7, err_msg=str(path)
        )


def test_trainer_logprobs_of_packed_responses_equal_the_samplers():
    batch = _batch()
    graphdef, params, _ = _model()
    run = jax.jit(
        lambda part: policy_loss.response_logprobs(nnx.merge(graphdef, params), part, _SETTINGS)[0]
    )
    seen = 0
    for number in range(batch.lengths.shape[0]):
        part = jax.tree.map(lambda x, n=number: x[n], batch)
        found = np.asarray(run(part))
        for row, slot in zip(*np.nonzero(part.lengths), strict=True):
            offset, length = part.offsets[row, slot], part.lengths[row, slot]
            tokens = slice(offset, offset + length)
            expected = part.sampler_logprobs[row, tokens]
            np.testing.assert_allclose(found[row, tokens], expected, atol=1e-4)
            seen += length
    assert seen == _rollout().lengths.sum()


@pytest.mark.parametrize(
    ("changes", "weight"),
    [
        ({}, lambda lengths: 1 / lengths.sum()),
        (
            {"loss": "gspo", "aggregation": "seq-mean-token-mean"},
            lambda lengths: 1 / (lengths[:, None] * len(lengths)),
        ),
        (
            {"loss": "reinforce", "clip_low": None, "clip_high": None}
            | {"aggregation": "seq-mean-token-sum-norm", "norm_tokens": 7},
            lambda lengths: 1 / (7 * len(lengths)),
        ),
    ],
    ids=["ppo", "gspo", "reinforce"],
)
def test_a_packed_update_equals_one_response_at_a_time(changes, weight):
    lengths = _rollout().lengths
    mask = np.arange(_MAX_TOKENS) < lengths[:, None]
    weights = np.where(mask, -_advantages()[:, None] * weight(lengths), 0.0).astype(np.float32)
    _, _, gradient = _update(_batch(), _algorithm(**changes))
    _same(gradient, _one_by_one()(weights))


def test_any_split_into_rows_and_microbatches_gives_the_same_update():
    algorithm = _algorithm()
    loss, told, gradient = _update(_batch(), algorithm)
    for layout in (
        {"microbatch_rows": 1},
        {"row_tokens": 70},
        {"shared_units": _NUM_RESPONSES},
        {"shared_units": _NUM_RESPONSES, "row_tokens": 70},
    ):
        batch = _batch(**layout)
        other_loss, other_told, other = _update(batch, algorithm)
        np.testing.assert_allclose(other_loss, loss, rtol=1e-4, err_msg=str(layout))
        np.testing.assert_allclose(
            other_told["policy/entropy"].value, told["policy/entropy"].value, rtol=1e-4
        )
        _same(other, gradient)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_prompts_computed_once_give_the_update_of_one_response_at_a_time(seed):
    batch = _batch(shared_units=_NUM_RESPONSES, seed=seed)
    # Fewer tokens than the sequences have, because prompts stand once.
    assert (batch.text.segments.ids > 0).sum() < (batch.text.shared.segments.ids > 0).sum() - 20
    lengths = _rollout().lengths
    mask = np.arange(_MAX_TOKENS) < lengths[:, None]
    weights = np.where(mask, -_advantages(seed)[:, None] / lengths.sum(), 0.0).astype(np.float32)
    _, _, gradient = _update(batch, _algorithm())
    _same(gradient, _one_by_one()(weights))


def test_a_microbatch_without_responses_adds_nothing():
    # Five rows are needed where every response is of full length, these fill fewer.
    batch = _batch(row_tokens=70, microbatch_rows=2)
    assert not batch.lengths[-1].any()
    algorithm = _algorithm()
    _, params, _ = _model()
    part = jax.tree.map(lambda x: x[-1], batch)
    (loss, told), gradient = _grad_of_microbatch(algorithm)(params, part, jnp.ones(()))
    assert float(loss) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    assert all(not m.exists() for name, m in told.items() if name != "policy/loss")


def test_strictly_on_policy_nothing_is_clipped_and_the_mismatch_is_measured():
    _, told, _ = _update(_batch(), _algorithm())
    assert float(told["policy/clip_fraction"].value) == 0
    assert float(told["policy/approx_kl"].value) == 0
    assert float(told["policy/sampler_logprob_difference_mean"].value) < 1e-4
    assert told["policy/sampler_logprob_difference_mean"].weight == _rollout().lengths.sum()


def test_numbers_that_a_loss_does_not_read_are_refused():
    assert _algorithm().problems() == []
    assert _algorithm(loss="reinforce").problems() == [
        "clip_low must be None for reinforce, got 0.2",
        "clip_high must be None for reinforce, got 0.2",
    ]
    assert _algorithm(clip_low=None).problems() == ["clip_low must be given for ppo, got None"]
    assert _algorithm(loss="cispo", clip_low=None).problems() == []
    (problem,) = _algorithm(norm_tokens=3).problems()
    assert problem.endswith("got 3 with token-mean")


# Deeper than the policy, with a head of its own and another tower.
_TEACHER = "dense_untied_3_levels_head72"


def _lesson(coefficient=2.0):
    return teaching_lib.Lesson(params=ours.model(_TEACHER)[1], coefficient=jnp.float32(coefficient))


@functools.cache
def _grad_of_taught(kind):
    graphdef, _, _ = _model()
    teaching = teaching_lib.Teaching(
        graphdef=ours.model(_TEACHER)[0], kind=kind, teacher_share=None
    )

    def loss(params, part, lesson, weight):
        model = nnx.merge(graphdef, params)
        terms, told = policy_loss.loss(model, part, _algorithm(), _SETTINGS, None, teaching, lesson)
        return sum(term.total for term in terms.values()) / weight, told

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def _taught(batch, kind, lesson, *, params=None):
    """Return loss, mean divergence and gradient, summed over microbatches."""
    params = _model()[1] if params is None else params
    weight = policy_loss.weights(batch, _algorithm(), _SETTINGS, None)[policy_loss.TERM]
    results = [
        _grad_of_taught(kind)(params, jax.tree.map(lambda x, n=n: x[n], batch), lesson, weight)
        for n in range(batch.lengths.shape[0])
    ]
    told = [one["policy/teacher_kl"] for (_, one), _ in results]
    return (
        sum(loss for (loss, _), _ in results),
        functools.reduce(lambda a, b: a.merge(b), told),
        jax.tree.map(lambda *leaves: sum(leaves), *[gradient for _, gradient in results]),
    )


@functools.cache
def _log_probs(of_teacher):
    """Return the log-probs of all tokens at each response token, [N, T, V]."""
    model = ours.model(_TEACHER) if of_teacher else _model()[:2]
    return jax.jit(_distributions, static_argnums=0)(*model)


def _naive_reverse(weights):
    """Return the mean KL and the gradient from full distributions, a response in each row."""
    graphdef, params, _ = _model()
    log_q = _log_probs(True)
    lengths = _rollout().lengths
    mask = np.arange(_MAX_TOKENS) < lengths[:, None]

    def total(params):
        log_p = _distributions(graphdef, params)
        values = jnp.where(mask, (jnp.exp(log_p) * (log_p - log_q)).sum(-1), 0)
        return (weights * values).sum(), values.sum() / lengths.sum()

    gradient, mean = jax.jit(jax.grad(total, has_aux=True))(params)
    return mean, gradient


def _without_advantages(batch):
    return dataclasses.replace(batch, advantages=np.zeros_like(batch.advantages))


def test_a_teachers_term_of_packed_rows_is_that_of_full_distributions():
    lengths = _rollout().lengths
    mean, expected = _naive_reverse(2.0 / lengths.sum())
    for layout in ({}, {"shared_units": _NUM_RESPONSES}):
        batch = _without_advantages(_batch(**layout))
        _, measured, gradient = _taught(batch, "reverse", _lesson())
        np.testing.assert_allclose(measured.value, mean, rtol=1e-4, err_msg=str(layout))
        assert measured.weight == lengths.sum()
        _same(gradient, expected)


def test_the_term_is_added_to_the_policys_and_a_coefficient_of_0_takes_the_teacher_away():
    batch, algorithm = _batch(), _algorithm()
    _, _, alone = _taught(_without_advantages(batch), "reverse", _lesson())
    _, _, plain = _update(batch, algorithm)
    _, _, both = _taught(batch, "reverse", _lesson())
    _same(both, jax.tree.map(jnp.add, alone, plain))
    _, measured, without = _taught(batch, "reverse", _lesson(0.0))
    _same(without, plain)
    assert not measured.exists()


def test_k1_adds_the_teachers_log_prob_less_the_policys_to_the_advantage():
    lengths = _rollout().lengths
    mask = np.arange(_MAX_TOKENS) < lengths[:, None]
    batch, places = _rows_of_one()
    tokens = jnp.take_along_axis(batch.text.tokens, places, axis=1)[..., None]
    own, teacher = (
        np.take_along_axis(np.asarray(_log_probs(which)), np.asarray(tokens), axis=2)[..., 0]
        for which in (False, True)
    )
    advantages = _advantages()[:, None] + 2.0 * (teacher - own)
    weights = np.where(mask, -advantages / lengths.sum(), 0.0).astype(np.float32)
    _, measured, gradient = _taught(_batch(), "k1", _lesson())
    _same(gradient, _one_by_one()(weights))
    np.testing.assert_allclose(measured.value, (own - teacher)[mask].mean(), rtol=1e-4)


def test_a_teacher_in_shards_of_its_own_gives_the_same_update():
    expected = _taught(_batch(), "reverse", _lesson())
    batch = _batch(microbatch_rows=4)
    mesh = mesh_lib.make({"data": 2, "fsdp": 2, "tensor": 2, "expert": 1})
    rules = mesh_lib.rules(mesh_lib.DEFAULT_RULES)

    def spread(params):
        return jax.device_put(params, mesh_lib.param_shardings(params, mesh, rules))

    lesson = dataclasses.replace(_lesson(), params=spread(_lesson().params))
    rows = jax.device_put(batch, batches.shardings(batch, mesh, rules))
    with jax.set_mesh(mesh):
        found = _taught(rows, "reverse", lesson, params=spread(_model()[1]))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4)
    _same(found[2], expected[2])
