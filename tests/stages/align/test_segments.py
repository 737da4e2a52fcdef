"""Alignment's segments in rows: what is equal is scored once."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.policy import credit
from prism_jax.stages.align import advantages as align_advantages
from tests.stages import discriminator_probes as probes
from tests.stages import rl_run

_CAPTION, _OTHER = "<caption>\na 7\n</caption>\n", "<caption>\na 1\n</caption>\n"
_COT = "<think>\nso\n</think>\n<answer>\n7\n</answer>"
# Four responses to each prompt: two are equal, a third has their caption alone.
_TEXTS = (_CAPTION + _COT, _CAPTION + _COT.replace("so", "no"), _CAPTION + _COT, _OTHER + _COT)


@pytest.fixture(scope="module")
def laid(tmp_path_factory):
    folder = rl_run.write(tmp_path_factory.mktemp("align_segments"))
    options = probes.options("align", folder, {})
    workdir = tmp_path_factory.mktemp("workdir")
    *_, packed, places = probes.packed_segments(options, folder, workdir, _TEXTS)
    return options, packed, places


def test_equal_segments_of_a_prompt_share_a_place_and_no_others_do(laid):
    options, packed, places = laid
    num_prompts = options.rollout.num_prompts
    caption = places["caption"].student.reshape(num_prompts, 4)
    cot = places["cot"].student.reshape(num_prompts, 4)
    for row in range(num_prompts):
        assert caption[row, 0] == caption[row, 1] == caption[row, 2] != caption[row, 3]
        assert cot[row, 0] == cot[row, 2] == cot[row, 3] != cot[row, 1]
    used = [places[name].teacher for name in places] + [caption, cot]
    # Two captions and two cots of each prompt, and the teacher's two.
    assert len(np.unique(np.concatenate([one.ravel() for one in used]))) == 6 * num_prompts
    assert np.asarray(packed.batch.is_segment).sum() == 6 * num_prompts
    assert len(np.unique(caption)) == len(np.unique(cot)) == 2 * num_prompts


def test_equal_responses_have_equal_advantages_and_none_where_all_are_equal(laid):
    options, packed, places = laid
    scores = np.random.default_rng(0).normal(size=packed.batch.is_segment.shape)
    found = discriminator_loss.scores_at(jnp.asarray(scores, jnp.float32), places)
    size = options.rollout.num_prompts * 4
    advantages = align_advantages.make_advantages(options)(
        found, jnp.ones(size, bool), jnp.ones(size, jnp.float32)
    )
    rows = np.asarray(advantages["response"]).reshape(-1, 4)
    np.testing.assert_array_equal(rows[:, 0], rows[:, 2])
    assert (rows[:, 0] != rows[:, 1]).all()


_OK = np.array([1, 1, 1, 0, 1, 1, 1, 1], bool)
_CAPTION_TOKENS = np.array([1, 2, 3, 0, 4, 2, 1, 5])


def _by_token(options, *, cot_shift=0.0):
    """Return the advantages of two prompts' responses by token [8, 6], the fourth malformed."""
    scores = {
        name: discriminator_loss.Scores(
            teacher=np.zeros(2, np.float32),
            student=values,
            is_pair=_OK,
            teacher_tokens=np.ones(2, np.int32),
            student_tokens=np.ones(8, np.int32),
        )
        for name, values in _SCORES.items()
    }
    moved = scores["cot"].student + np.float32(cot_shift) * (np.arange(8) % 2)
    scores["cot"] = dataclasses.replace(scores["cot"], student=moved)
    right = np.array([1, 0, 1, 1, 0, 1, 1, 1], np.float32)
    found = align_advantages.make_advantages(options)(scores, _OK, right)
    drawn = types.SimpleNamespace(
        rollout=types.SimpleNamespace(lengths=np.full(8, 6)),
        segments=[
            types.SimpleNamespace(format_ok=bool(ok), caption_tokens=int(tokens))
            for ok, tokens in zip(_OK, _CAPTION_TOKENS, strict=True)
        ],
    )
    values = credit.of_parts(jax.device_get(found), drawn)
    return values if values.ndim == 2 else np.repeat(values[:, None], 6, axis=1)


