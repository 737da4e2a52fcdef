"""The honesty panel on constructed discriminators: what is a shortcut is shown as one."""

import dataclasses
import types

import numpy as np
import pytest

from models import kinds
from models.inputs import Example
from prism_jax.discriminator import swaps
from prism_jax.honesty import other_pictures, probes, strata
from prism_jax.honesty import panel as honesty_panel
from prism_jax.honesty import router as honesty_router
from prism_jax.rows import Continuation
from prism_jax.stages.warmup import honesty as warmup_honesty
from tests.models import cases

_SEGMENTS = ("caption", "cot")
_KINDS = (kinds.CAPTION, kinds.COT)


def _pairs(num_prompts=12, num_responses=2, *, longer=0, teacher_last=7, student_last=7):
    """Return pairs: teachers have `longer` tokens more, sides end with these tokens."""
    rng = np.random.default_rng(0)
    prompts = [
        cases.example(f"p{n}", 2, ("image", (1, 4, 4 if n % 2 else 6)), 3)
        for n in range(num_prompts)
    ]
    units, names = [], []
    for prompt in range(num_prompts):
        for _ in range(num_responses):
            for name in range(len(_SEGMENTS)):
                size = rng.integers(5, 30)
                sides = []
                for extra, last in ((longer, teacher_last), (0, student_last)):
                    tokens = rng.integers(1, 100, size + extra).astype(np.int32)
                    tokens[-1] = last
                    sides.append(Continuation(prompt=prompt, tokens=tokens))
                units.append(sides)
                names.append(name)
    return honesty_panel.Pairs(
        prompts=prompts,
        units=units,
        names=names,
        is_cut=[name == 1 for name in names],
        segments=_SEGMENTS,
        kinds=_KINDS,
    )


def _discriminator(score, *, count=None, sees_images=True, keeps_apart=False):
    """Return a discriminator that gives each side of each pair `score(prompt, tokens, kind)`."""

    def scores(pairs: honesty_panel.Pairs) -> np.ndarray:
        return np.array(
            [
                [score(pairs.prompts[s.prompt], s.tokens, pairs.kinds[name]) for s in unit]
                for unit, name in zip(pairs.units, pairs.names, strict=True)
            ],
            np.float32,
        )

    return honesty_panel.Discriminator(
        score=scores,
        count=count,
        sees_images=sees_images,
        keeps_apart=keeps_apart,
        spatial_merge_size=2,
    )


def _measure(pairs, discriminator, **changes):
    options = {"known": None, "fitted": None, "num_pairs": 100}
    return honesty_panel.measure(pairs, discriminator, **(options | changes))


def _length(prompt, tokens, kind):
    return float(len(tokens))


def _brightness(prompt, tokens, kind):
    """Look at the picture: how far is the caption's first token from the mean of the pixels?"""
    return -abs(float(prompt.pixels[0].mean()) - tokens[0] / 100)


def test_a_discriminator_that_looks_at_lengths_alone_is_exposed():
    pairs = _pairs(longer=1)
    told = _measure(pairs, _discriminator(_length))
    for name in _SEGMENTS:
        assert told[f"honesty/{name}_pair_accuracy"] == 1
        assert told[f"honesty/{name}_length_probe_accuracy"] == 1
        assert told[f"honesty/{name}_last_token_probe_accuracy"] == 0.5
        assert told[f"honesty/{name}_probe_explains"] == 1
        # In every pair the teacher is longer: there is no other stratum to look at.
        assert f"honesty/{name}_shorter_pair_accuracy" not in told
    first, second = honesty_panel.warnings(told, _SEGMENTS)
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
    pairs = _pairs(teacher_last=3, student_last=4)
    told = _measure(pairs, _discriminator(lambda prompt, tokens, kind: float(tokens[-1] == 3)))
    assert told["honesty/cot_last_token_probe_accuracy"] == 1
    assert told["honesty/cot_length_probe_accuracy"] == 0.5
    assert "the last token alone" in honesty_panel.warnings(told, _SEGMENTS)[0]


def test_what_no_probe_explains_is_not_warned_of():
    told = _measure(_pairs(), _discriminator(lambda prompt, tokens, kind: float(tokens[0])))
    assert told["honesty/caption_probe_explains"] == told["honesty/cot_probe_explains"] == 0
    assert honesty_panel.warnings(told, _SEGMENTS) == []


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
        told = _measure(_pairs(longer=1), _discriminator(_length, sees_images=sees_images))
        for change in other_pictures.CHANGES:
            assert told[f"honesty/caption_{change}_image_change"] == 0
            assert told[f"honesty/caption_{change}_image_pair_accuracy"] == 1


