"""A game about length: the teacher writes longer texts, and only its symbols are worth learning.

A response is a symbol and a length, each from a table of logits of the policy. The discriminator
scores the symbol by a table and the length by a slope. Losses and advantages are the project's.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.losses import advantage

_TEACHER = jnp.array([0.4, 0.3, 0.15, 0.1, 0.05])
_LENGTHS = jnp.array([8, 16, 32, 64])
_TEACHER_LENGTHS = jnp.array([0.0, 0.0, 0.2, 0.8])
_FIRST = {"symbol": jnp.array([0.0, 0.0, 0.0, 1.0, 2.0]), "length": jnp.array([0.5, 1.0, 0.5, 0.0])}
_NUM_PROMPTS, _NUM_RESPONSES, _NUM_STEPS, _NUM_SEEDS = 8, 8, 300, 4


def _rule(is_fitted):
    return discriminator_loss.PairRule(
        score_clip=10.0,
        regulariser=1e-3,
        router=0.0,
        length_beta=(),
        microbatch_pairs=None,
        all_invalid="none",
        score_dtype="float32",
        is_fitted=is_fitted,
    )


def _policy_loss(logits, symbols, lengths, advantages):
    logprobs = jax.nn.log_softmax(logits["symbol"])[symbols]
    logprobs += jax.nn.log_softmax(logits["length"])[lengths]
    return -(logprobs * advantages).mean()


def _play(seed, is_fitted):
    """Return the distance of symbols from the teacher's, and the mean length, at both ends."""
    size = _NUM_PROMPTS * _NUM_RESPONSES
    for_policy, for_scores = optax.sgd(0.1), optax.adam(0.05)

    def step(carry, key):
        logits, scorer, state = carry
        keys = jax.random.split(key, 4)
        shown = jax.random.choice(keys[0], 5, (_NUM_PROMPTS,), p=_TEACHER)
        shown_length = jax.random.choice(keys[1], 4, (_NUM_PROMPTS,), p=_TEACHER_LENGTHS)
        symbols = jax.random.categorical(keys[2], logits["symbol"], shape=(size,))
        lengths = jax.random.categorical(keys[3], logits["length"], shape=(size,))

        def scores(scorer):
            def of(symbol, length):
                return scorer["table"][symbol] + scorer["slope"] * jnp.log1p(_LENGTHS[length])

            return discriminator_loss.Scores(
                teacher=of(shown, shown_length),
                student=of(symbols, lengths),
                is_pair=jnp.ones(size, bool),
                teacher_tokens=_LENGTHS[shown_length],
                student_tokens=_LENGTHS[lengths],
            )

        found, pull = jax.vjp(lambda s: (scores(s).teacher, scores(s).student), scorer)
        del found
        by_name, _ = discriminator_loss.gradients_by_name({"cot": scores(scorer)}, _rule(is_fitted))
        (gradient,) = pull((by_name["cot"].teacher, by_name["cot"].student))
        rewarding = scores(scorer).without_length()[0] if is_fitted else scores(scorer)
        inputs = advantage.AlignmentScores(
            prompt_id=jnp.repeat(jnp.arange(_NUM_PROMPTS), _NUM_RESPONSES),
            by_segment={"cot": rewarding.student},
            format_ok=jnp.ones(size, bool),
            accuracy=None,
        )
        advantages = advantage.align(
            inputs, num_groups=_NUM_PROMPTS, eps=1e-6, weights={"cot": 1.0}, format_penalty=1.5
        )
        moves, _ = for_policy.update(
            jax.grad(_policy_loss)(logits, symbols, lengths, advantages), for_policy.init(logits)
        )
        changes, state = for_scores.update(gradient, state)
        logits, scorer = optax.apply_updates(logits, moves), optax.apply_updates(scorer, changes)
        return (logits, scorer, state), None

    scorer = {"table": jnp.zeros(5), "slope": jnp.zeros(())}
    first = (_FIRST, scorer, for_scores.init(scorer))
    keys = jax.random.split(jax.random.key(seed), _NUM_STEPS)
    (logits, _, _), _ = jax.lax.scan(step, first, keys)
    return [
        (
            0.5 * jnp.abs(jax.nn.softmax(one["symbol"]) - _TEACHER).sum(),
            (jax.nn.softmax(one["length"]) * _LENGTHS).sum(),
        )
        for one in (_FIRST, logits)
    ]


@functools.cache
def _games(is_fitted):
    """Return float64[2, 2, seeds]: at the begin and the end, distance and mean length."""
    play = jax.jit(jax.vmap(functools.partial(_play, is_fitted=is_fitted)))
    return np.asarray(play(jnp.arange(_NUM_SEEDS)), np.float64)


def test_plain_scores_pay_the_policy_for_length():
    before, after = _games(is_fitted=False)
    assert (after[1] > before[1] + 15).all()


@pytest.mark.parametrize("is_fitted", [False, True])
def test_symbols_come_near_the_teachers_either_way(is_fitted):
    before, after = _games(is_fitted=is_fitted)
    assert (after[0] < before[0] / 2).all()


def test_without_the_fitted_effect_of_length_the_policy_keeps_its_lengths():
    before, after = _games(is_fitted=True)
    assert (np.abs(after[1] - before[1]) < 6).all()
