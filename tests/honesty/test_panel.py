"""The honesty panel on constructed discriminators: what is a shortcut is shown as one."""

import dataclasses

import numpy as np
import pytest

from models import kinds
from prism_jax.honesty import other_pictures, probes, strata
from prism_jax.honesty import panel as honesty_panel
from prism_jax.honesty import router as honesty_router
from tests.honesty import constructed


def test_a_discriminator_that_looks_at_lengths_alone_is_exposed():
    pairs = constructed.pairs(longer=1)
    told = constructed.measure(pairs, constructed.discriminator(constructed.length))
    for name in constructed.SEGMENTS:
        assert told[f"honesty/{name}_pair_accuracy"] == 1
        assert told[f"honesty/{name}_length_probe_accuracy"] == 1
        assert told[f"honesty/{name}_last_token_probe_accuracy"] == 0.5
        assert told[f"honesty/{name}_probe_explains"] == 1
        # In every pair the teacher is longer: there is no other stratum to look at.
        assert f"honesty/{name}_shorter_pair_accuracy" not in told
    first, second = honesty_panel.warnings(told, constructed.SEGMENTS)
    assert first == (
        "WARNING: caption: the length alone tells teacher from student in 100 % of pairs, the "
        "discriminator in 100 %: it may look at nothing else"
    )
    assert second.startswith("WARNING: cot: the length alone")


def test_among_segments_of_similar_length_a_discriminator_of_lengths_is_a_coin():
    rng = np.random.default_rng(3)
    student = rng.integers(20, 40, 400)
    teacher = student + rng.integers(-12, 13, 400)
    pairs = probes.Pairs(
        teacher_tokens=teacher,
        student_tokens=student,
        teacher_last=np.zeros(400, int),
        student_last=np.zeros(400, int),
        prompt=np.arange(400),
    )
    by_length = strata.measure(pairs, teacher - student)
    assert by_length["longer_pair_accuracy"] == 1 and by_length["shorter_pair_accuracy"] == 0
    assert 0.35 < by_length["similar_pair_accuracy"] < 0.65
    assert 0.35 < by_length["similar_length_probe_accuracy"] < 0.65
    by_content = strata.measure(pairs, np.ones(400))
    shares = [by_content[f"{name}_fraction"] for name in ("shorter", "similar", "longer")]
    assert sum(shares) == pytest.approx(1) and min(shares) > 0.1
    assert by_content["similar_pair_accuracy"] == by_content["shorter_pair_accuracy"] == 1


def test_a_discriminator_that_looks_at_the_last_token_alone_is_exposed():
    pairs = constructed.pairs(teacher_last=3, student_last=4)
    told = constructed.measure(
        pairs, constructed.discriminator(lambda prompt, tokens, kind: float(tokens[-1] == 3))
    )
    assert told["honesty/cot_last_token_probe_accuracy"] == 1
    assert told["honesty/cot_length_probe_accuracy"] == 0.5
    assert "the last token alone" in honesty_panel.warnings(told, constructed.SEGMENTS)[0]


def test_what_no_probe_explains_is_not_warned_of():
    told = constructed.measure(
        constructed.pairs(),
        constructed.discriminator(lambda prompt, tokens, kind: float(tokens[0])),
    )
    assert told["honesty/caption_probe_explains"] == told["honesty/cot_probe_explains"] == 0
    assert honesty_panel.warnings(told, constructed.SEGMENTS) == []


@pytest.mark.parametrize(
    ("probe", "accuracy", "expected"),
    [
        (0.75, 0.77, True),
        (0.75, 0.78, False),
        (0.74, 0.5, False),
        (0.99, 1.0, True),
        (0.8, 0.6, True),
        (1.0, 0.5, False),
    ],
)
def test_a_probe_explains_what_is_hardly_better_and_better_than_a_coin(probe, accuracy, expected):
    assert honesty_panel.explains(probe, accuracy) == expected


def test_other_pictures_change_nothing_for_a_discriminator_that_reads_text_alone():
    for sees_images in (True, False):
        told = constructed.measure(
            constructed.pairs(longer=1),
            constructed.discriminator(constructed.length, sees_images=sees_images),
        )
        for change in other_pictures.CHANGES:
            assert told[f"honesty/caption_{change}_image_change"] == 0
            assert told[f"honesty/caption_{change}_image_pair_accuracy"] == 1


