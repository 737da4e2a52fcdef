"""A game whose end is known: tables in place of models, the project's losses and advantages.

A response is one caption symbol and one cot symbol. The teacher draws each from a known
distribution; the policy has a table of logits a segment, the discriminator a table of scores. The
only equilibrium is a policy that draws as the teacher does, which no score can tell from it.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.losses import advantage, policy
from prism_jax.stages.align import advantages as align_advantages

_NAMES = ("caption", "cot")
_TEACHER = {"caption": (0.4, 0.3, 0.15, 0.1, 0.05), "cot": (0.05, 0.1, 0.2, 0.25, 0.4)}
# It begins with what the teacher likes least.
_FIRST_LOGITS = {"caption": (0.0, 0.0, 0.0, 1.0, 2.0), "cot": (2.0, 1.0, 0.0, 0.0, 0.0)}
# Credit and weights of caption and cot.
_CASES = (
    ("response", 0.5, 0.5),
    ("response", 1.0, 0.0),
    ("response", 0.0, 1.0),
    ("segment", 0.5, 0.5),
)
_NUM_PROMPTS, _NUM_RESPONSES, _NUM_STEPS, _NUM_SEEDS = 16, 8, 500, 8
_STUDENT_T = 2.365  # of 95 % and 7 degrees of freedom
_RULE = discriminator_loss.PairRule(
    score_clip=10.0,
    regulariser=1e-3,
    router=0.0,
    length_beta=(),
    microbatch_pairs=None,
    all_invalid="none",
    score_dtype="float32",
)


def _draw(logits, key, size):
    keys = jax.random.split(key)
    return {
        name: jax.random.categorical(k, logits[name], shape=(size,))
        for name, k in zip(_NAMES, keys, strict=True)
    }


def _distances(logits):
    """Return the total variation between policy and teacher by segment."""
    return jnp.stack(
        [
            0.5 * jnp.abs(jax.nn.softmax(logits[name]) - jnp.array(_TEACHER[name])).sum()
            for name in _NAMES
        ]
    )


def _advantages(found, case):
    """Return the advantages of caption and cot of each response in the case of this number."""
    size = _NUM_PROMPTS * _NUM_RESPONSES
    scores = advantage.AlignmentScores(
        prompt_id=jnp.repeat(jnp.arange(_NUM_PROMPTS), _NUM_RESPONSES),
        by_segment={name: found[name].student for name in _NAMES},
        format_ok=jnp.ones(size, bool),
        accuracy=None,
    )
    every = []
    for credit, *weights in _CASES:
        options = types.SimpleNamespace(
            credit=credit, weights=dict(zip(_NAMES, weights, strict=True))
        )
        by_part = {
            part: advantage.align(
                scores, num_groups=_NUM_PROMPTS, eps=1e-6, weights=own, format_penalty=1.5
            )
            for part, own in align_advantages.weights_by_part(options).items()
        }
        of_names = [by_part.get(name, by_part["response"]) for name in _NAMES]
        every.append(jnp.stack(of_names, -1))
    return jnp.stack(every)[case]


def _policy_loss(logits, drawn, advantages):
    logprobs = [jax.nn.log_softmax(logits[name])[drawn[name]] for name in _NAMES]
    logprobs = jnp.stack(logprobs, -1)
    term, _ = policy.ppo(
        logprobs,
        jax.lax.stop_gradient(logprobs),
        advantages,
        jnp.ones(logprobs.shape, bool),
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=None,
        token_weights=None,
        aggregation="token-mean",
        norm_tokens=None,
    )
    return term.value


def _play(seed, case):
    """Return float32[steps, 2], the distances of caption and cot after each step."""
    teacher = {name: jnp.log(jnp.array(_TEACHER[name])) for name in _NAMES}
    size = _NUM_PROMPTS * _NUM_RESPONSES
    for_policy = optax.sgd(optax.linear_schedule(0.2, 0.0, _NUM_STEPS))
    for_tables = optax.adam(0.05)

    def step(carry, key):
        logits, tables, policy_state, tables_state = carry
        teacher_key, student_key = jax.random.split(key)
        shown, drawn = _draw(teacher, teacher_key, _NUM_PROMPTS), _draw(logits, student_key, size)
        found = {
            name: discriminator_loss.Scores(
                teacher=tables[name][shown[name]],
                student=tables[name][drawn[name]],
                is_pair=jnp.ones(size, bool),
                teacher_tokens=jnp.ones(_NUM_PROMPTS, jnp.int32),
                student_tokens=jnp.ones(size, jnp.int32),
            )
            for name in _NAMES
        }
        pulls, _ = discriminator_loss.gradients_by_name(found, _RULE)
        gradients = {
            name: jnp.zeros_like(tables[name])
            .at[shown[name]]
            .add(pulls[name].teacher)
            .at[drawn[name]]
            .add(pulls[name].student)
            for name in _NAMES
        }
        changes, tables_state = for_tables.update(gradients, tables_state)
        gradients = jax.grad(_policy_loss)(logits, drawn, _advantages(found, case))
        moves, policy_state = for_policy.update(gradients, policy_state)
        logits, tables = optax.apply_updates(logits, moves), optax.apply_updates(tables, changes)
        return (logits, tables, policy_state, tables_state), _distances(logits)

    logits = {name: jnp.array(_FIRST_LOGITS[name]) for name in _NAMES}
    tables = {name: jnp.zeros(len(_TEACHER[name])) for name in _NAMES}
    first = logits, tables, for_policy.init(logits), for_tables.init(tables)
    return jax.lax.scan(step, first, jax.random.split(jax.random.key(seed), _NUM_STEPS))[1]


@functools.cache
def _games():
    """Return the distances, float32[cases, seeds, steps, segments]."""
    over_seeds = jax.vmap(_play, in_axes=(0, None))
    play = jax.jit(jax.vmap(over_seeds, in_axes=(None, 0)))
    return np.asarray(play(jnp.arange(_NUM_SEEDS), jnp.arange(len(_CASES))))


def test_alignment_moves_the_policy_to_the_teacher_on_every_seed():
    both = _games()[0]
    assert both[:, 0].min() > 0.6
    assert (both[:, _NUM_STEPS // 2] < both[:, 0] / 4).all()
    assert both[:, -1].max() < 0.03


@pytest.mark.parametrize(("case", "moving", "standing"), [(1, 0, 1), (2, 1, 0)])
def test_a_segment_without_weight_stays_where_it_is(case, moving, standing):
    played = _games()[case]
    assert played[:, -1, moving].max() < 0.03
    assert np.abs(played[:, -1, standing] - played[:, 0, standing]).max() < 0.05


def test_segment_credit_is_at_least_twice_as_fast_as_the_sum_with_95_percent_confidence():
    summed, own = (_CASES.index((credit, 0.5, 0.5)) for credit in ("response", "segment"))
    played = _games()[[summed, own]]
    # The first step at which a quarter of the distance is left.
    is_near = played < played[:, :, :1] / 4
    assert is_near.any(2).all()
    first = is_near.argmax(2)
    ratios = first[0] / first[1]
    margin = _STUDENT_T * ratios.std(0, ddof=1) / _NUM_SEEDS**0.5
    assert (ratios.mean(0) - margin > 2).all(), (ratios.mean(0), margin)