_DRAWS = 2 * np.random.default_rng(3).normal(size=(2, 8)).astype(np.float32)
_SCORES = dict(zip(("caption", "cot"), _DRAWS, strict=True))


def _normalised(scores):
    """Return each group's scores over its deviation, the malformed one below the others."""
    found = []
    for group, ok in zip(scores.reshape(2, 4).astype(np.float64), _OK.reshape(2, 4), strict=True):
        sunk = np.where(ok, group, group[ok].min() - 1)
        found.append((sunk - sunk.mean()) / (sunk.std(ddof=1) + 1e-6))
    return np.concatenate(found)


@pytest.mark.parametrize(
    ("credit", "of_caption", "of_cot"),
    [
        ("response", (0.6, 0.3), (0.6, 0.3)),
        ("segment", (1.2, 0.0), (0.0, 0.6)),
        ("segment_shared", (1.2, 0.3), (0.0, 0.6)),
    ],
)
def test_each_credit_gives_each_token_its_segments_and_leaves_penalties_on_all(
    laid, credit, of_caption, of_cot
):
    changes = {"mode": "acc_gating", "accuracy_weight": None, "format_weight": None}
    changes |= {"caption_weight": 0.6, "cot_weight": 0.3, "credit": credit, "align_coef": 0.5}
    options = dataclasses.replace(
        laid[0], advantage=dataclasses.replace(laid[0].advantage, **changes)
    )
    assert options.advantage.problems() == []
    caption, cot = (_normalised(_SCORES[name]) for name in ("caption", "cot"))
    penalties = np.zeros(8)
    penalties[[1, 4]] = options.advantage.wrong_penalty
    penalties[3] = options.advantage.format_penalty
    wanted = np.empty((8, 6))
    for row, end in enumerate(_CAPTION_TOKENS):
        for token in range(6):
            weights = of_caption if token < end else of_cot
            if not _OK[row]:
                weights = (0.6, 0.3)  # no parts: the sum, as it is without segment credit
            aligned = weights[0] * caption[row] + weights[1] * cot[row]
            wanted[row, token] = 0.5 * aligned - penalties[row]
    found = _by_token(options)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    # Other cots: the captions of well-formed responses notice only where they share.
    other = _by_token(options, cot_shift=5.0)
    is_caption = (np.arange(6) < _CAPTION_TOKENS[:, None]) & _OK[:, None]
    assert ((found != other)[is_caption].any()) == (credit != "segment")
    assert (found != other)[~is_caption & _OK[:, None]].any()


def test_a_view_without_parts_has_no_segment_credit(laid):
    options = laid[0]
    advantage = dataclasses.replace(
        options.advantage,
        caption_weight=None,
        cot_weight=None,
        response_weight=1.0,
        credit="segment",
    )
    whole = dataclasses.replace(options.discriminator, view="whole")
    told = dataclasses.replace(options, advantage=advantage, discriminator=whole).problems()
    assert any("advantage.credit must be 'response' for the view whole" in one for one in told)


def test_a_shared_score_is_pulled_by_all_that_share_it(laid):
    options, packed, places = laid
    rule = _rule(options)
    scores = np.random.default_rng(1).normal(size=packed.batch.is_segment.shape)
    scores = jnp.asarray(scores, jnp.float32)
    pulled, _ = discriminator_loss.gradients(scores, places, rule)
    each, _ = discriminator_loss.gradients_by_name(
        discriminator_loss.scores_at(scores, places), rule
    )
    flat = np.asarray(pulled).ravel()
    for name, one in places.items():
        for place in np.unique(one.student):
            wanted = np.asarray(each[name].student)[one.student == place].sum()
            np.testing.assert_allclose(flat[place], wanted, rtol=1e-5)


def _rule(options):
    own = options.discriminator
    return discriminator_loss.PairRule(
        score_clip=own.score_clip,
        regulariser=own.regulariser,
        router=0.0,
        length_beta=(),
        microbatch_pairs=None,
        all_invalid="none",
        score_dtype="float32",
    )
