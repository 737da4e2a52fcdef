"""The discriminator's loss: the recorded cases, splits, the options, and what is absent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prism_jax import metrics
from prism_jax.losses import pairwise

DEFAULT = {
    "score_clip": None,
    "length_beta": None,
    "normalisation": "global",
    "all_invalid": "none",
    "batch_pairs": None,
    "score_dtype": "float32",
}


def segment(teacher, student, is_pair, teacher_tokens=None, student_tokens=None):
    return pairwise.Segment(
        teacher=jnp.asarray(teacher, jnp.float32),
        student=jnp.asarray(student, jnp.float32),
        is_pair=jnp.asarray(is_pair, bool),
        teacher_tokens=teacher_tokens,
        student_tokens=student_tokens,
    )


def random_segments(is_pair):
    draws = 3 * np.random.default_rng(1).normal(size=(4, len(is_pair)))
    return {
        "caption": segment(draws[0], draws[1], is_pair),
        "cot": segment(draws[2], draws[3], is_pair),
    }


def rows_of(segments, rows):
    return jax.tree.map(lambda x: x[rows], segments)


def test_bfloat16_rounds_every_step_behind_the_head_and_the_gradients_as_a_bfloat16_tensor_does():
    rng = np.random.default_rng(0)
    teacher, student = 12 * rng.normal(size=(2, 64)).astype(np.float32)
    tokens = rng.integers(1, 3000, size=(2, 64))
    is_pair = np.arange(64) % 5 > 0
    half = jnp.bfloat16.dtype.type  # NumPy rounds the result of each operation on it

    def ready(scores, num_tokens):
        length = np.log1p(num_tokens.astype(half).astype(np.float32)).astype(half)
        # A factor that is no tensor stays as it is.
        correction = (np.float32(0.3) * length.astype(np.float32)).astype(half)
        corrected = scores.astype(half) - correction
        return corrected, np.clip(corrected, half(-10), half(10)).astype(half)

    (free_t, t), (free_s, s) = ready(teacher, tokens[0]), ready(student, tokens[1])
    difference = (t - s).astype(np.float32)
    losses = np.log1p(np.exp(-difference.astype(np.float64))).astype(half)
    squares = ((t * t).astype(np.float32) + (s * s).astype(np.float32)) / 2

    def total(raw_teacher, dtype):
        segments = {"cot": segment(raw_teacher, student, is_pair, *tokens)}
        options = DEFAULT | {"score_clip": 10.0, "length_beta": {"cot": 0.3}, "score_dtype": dtype}
        terms, _ = pairwise.loss(segments, jnp.ones(64, bool), **options)
        return terms["cot"].total, terms["regulariser"].total

    for of in (total, jax.jit(total, static_argnums=1)):  # a compiler may not leave roundings out
        pair, regulariser = of(teacher, "bfloat16")
        np.testing.assert_allclose(pair, losses[is_pair].astype(np.float32).sum(), rtol=1e-3)
        np.testing.assert_allclose(regulariser, squares.sum(), rtol=1e-6)
    exact = np.array(total(teacher, "float32"))
    assert (np.abs(exact - np.array([pair, regulariser])) > 1e-4 * np.abs(exact)).all()
    gradient = np.array(jax.jit(jax.grad(lambda x: total(x, "bfloat16")[0]))(teacher))
    np.testing.assert_array_equal(gradient, gradient.astype(half).astype(np.float32))
    wanted = -1 / (1 + np.exp(difference.astype(np.float64)))
    wanted *= is_pair & (np.abs(free_t.astype(np.float32)) < 10)
    np.testing.assert_allclose(gradient, wanted, rtol=2**-7, atol=1e-9)
    assert np.abs(free_s.astype(np.float32)).max() > 10


def test_every_oracle_case_gives_the_loss_of_both_segments_and_the_regulariser(oracle):
    cases = oracle("discriminator_loss.json")
    num_rows = max(len(case["format_ok"]) for case in cases)

    def pad(values):
        return jnp.pad(jnp.array(values, jnp.float32), (0, num_rows - len(values)))

    for index, case in enumerate(cases):
        is_pair = pad(case["format_ok"]) > 0
        segments = {
            name: segment(pad(case[f"teacher_{name}"]), pad(case[f"student_{name}"]), is_pair)
            for name in ("caption", "cot")
        }
        terms, logged = pairwise.loss(
            segments,
            jnp.arange(num_rows) < len(case["format_ok"]),
            score_clip=case["score_clip"],
            length_beta=None,
            normalisation="global",
            all_invalid="released",
            batch_pairs={name: is_pair.sum(dtype=jnp.float32) for name in segments},
            score_dtype="float32",
        )
        got = {name: float(term.value) for name, term in terms.items()}
        close = {"rtol": 1e-5, "atol": 1e-6, "err_msg": f"case {index}"}
        np.testing.assert_allclose(got["caption"], case["caption_loss"], **close)
        np.testing.assert_allclose(got["cot"], case["cot_loss"], **close)
        np.testing.assert_allclose(got["regulariser"], case["regulariser"], **close)
        loss = got["caption"] + got["cot"] + case["score_reg"] * got["regulariser"]
        np.testing.assert_allclose(loss, case["loss"], **close)
        has_pair = any(case["format_ok"])
        assert ("discriminator/cot_pair_accuracy" in metrics.read(logged)) == has_pair


def test_whole_response_is_one_segment_with_the_bradley_terry_loss():
    terms, logged = pairwise.loss(
        {"response": segment([1.0, 0.0], [0.0, 2.0], [1, 1])}, jnp.ones(2, bool), **DEFAULT
    )
    expected = (np.log1p(np.exp(-1.0)) + np.log1p(np.exp(2.0))) / 2
    np.testing.assert_allclose(terms["response"].value, expected, rtol=1e-6)
    np.testing.assert_allclose(terms["regulariser"].value, (1 + 0 + 0 + 4) / 4)
    assert metrics.read(logged)["discriminator/response_pair_accuracy"] == 0.5


def test_a_tie_is_half_right():
    _, logged = pairwise.loss(
        {"response": segment([1.0, 0.0, 3.0, 5.0], [1.0, 2.0, 3.0, 4.0], [1, 1, 1, 1])},
        jnp.ones(4, bool),
        **DEFAULT,
    )
    assert metrics.read(logged)["discriminator/response_pair_accuracy"] == 0.5
    tie = {"response": segment([1.0], [1.0], [1])}
    _, logged = pairwise.loss(tie, jnp.ones(1, bool), **DEFAULT)
    assert metrics.read(logged)["discriminator/response_pair_accuracy"] == 0.5


@pytest.mark.parametrize("is_pair", [[1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0]])
@pytest.mark.parametrize("all_invalid", ["none", "released"])
def test_global_normalisation_gives_one_step_for_any_split(is_pair, all_invalid, share):
    segments, row_mask = random_segments(is_pair), jnp.array([1, 1, 1, 1, 1, 1], bool)
    pairs = {name: s.is_pair for name, s in segments.items()}
    whole = pairwise.weights(pairs, row_mask, normalisation="global", all_invalid=all_invalid)
    counts = {name: p.sum(dtype=jnp.float32) for name, p in pairs.items()}
    options = DEFAULT | {
        "all_invalid": all_invalid,
        "batch_pairs": counts if all_invalid == "released" else None,
    }

    def step(rows):
        def loss(shift):
            moved = rows_of(segments, rows)
            moved = {
                k: segment(shift * s.teacher, s.student - shift, s.is_pair)
                for k, s in moved.items()
            }
            terms, _ = pairwise.loss(moved, row_mask[rows], **options)
            return share(terms, whole)

        return jax.jit(jax.value_and_grad(loss))(0.5)

    expected = step(slice(0, 6))
    if all_invalid == "released" and not any(is_pair):
        # The fallback is the logistic of a mean: it depends on the split, as released.
        assert float(expected[0]) != pytest.approx(float(step(slice(0, 1))[0]) * 6)
        return
    for ends in ([1, 6], [2, 3, 6]):
        parts = [step(slice(a, b)) for a, b in zip([0, *ends], ends, strict=False)]
        got = np.sum(parts, axis=0)
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_microbatch_normalisation_averages_the_means_of_the_microbatches(share):
    is_pair = [1, 0, 1, 1]
    segments, row_mask = random_segments(is_pair), jnp.ones(4, bool)
    whole = pairwise.weights(
        {name: s.is_pair for name, s in segments.items()},
        row_mask,
        normalisation="microbatch",
        all_invalid="none",
    )
    options = DEFAULT | {"normalisation": "microbatch"}
    got, expected = 0.0, 0.0
    for rows in (slice(0, 2), slice(2, 4)):
        terms, _ = pairwise.loss(rows_of(segments, rows), row_mask[rows], **options)
        got += share({"cot": terms["cot"]}, {"cot": whole["cot"]})
        cot = rows_of(segments["cot"], rows)
        pair_losses = np.log1p(np.exp(cot.student - cot.teacher))[np.asarray(cot.is_pair)]
        expected += pair_losses.mean() / 2
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_without_a_valid_pair_accuracy_and_scores_are_absent():
    segments = random_segments([0, 0])
    terms, logged = pairwise.loss(segments, jnp.ones(2, bool), **DEFAULT)
    assert set(metrics.read(logged)) == {
        "discriminator/caption_valid_fraction",
        "discriminator/cot_valid_fraction",
        "discriminator/regulariser_loss",
    }
    assert float(terms["cot"].value) == 0.0


def test_the_clip_stops_the_gradient_outside_and_is_off_with_none():
    def loss(teacher, clip):
        terms, _ = pairwise.loss(
            {"cot": segment(teacher, [0.0], [1])},
            jnp.ones(1, bool),
            **(DEFAULT | {"score_clip": clip}),
        )
        return terms["cot"].value

    gradient = jax.grad(loss)
    assert gradient(jnp.array([12.0]), 10.0) == 0
    np.testing.assert_allclose(
        gradient(jnp.array([12.0]), None), [-1 / (1 + np.exp(12.0))], rtol=1e-3
    )


def test_length_correction_acts_on_its_segment_alone_and_before_the_clip():
    tokens = {"teacher_tokens": jnp.array([0, 99]), "student_tokens": jnp.array([9, 9])}
    segments = {
        "caption": segment([0.0, 4.0], [0.0, 0.0], [1, 1], **tokens),
        "cot": segment([0.0, 4.0], [0.0, 0.0], [1, 1], **tokens),
    }
    terms, _ = pairwise.loss(
        segments, jnp.ones(2, bool), **(DEFAULT | {"length_beta": {"cot": 0.5}, "score_clip": 1.0})
    )
    # Teacher lengths 0 (taken as 1) and 99, student lengths 9; then the clip to ±1.
    teacher = np.clip([0 - 0.5 * np.log(2), 4 - 0.5 * np.log(100)], -1, 1)
    student = np.clip(np.array([0, 0]) - 0.5 * np.log(10), -1, 1)
    np.testing.assert_allclose(
        terms["cot"].value, np.log1p(np.exp(student - teacher)).mean(), rtol=1e-5
    )
    np.testing.assert_allclose(
        terms["caption"].value, (np.log(2) + np.log1p(np.exp(-1))) / 2, rtol=1e-5
    )


def test_padding_rows_count_nowhere():
    segments = random_segments([1, 1, 0])
    terms, logged = pairwise.loss(segments, jnp.array([1, 1, 0], bool), **DEFAULT)
    first_rows = rows_of(segments, slice(0, 2))
    alone, logged_alone = pairwise.loss(first_rows, jnp.ones(2, bool), **DEFAULT)
    for name in terms:
        np.testing.assert_allclose(terms[name].value, alone[name].value, rtol=1e-6)
    assert metrics.read(logged) == pytest.approx(metrics.read(logged_alone))


def test_options_that_contradict_each_other_are_refused():
    segments, rows = random_segments([1, 1]), jnp.ones(2, bool)
    with pytest.raises(ValueError, match="batch_pairs"):
        pairwise.loss(segments, rows, **(DEFAULT | {"all_invalid": "released"}))
    with pytest.raises(ValueError, match="respons"):
        pairwise.loss(segments, rows, **(DEFAULT | {"length_beta": {"response": 0.1}}))