def test_other_pictures_change_the_scores_of_a_discriminator_that_looks():
    pairs = _pairs()
    told = _measure(pairs, _discriminator(_brightness))
    for change in other_pictures.CHANGES:
        assert told[f"honesty/caption_{change}_image_change"] > 0.001
    # Blank: the mean becomes 0, and the score minus the first token's share.
    expected = [
        abs(_brightness(pairs.prompts[s.prompt], s.tokens, 0) + s.tokens[0] / 100)
        for unit, name in zip(pairs.units, pairs.names, strict=True)
        if name == 0
        for s in unit
    ]
    assert told["honesty/caption_blank_image_change"] == pytest.approx(np.mean(expected), rel=1e-4)


def test_a_segment_scored_as_the_other_shows_whether_kinds_are_kept_apart():
    def apart(prompt, tokens, kind):
        return float(len(tokens)) * (1 if kind == kinds.CAPTION else -1)

    pairs = _pairs(longer=1)
    told = _measure(pairs, _discriminator(apart, keeps_apart=True))
    assert told["honesty/caption_pair_accuracy"] == 1
    assert told["honesty/caption_swapped_pair_accuracy"] == 0
    assert told["honesty/cot_pair_accuracy"] == 0
    assert told["honesty/cot_swapped_pair_accuracy"] == 1
    lengths = [len(s.tokens) for u, n in zip(pairs.units, pairs.names, strict=True) if n for s in u]
    assert told["honesty/cot_swapped_change"] == pytest.approx(2 * np.mean(lengths))


def test_segments_against_the_others_show_whether_kinds_are_scored_at_different_heights():
    pairs = _pairs(longer=1)
    assert 0 in pairs.names and 1 in pairs.names

    def by_kind(prompt, tokens, kind):
        return 100.0 * (kind == kinds.CAPTION) + len(tokens)

    def by_writer(prompt, tokens, kind):
        written = [u for u in pairs.units if u[0].tokens is tokens]
        return float(len(written) > 0)

    heights = _measure(pairs, _discriminator(by_kind, keeps_apart=True))
    assert heights["honesty/caption_against_cot_pair_accuracy"] == 1
    assert heights["honesty/cot_against_caption_pair_accuracy"] == 0
    writers = _measure(pairs, _discriminator(by_writer))
    assert writers["honesty/caption_against_cot_pair_accuracy"] == 1
    assert writers["honesty/cot_against_caption_pair_accuracy"] == 1


def test_segments_of_one_response_are_compared_and_those_of_no_other():
    pairs = _pairs(num_prompts=2, num_responses=1)
    # [teacher's, student's] of caption and cot to one prompt, then to the other.
    known = np.array([[3, 5], [6, 2], [1, 0], [9, 1]], np.float32)
    told = honesty_panel.measure(
        pairs, _discriminator(_length), known=known, fitted=None, num_pairs=2
    )
    assert told["honesty/caption_against_cot_pair_accuracy"] == 0.75  # 3 > 2, 1 = 1
    assert told["honesty/cot_against_caption_pair_accuracy"] == 1  # 6 > 5, 9 > 0
    captions = pairs.at(pairs.of("caption"))
    whole = dataclasses.replace(captions, segments=("response",), kinds=(kinds.WHOLE,))
    told = honesty_panel.measure(
        whole, _discriminator(_length), known=None, fitted=None, num_pairs=2
    )
    assert "honesty/response_pair_accuracy" in told
    assert not [name for name in told if "_against_" in name]


def test_a_discriminator_that_is_not_told_the_kind_has_no_such_number():
    told = _measure(_pairs(longer=1), _discriminator(_length, keeps_apart=False))
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
    pairs = _pairs(longer=1)
    known = np.array([[len(s.tokens) for s in unit] for unit in pairs.units], np.float32)
    told = _measure(pairs, discriminator, known=known, num_pairs=3)
    # Three captions with each of three other pictures.
    assert asked == [3, 3, 3]
    assert told["honesty/num_pairs"] == 24 and told["honesty/cot_pair_accuracy"] == 1
    assert told["honesty/caption_teacher_cut_fraction"] == 0
    assert told["honesty/cot_teacher_cut_fraction"] == 1


def test_the_first_responses_come_from_as_many_prompts_as_there_are():
    pairs = _pairs(num_prompts=4, num_responses=3)
    few = pairs.at(pairs.first(5))
    for name in _SEGMENTS:
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
    told = _measure(_pairs(), _discriminator(_length, count=lambda pairs: choices))
    assert told["honesty/caption_expert_0_load"] == pytest.approx((0.25 + 0.5) / 2)
    assert told["honesty/cot_expert_0_load"] == 0
    assert told["honesty/router_information_bits_mean"] == pytest.approx(1)
    assert told["honesty/router_information_bits_max"] == pytest.approx(1)


def test_shuffled_pictures_are_the_next_prompts_in_this_prompts_grid():
    prompts = _pairs(num_prompts=3).prompts
    found = other_pictures.changed(prompts, "shuffled", spatial_merge_size=2)
    for place, one in enumerate(found):
        other = prompts[(place + 1) % 3]
        assert one.grids == prompts[place].grids
        assert one.pixels[0].shape == prompts[place].pixels[0].shape
        rows = {row.tobytes() for row in other.pixels[0]}
        assert {row.tobytes() for row in one.pixels[0]} <= rows
    # Prompts 0 and 2 have pictures of one size: they are handed on whole.
    np.testing.assert_array_equal(found[2].pixels[0], prompts[0].pixels[0])