def test_other_pictures_change_the_scores_of_a_discriminator_that_looks():
    pairs = constructed.pairs()
    told = constructed.measure(pairs, constructed.discriminator(constructed.brightness))
    for change in other_pictures.CHANGES:
        assert told[f"honesty/caption_{change}_image_change"] > 0.001
    # Blank: the mean becomes 0, and the score minus the first token's share.
    expected = [
        abs(constructed.brightness(pairs.prompts[s.prompt], s.tokens, 0) + s.tokens[0] / 100)
        for unit, name in zip(pairs.units, pairs.names, strict=True)
        if name == 0
        for s in unit
    ]
    assert told["honesty/caption_blank_image_change"] == pytest.approx(np.mean(expected), rel=1e-4)


def test_a_segment_scored_as_the_other_shows_whether_kinds_are_kept_apart():
    def apart(prompt, tokens, kind):
        return float(len(tokens)) * (1 if kind == kinds.CAPTION else -1)

    pairs = constructed.pairs(longer=1)
    told = constructed.measure(pairs, constructed.discriminator(apart, keeps_apart=True))
    assert told["honesty/caption_pair_accuracy"] == 1
    assert told["honesty/caption_swapped_pair_accuracy"] == 0
    assert told["honesty/cot_pair_accuracy"] == 0
    assert told["honesty/cot_swapped_pair_accuracy"] == 1
    lengths = [len(s.tokens) for u, n in zip(pairs.units, pairs.names, strict=True) if n for s in u]
    assert told["honesty/cot_swapped_change"] == pytest.approx(2 * np.mean(lengths))


def test_segments_against_the_others_show_whether_kinds_are_scored_at_different_heights():
    pairs = constructed.pairs(longer=1)
    assert 0 in pairs.names and 1 in pairs.names

    def by_kind(prompt, tokens, kind):
        return 100.0 * (kind == kinds.CAPTION) + len(tokens)

    def by_writer(prompt, tokens, kind):
        written = [u for u in pairs.units if u[0].tokens is tokens]
        return float(len(written) > 0)

    heights = constructed.measure(pairs, constructed.discriminator(by_kind, keeps_apart=True))
    assert heights["honesty/caption_against_cot_pair_accuracy"] == 1
    assert heights["honesty/cot_against_caption_pair_accuracy"] == 0
    writers = constructed.measure(pairs, constructed.discriminator(by_writer))
    assert writers["honesty/caption_against_cot_pair_accuracy"] == 1
    assert writers["honesty/cot_against_caption_pair_accuracy"] == 1


def test_segments_of_one_response_are_compared_and_those_of_no_other():
    pairs = constructed.pairs(num_prompts=2, num_responses=1)
    # [teacher's, student's] of caption and cot to one prompt, then to the other.
    known = np.array([[3, 5], [6, 2], [1, 0], [9, 1]], np.float32)
    told = honesty_panel.measure(
        pairs, constructed.discriminator(constructed.length), known=known, fitted=None, num_pairs=2
    )
    assert told["honesty/caption_against_cot_pair_accuracy"] == 0.75  # 3 > 2, 1 = 1
    assert told["honesty/cot_against_caption_pair_accuracy"] == 1  # 6 > 5, 9 > 0
    captions = pairs.at(pairs.of("caption"))
    whole = dataclasses.replace(captions, segments=("response",), kinds=(kinds.WHOLE,))
    told = honesty_panel.measure(
        whole, constructed.discriminator(constructed.length), known=None, fitted=None, num_pairs=2
    )
    assert "honesty/response_pair_accuracy" in told
    assert not [name for name in told if "_against_" in name]


def test_a_discriminator_that_is_not_told_the_kind_has_no_such_number():
    told = constructed.measure(
        constructed.pairs(longer=1),
        constructed.discriminator(constructed.length, keeps_apart=False),
    )
    assert "honesty/caption_pair_accuracy" in told
    assert not [name for name in told if "_swapped_" in name]


def test_scores_that_are_known_are_not_asked_for_again():
    asked = []

    def score(pairs):
        asked.append(len(pairs.units))
        return np.zeros((len(pairs.units), 2))

    discriminator = honesty_panel.Discriminator(
        score=score, count=None, sees_images=True, keeps_apart=False, spatial_merge_size=2
    )
    pairs = constructed.pairs(longer=1)
    known = np.array([[len(s.tokens) for s in unit] for unit in pairs.units], np.float32)
    told = constructed.measure(pairs, discriminator, known=known, num_pairs=3)
    # Three captions with each of three other pictures.
    assert asked == [3, 3, 3]
    assert told["honesty/num_pairs"] == 24 and told["honesty/cot_pair_accuracy"] == 1
    assert told["honesty/caption_teacher_cut_fraction"] == 0
    assert told["honesty/cot_teacher_cut_fraction"] == 1


