"""A discriminator that cannot win by length: each option removes what it names, and no more."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from prism_jax.discriminator import lengths, segments, swaps
from prism_jax.discriminator import loss as discriminator_loss
from tests.models import cases

_PLAIN = discriminator_loss.PairRule(
    score_clip=None,
    regulariser=0.0,
    router=0.0,
    length_beta=(),
    microbatch_pairs=None,
    all_invalid="none",
    score_dtype="float32",
)
_FITTED = dataclasses.replace(_PLAIN, is_fitted=True)
_IS_PAIR = np.array([1, 1, 0, 1, 1, 1], bool)
_TEACHER_TOKENS, _STUDENT_TOKENS = np.array([20, 9]), np.array([7, 19, 0, 30, 9, 4])


def _scores(**changes):
    rng = np.random.default_rng(0)
    usual = {
        "teacher": rng.normal(size=2).astype(np.float32),
        "student": np.where(_IS_PAIR, rng.normal(size=6), 0).astype(np.float32),
        "is_pair": _IS_PAIR,
        "teacher_tokens": _TEACHER_TOKENS,
        "student_tokens": _STUDENT_TOKENS,
    }
    return discriminator_loss.Scores(**(usual | changes))


def _of_length(slope):
    """Return scores to which the log length was added, times a slope."""
    plain = _scores()
    teacher, student = (
        slope * np.log1p(np.maximum(x, 1)) for x in (_TEACHER_TOKENS, _STUDENT_TOKENS)
    )
    return _scores(
        teacher=(plain.teacher + teacher).astype(np.float32),
        student=np.where(_IS_PAIR, plain.student + student, 0).astype(np.float32),
    )


def _gradients(scores, rule):
    by_name, logged = discriminator_loss.gradients_by_name({"cot": scores}, rule)
    return by_name["cot"], {name: float(metric.value) for name, metric in logged.items()}


def _along_length(gradient):
    """Return the gradient's product with the direction in which every score grows with length."""
    teacher, student = (np.log1p(np.maximum(x, 1)) for x in (_TEACHER_TOKENS, _STUDENT_TOKENS))
    return float(np.asarray(gradient.teacher) @ teacher + np.asarray(gradient.student) @ student)


def test_scores_by_length_change_neither_the_fitted_loss_nor_its_gradient():
    plain, told = _gradients(_scores(), _FITTED)
    for slope in (-2.0, 3.0):
        found, again = _gradients(_of_length(slope), _FITTED)
        np.testing.assert_allclose(found.student, plain.student, atol=1e-5)
        np.testing.assert_allclose(found.teacher, plain.teacher, atol=1e-5)
        assert again["discriminator/cot_loss"] == pytest.approx(
            told["discriminator/cot_loss"], 1e-4
        )
        change = again["discriminator/cot_length_slope"] - told["discriminator/cot_length_slope"]
        assert change == pytest.approx(slope, abs=1e-4)


def test_the_fitted_loss_has_no_gradient_along_length_and_the_plain_one_has():
    assert abs(_along_length(_gradients(_of_length(1.0), _FITTED)[0])) < 1e-5
    assert abs(_along_length(_gradients(_of_length(1.0), _PLAIN)[0])) > 1e-2


def test_where_all_lengths_are_equal_nothing_is_fitted():
    same = {"teacher_tokens": np.full(2, 7), "student_tokens": np.full(6, 7)}
    found, told = _gradients(_scores(**same), _FITTED)
    plain, _ = _gradients(_scores(**same), _PLAIN)
    assert told["discriminator/cot_length_slope"] == 0
    np.testing.assert_array_equal(found.student, plain.student)


def test_pairs_of_other_lengths_are_not_learned_from_and_still_measured():
    rule = dataclasses.replace(_PLAIN, match_ratio=1.25)
    found, told = _gradients(_scores(), rule)
    # 20 against 7, 19 and none; 9 against 30, 9 and 4.
    is_matched = np.array([0, 1, 0, 0, 1, 0], bool)
    expected, of_matched = _gradients(_scores(is_pair=is_matched), _PLAIN)
    np.testing.assert_allclose(found.student, np.where(is_matched, expected.student, 0), atol=1e-7)
    np.testing.assert_allclose(found.teacher, expected.teacher, atol=1e-7)
    assert told["discriminator/cot_loss"] == pytest.approx(of_matched["discriminator/cot_loss"])
    assert told["discriminator/cot_matched_fraction"] == pytest.approx(2 / 5)
    plain = _gradients(_scores(), _PLAIN)[1]
    name = "discriminator/cot_pair_accuracy"
    assert told[name] == plain[name] != of_matched[name]