def test_a_borrowed_picture_keeps_its_places():
    def picture(grid, merge):
        places = swaps._coords(grid, merge)
        pixels = (1000 * places[:, 1:2] + places[:, 2:3]).astype(np.float32)
        return Example(
            tokens=np.zeros(1, np.int32),
            token_types=np.zeros(1, np.int32),
            grids=[grid],
            pixels=[pixels],
        )

    small, large = picture((1, 2, 4), 2), picture((1, 4, 8), 2)
    found, _ = other_pictures.changed([small, large], "shuffled", spatial_merge_size=2)
    # Every second row and column of the large one, in the order of the small one's patches.
    places = swaps._coords((1, 2, 4), 2)
    np.testing.assert_array_equal(
        found.pixels[0][:, 0], 2 * (1000 * places[:, 1] + places[:, 2]).astype(np.float32)
    )


def test_blank_and_replaced_pictures_keep_their_type_and_a_prompt_without_stays():
    bare = cases.example("text", 5)
    seen = _pairs(num_prompts=1).prompts[0]
    bright = Example(
        tokens=seen.tokens,
        token_types=seen.token_types,
        grids=seen.grids,
        pixels=[np.full(seen.pixels[0].shape, 200, np.uint8)],
    )
    blank = other_pictures.changed([bare, bright, seen], "blank", spatial_merge_size=2)
    assert blank[0] is bare
    assert blank[1].pixels[0].dtype == np.uint8 and (blank[1].pixels[0] == 128).all()
    assert (blank[2].pixels[0] == 0).all()
    noise = other_pictures.changed([bright], "replaced", spatial_merge_size=2)[0].pixels[0]
    again = other_pictures.changed([bright], "replaced", spatial_merge_size=2)[0].pixels[0]
    assert noise.dtype == np.uint8 and noise.std() > 50
    np.testing.assert_array_equal(noise, again)


def test_the_panel_is_due_on_its_steps_and_at_the_end_and_never_when_off():
    options = honesty_panel.Options(every_steps=4, num_pairs=1)
    assert [step for step in range(1, 11) if options.is_due(step, 10)] == [4, 8, 10]
    off = honesty_panel.Options(every_steps=None, num_pairs=1)
    assert not off.is_due(10, 10)


class _Feed:
    """A feed whose held-out pairs are told apart by their length."""

    names = _SEGMENTS

    def __init__(self):
        self.asked = []

    def held_out_pairs(self, num_rows):
        self.asked.append(("held out", num_rows))
        return _pairs(longer=1)

    def probe_pairs(self, num_rows):
        self.asked.append(("learned from", num_rows))
        pairs = _pairs(longer=1)
        return {name: pairs.at(pairs.of(name)).probed() for name in _SEGMENTS}


class _Scoring:
    def discriminator(self, params):
        assert params == "params"
        return _discriminator(_length)


def _beside(feed, *, evaluate_every_steps, every_steps, evaluate=lambda state, step: {"eval/x": 1}):
    return warmup_honesty.beside(
        evaluate,
        feed,
        _Scoring(),
        honesty_panel.Options(every_steps=every_steps, num_pairs=5),
        evaluate_every_steps=evaluate_every_steps,
        num_steps=10,
    )


def test_the_warm_up_evaluates_and_measures_each_after_its_own_steps(capsys):
    feed, state = _Feed(), types.SimpleNamespace(params="params")
    both = _beside(feed, evaluate_every_steps=4, every_steps=6)
    assert warmup_honesty.every_steps(4, 6) == 2
    found = {step: both(state, step) for step in (2, 4, 6, 8, 10)}
    assert [step for step, told in found.items() if "eval/x" in told] == [4, 8, 10]
    assert [step for step, told in found.items() if "honesty/num_pairs" in told] == [6, 10]
    # Probes are fitted once, on pairs that are learned from; num_pairs are asked about.
    assert [what for what, _ in feed.asked] == ["learned from", "held out", "held out"]
    assert feed.asked[1] == ("held out", 5) and found[6]["honesty/num_pairs"] == 5
    assert capsys.readouterr().err.count("WARNING: caption: the length alone") == 2


def test_a_panel_that_is_off_reads_nothing_and_leaves_the_evaluation_as_it_is(capsys):
    feed = _Feed()

    def evaluate(state, step):
        return {}

    off = _beside(feed, evaluate_every_steps=4, every_steps=None, evaluate=evaluate)
    assert off is evaluate and feed.asked == []
    assert warmup_honesty.every_steps(4, None) == 4
    assert warmup_honesty.every_steps(None, 6) == 6
    assert warmup_honesty.every_steps(None, None) is None
    assert _beside(feed, evaluate_every_steps=4, every_steps=6, evaluate=None) is None
    assert "no pairs are held out" in capsys.readouterr().err
