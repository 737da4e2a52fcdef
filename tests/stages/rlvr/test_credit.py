"""Credit in RLVR: captions learn from all of the reward but the accuracy, by hand."""

import dataclasses
import types

import numpy as np
import pytest

from prism_jax import errors
from prism_jax.stages.rlvr import advantages as rlvr_advantages
from prism_jax.stages.rlvr import credit
from tests.stages import rl_toy

_ACCURACY = np.float32([1, 0, 1, 0, 1, 1, 0, 0])
_FORMAT = np.float32([1, 1, 1, 0, 1, 1, 1, 0])
_PENALTY = np.float32([0, -0.5, 0, 0, 0, 0, -0.25, 0])
_LENGTHS = np.int32([4, 3, 2, 4, 1, 4, 3, 2])
_CAPTION_TOKENS = np.array([2, 1, 1, 3, 1, 4, 2, 1])
_GROUPS = np.repeat(np.int32([0, 1]), 4)


def _compare(kind, credit_name):
    """Return float64[8, 4] advantages by token, 0 behind a response."""
    arg = "" if kind == "grpo" else kind
    options = rl_toy.options_of(arg, {"advantage.credit": credit_name})
    step = types.SimpleNamespace(
        responses=[
            types.SimpleNamespace(
                reward=types.SimpleNamespace(accuracy=float(accuracy)),
                segments=types.SimpleNamespace(format_ok=bool(ok), caption_tokens=int(tokens)),
            )
            for accuracy, ok, tokens in zip(_ACCURACY, _FORMAT, _CAPTION_TOKENS, strict=True)
        ]
    )
    compare = rlvr_advantages.Comparison(
        options.advantage,
        options.reference,
        options.overlong,
        num_groups=2,
        max_response_tokens=4,
    )
    compared = compare(
        0.8 * _ACCURACY + 0.2 * _FORMAT + _PENALTY,
        _GROUPS,
        _LENGTHS,
        distance=None,
        parts=credit.parts_of(step, options.advantage, accuracy_weight=0.8),
    )
    values = compared.advantages
    return values if values.ndim == 2 else values[:, None] * (np.arange(4) < _LENGTHS[:, None])


def _by_hand(kind, withheld):
    found = np.zeros((8, 4))
    for first in (0, 4):
        own = slice(first, first + 4)
        whole = (0.8 * _ACCURACY + 0.2 * _FORMAT + _PENALTY)[own].astype(np.float64)
        caption = whole - withheld * 0.8 * _ACCURACY[own]
        scale = {"grpo": whole.std(ddof=1) + 1e-6, "dr_grpo": 1.0, "rloo": 3 / 4}[kind]
        for row in range(first, first + 4):
            for token in range(_LENGTHS[row]):
                is_caption = _FORMAT[row] and token < _CAPTION_TOKENS[row]
                part = caption if is_caption else whole
                found[row, token] = (part[row - first] - part.mean()) / scale
    return found


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize(
    ("name", "withheld"), [("response", 0.0), ("segment", 1.0), ("segment_shared", 0.5)]
)
def test_the_accuracy_reaches_the_tokens_that_the_credit_names(kind, name, withheld):
    np.testing.assert_allclose(_compare(kind, name), _by_hand(kind, withheld), atol=1e-5)


def test_tokens_behind_the_caption_and_malformed_responses_learn_as_without_credit():
    plain, found = _compare("grpo", "response"), _compare("grpo", "segment")
    is_caption = (np.arange(4) < _CAPTION_TOKENS[:, None]) & (_FORMAT[:, None] > 0)
    np.testing.assert_array_equal(found[~is_caption], plain[~is_caption].astype(np.float32))
    assert (found != plain)[is_caption & (np.arange(4) < _LENGTHS[:, None])].any()


def test_returns_of_reinforce_plus_plus_have_no_credit():
    with pytest.raises(errors.InputError, match=r"advantage\.credit must be 'response' for rein"):
        rl_toy.options_of("reinforce++", {"advantage.credit": "segment"})


def test_the_dump_has_one_advantage_a_response_with_credit_too():
    options = rl_toy.options_of("", {"advantage.credit": "segment"})
    run = rl_toy.Run(options)
    written = []
    report = run.experience.report
    spy = types.SimpleNamespace(write=lambda step, rows, segments, columns: written.append(columns))
    experience = dataclasses.replace(run.experience, report=dataclasses.replace(report, dump=spy))
    parts, logged = experience(run.state, next(run.feed), rl_toy.jax.random.key(0))
    assert [np.ndim(x) for x in written[0]["advantage"]] == [0] * 16
    assert "reward/caption_advantage_absolute_mean" in logged
    assert np.asarray(parts[0].advantages).shape == np.asarray(parts[0].tokens).shape