def test_a_step_without_pairs_of_similar_length_teaches_nothing():
    rule = dataclasses.replace(_PLAIN, match_ratio=1.25, regulariser=0.1)
    found, told = _gradients(_scores(student_tokens=np.full(6, 99)), rule)
    assert not np.asarray(found.student).any() and not np.asarray(found.teacher).any()
    assert told["discriminator/cot_matched_fraction"] == 0


def test_another_picture_pulls_its_own_score_down_and_the_teachers_up():
    swapped = np.float32([0.5, 0.0])
    scores = _scores(swapped=swapped, has_swap=np.array([True, False]))
    rule = dataclasses.replace(_PLAIN, swap_coefficient=0.5)
    found, told = _gradients(scores, rule)
    plain, _ = _gradients(scores, _PLAIN)
    share = 0.5 / (1 + np.exp(scores.teacher[0] - 0.5))
    np.testing.assert_allclose(found.swapped, [share, 0], rtol=1e-5)
    np.testing.assert_allclose(found.teacher - plain.teacher, [-share, 0], atol=1e-6)
    np.testing.assert_array_equal(found.student, plain.student)
    assert told["discriminator/swap_gap"] == pytest.approx(scores.teacher[0] - 0.5)
    assert not np.asarray(plain.swapped).any()


def test_scores_of_swaps_are_read_from_their_places_and_pulled_there():
    places = {
        "cot": _scores(
            teacher=np.array([0, 1]),
            student=np.array([2, 3, 0, 4, 5, 6]),
            swapped=np.array([7, 0]),
            has_swap=np.array([True, False]),
        )
    }
    scores = jnp.asarray(np.random.default_rng(1).normal(size=(1, 2, 5)), jnp.float32)
    found = discriminator_loss.scores_at(scores, places)["cot"]
    np.testing.assert_array_equal(found.swapped, [scores.ravel()[7], 0])
    rule = dataclasses.replace(_PLAIN, swap_coefficient=1.0)
    pulled, _ = discriminator_loss.gradients(scores, places, rule)
    each, _ = discriminator_loss.gradients_by_name({"cot": found}, rule)
    np.testing.assert_allclose(pulled.ravel()[7], each["cot"].swapped[0])
    # Where there is no swap the index means nothing: the score at 0 is the teacher's alone.
    np.testing.assert_allclose(pulled.ravel()[0], each["cot"].teacher[0])


def test_prompts_get_the_pictures_of_the_next_one_that_has_any():
    prompts = [
        cases.example("a", 2, ("image", (1, 4, 4)), 3),
        cases.example("b", 5),
        cases.example("c", 1, ("image", (1, 4, 6)), 2),
    ]
    changed, is_changed = swaps.with_other_pictures(prompts, spatial_merge_size=2)
    assert is_changed.tolist() == [True, False, True]
    for before, after in zip(prompts, changed, strict=True):
        np.testing.assert_array_equal(before.tokens, after.tokens)
        assert [x.shape for x in before.pixels] == [x.shape for x in after.pixels]
    same = [prompts[0], dataclasses.replace(prompts[0])]
    assert not swaps.with_other_pictures(same, spatial_merge_size=2)[1].any()


def test_segments_of_a_prompt_are_cut_to_the_shortest_but_not_below_the_least():
    def cut(*sizes):
        names = zip(("caption", "cot"), sizes, strict=True)
        tokens = {name: np.arange(size, dtype=np.int32) for name, size in names}
        return segments.Cut(tokens=tokens, shortened=())

    teachers, students = lengths.cut_equally(
        [cut(9, 8), cut(6, 7)],
        {0: cut(5, 12), 3: cut(7, 2), 5: cut(8, 9)},
        {0: 0, 3: 0, 5: 1},
        min_tokens=4,
    )
    sizes = [[len(x) for x in one.tokens.values()] for one in (*teachers, *students.values())]
    assert sizes == [[5, 4], [6, 7], [5, 4], [5, 2], [6, 7]]
