"""95 % intervals of rates, against values worked out by hand."""

import random

import pytest

from prism_jax import intervals


@pytest.mark.parametrize(
    ("num_right", "num_prompts", "low", "high"),
    [
        # z = 1.959964: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
        (8, 10, 0.4901625, 0.9433178),
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (50, 100, 0.4038315, 0.5961685),
    ],
)
def test_one_response_a_prompt_gives_wilsons_interval(num_right, num_prompts, low, high):
    values = [1.0] * num_right + [0.0] * (num_prompts - num_right)
    found = intervals.rate(values, num_responses=1)
    assert found.mean == num_right / num_prompts
    assert found.low == pytest.approx(low, abs=1e-6)
    assert found.high == pytest.approx(high, abs=1e-6)


def test_equal_responses_to_a_prompt_count_once():
    values = [1.0] * 30 + [0.0] * 20
    once, four_times = (intervals.rate(values, num_responses=k) for k in (1, 4))
    assert four_times == once


def test_responses_that_never_agree_count_each():
    # One of two right everywhere: the means do not spread at all.
    halves = intervals.rate([0.5] * 50, num_responses=2)
    assert halves == intervals.rate([1.0, 0.0] * 50, num_responses=1)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    """Prompts of different difficulty, 3 responses each: the naive interval would be too narrow."""
    rng = random.Random(0)
    hits = 0
    for _ in range(1000):
        prompts = [rng.choice((0.05, 0.95)) for _ in range(60)]
        means = [sum(rng.random() < p for _ in range(3)) / 3 for p in prompts]
        found = intervals.rate(means, num_responses=3)
        hits += found.low <= 0.5 <= found.high
    # 950 are expected; one deviation is sqrt(1000 x 0.95 x 0.05) = 7.
    assert 920 <= hits <= 980


def test_a_rate_is_written_in_percent():
    assert str(intervals.rate([1.0] * 8 + [0.0] * 2, num_responses=1)) == "80.0 % [49.0, 94.3]"


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(ValueError, match="0 prompts"):
        intervals.rate([], num_responses=1)


def test_means_over_seeds_have_students_interval():
    found = intervals.over_seeds([0.01, 0.02, 0.03, 0.04, 0.05])
    # t(4, 0.975) = 2.776445 times 0.0158114 / sqrt(5)
    assert found.mean == pytest.approx(0.03)
    assert found.high - found.mean == pytest.approx(0.0196324, abs=1e-6)
    assert found.mean - found.low == pytest.approx(0.0196324, abs=1e-6)
    assert intervals.over_seeds([0.5]) == intervals.Mean(mean=0.5, low=None, high=None)
    with pytest.raises(ValueError, match="needs values"):
        intervals.over_seeds([])


def test_the_bootstrap_is_over_prompts_and_keeps_the_seeds():
    # Two seeds of 400 prompts, 0.2 and 0.6 of them 1: the variance of the mean of both is
    # (0.2 * 0.8 + 0.6 * 0.4) / 400 / 4; the distance of the seeds is not in it.
    values = [[1.0] * 80 + [0.0] * 320, [1.0] * 240 + [0.0] * 160]
    found = intervals.over_prompts(values)
    half = 1.959964 * (0.4 / 400 / 4) ** 0.5
    assert found.mean == pytest.approx(0.4)
    assert found.low == pytest.approx(0.4 - half, abs=0.003)
    assert found.high == pytest.approx(0.4 + half, abs=0.003)
    assert intervals.over_prompts(values) == found
    with pytest.raises(ValueError, match="values of each seed"):
        intervals.over_prompts([[1.0], []])