def test_the_first_responses_come_from_as_many_prompts_as_there_are():
    pairs = constructed.pairs(num_prompts=4, num_responses=3)
    few = pairs.at(pairs.first(5))
    for name in constructed.SEGMENTS:
        prompts = [unit[0].prompt for unit in few.at(few.of(name)).units]
        assert sorted(prompts) == [0, 0, 1, 2, 3]


def test_probes_are_fitted_on_other_prompts_than_they_are_asked_about():
    # The last token tells the prompt, and the prompt the teacher: only memory could know it.
    numbers = np.arange(40)
    pairs = probes.Pairs(
        teacher_tokens=np.full(40, 9),
        student_tokens=np.full(40, 9),
        teacher_last=numbers,
        student_last=numbers + 100,
        prompt=numbers,
    )
    assert probes.accuracy(probes.last_token(pairs, pairs)) == 1
    assert probes.across_prompts(probes.last_token, pairs) == 0.5
    one_prompt = pairs.at(numbers == 3)
    assert probes.across_prompts(probes.last_token, one_prompt) is None


def test_the_length_probe_finds_a_range_of_lengths_as_well_as_a_direction():
    rng = np.random.default_rng(0)
    teacher = rng.integers(40, 60, 200)
    student = np.where(rng.random(200) < 0.5, rng.integers(1, 20, 200), rng.integers(80, 99, 200))

    def made(chosen):
        ends = np.zeros(100, int)
        return probes.Pairs(
            teacher_tokens=teacher[chosen],
            student_tokens=student[chosen],
            teacher_last=ends,
            student_last=ends,
            prompt=np.arange(100),
        )

    found = probes.length(made(slice(0, 100)), made(slice(100, 200)))
    assert probes.accuracy(found) > 0.95


def test_an_empty_segment_ends_with_a_token_of_its_own():
    empty, full = np.zeros(0, np.int32), np.array([5], np.int32)
    pairs = probes.Pairs.of([0, 1], [full, full], [empty, empty])
    assert pairs.student_last.tolist() == [-1, -1]
    assert probes.accuracy(probes.last_token(pairs, pairs)) == 1


def test_equal_scores_count_as_half_right():
    assert probes.accuracy(np.array([0.0, 0.0, 1.0, -1.0])) == 0.5


def test_experts_that_serve_one_kind_each_tell_one_bit_and_shared_ones_none():
    choices = np.zeros((2, 3, 4))
    choices[0, kinds.CAPTION, :2] = [3, 9]
    choices[0, kinds.COT, 2:] = [100, 300]
    choices[1, kinds.CAPTION] = [2, 4, 6, 8]
    choices[1, kinds.COT] = [20, 40, 60, 80]
    both = choices[:, [kinds.CAPTION, kinds.COT]]
    np.testing.assert_allclose(honesty_router.information_bits(both), [1, 0], atol=1e-12)
    # One expert of three is shared: half of each kind's choices on it tell nothing.
    half = np.array([[[1.0, 1, 0], [0, 1, 1]]])
    np.testing.assert_allclose(honesty_router.information_bits(half), [0.5], atol=1e-12)
    assert honesty_router.information_bits(choices[:, [kinds.CAPTION]]).tolist() == [0, 0]


def test_the_routers_use_is_told_by_expert_and_segment():
    choices = np.zeros((2, 3, 4))
    choices[:, kinds.CAPTION, :2] = [[1, 3], [2, 2]]
    choices[:, kinds.COT, 2:] = 5
    told = constructed.measure(
        constructed.pairs(),
        constructed.discriminator(constructed.length, count=lambda pairs: choices),
    )
    assert told["honesty/caption_expert_0_load"] == pytest.approx((0.25 + 0.5) / 2)
    assert told["honesty/cot_expert_0_load"] == 0
    assert told["honesty/router_information_bits_mean"] == pytest.approx(1)
    assert told["honesty/router_information_bits_max"] == pytest.approx(1)


def test_the_panel_is_due_on_its_steps_and_at_the_end_and_never_when_off():
    options = honesty_panel.Options(every_steps=4, num_pairs=1)
    assert [step for step in range(1, 11) if options.is_due(step, 10)] == [4, 8, 10]
    off = honesty_panel.Options(every_steps=None, num_pairs=1)
    assert not off.is_due(10, 10)
