"""Pictures: their sizes, and that they show what the scene says."""

import random

import numpy as np
import pytest

from prism_jax.data.numerals import corpus as numerals_corpus
from prism_jax.data.numerals import pictures as numerals_pictures
from prism_jax.data.numerals import scenes as numerals_scenes


def _one_digit(digit: int) -> numerals_scenes.Grid:
    mark = numerals_scenes.Mark(kind="digit", name=str(digit), ink="black")
    return numerals_scenes.Grid(paper="white", rows=((mark,),))


def _pixels(digit: int, seed: int, *, is_test: bool) -> np.ndarray:
    picture = numerals_pictures.draw_grid(
        _one_digit(digit), random.Random(seed), cell_pixels=(32, 32), is_test=is_test
    )
    return np.asarray(picture.convert("L").resize((8, 8)), np.float32).ravel()


def test_the_handwriting_has_the_published_samples():
    splits = [numerals_pictures.handwriting(is_test=is_test) for is_test in (False, True)]
    counts = [sum(len(split[digit]) for split in splits) for digit in range(10)]
    # Source: UCI optdigits.names, class distribution of optdigits.tes.
    assert counts == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    levels = {
        level for split in splits for rows in split.values() for x in rows for level in x.tobytes()
    }
    assert levels == {number * 255 // 16 for number in range(17)}


def test_nearest_training_picture_reads_most_test_digits():
    train = np.stack([_pixels(n % 10, n, is_test=False) for n in range(1500)])
    right = 0
    for n in range(200):
        distance = np.square(train - _pixels(n % 10, 10_000 + n, is_test=True)).sum(1)
        right += int(distance.argmin()) % 10 == n % 10
    # Chance is 20 of 200.
    assert right >= 120


def test_tiny_pictures_have_two_to_four_cells_of_32_pixels():
    sizes = {
        e.picture().size
        for e in numerals_corpus.stream(level="tiny", seed=0, name="align", rows=60)
    }
    assert sizes == {(64, 32), (96, 32), (64, 64)}


def test_small_pictures_are_at_most_320_pixels_and_whole_patches():
    for example in numerals_corpus.stream(level="small", seed=0, name="align", rows=60):
        width, height = example.picture().size
        assert width % 32 == height % 32 == 0
        assert max(width, height) <= 320


@pytest.mark.parametrize("name", [*numerals_scenes.SHAPES, *numerals_scenes.LETTERS])
def test_every_distractor_is_drawn_in_its_ink(name):
    kind = "shape" if name in numerals_scenes.SHAPES else "letter"
    mark = numerals_scenes.Mark(kind=kind, name=name, ink="red")
    grid = numerals_scenes.Grid(paper="white", rows=((mark,),))
    picture = numerals_pictures.draw_grid(
        grid, random.Random(0), cell_pixels=(64, 64), is_test=False
    )
    red, green, _ = np.moveaxis(np.asarray(picture, np.int32), -1, 0)
    assert (red - green > 100).sum() > 60


def test_a_bar_is_as_high_as_its_value_on_the_axis():
    bars = (
        numerals_scenes.Bar(label="A", value=5, colour="red"),
        numerals_scenes.Bar(label="B", value=20, colour="red"),
    )
    chart = numerals_scenes.Chart(paper="white", bars=bars, top=20, tick=5)
    pixels = np.asarray(numerals_pictures.draw_chart(chart, random.Random(1)), np.int32)
    is_red = pixels[..., 0] - pixels[..., 1] > 60
    heights = [
        is_red[:, columns].any(1).sum()
        for columns in np.array_split(np.arange(32, pixels.shape[1] - 8), 2)
    ]
    assert heights[1] / heights[0] == pytest.approx(4, abs=0.2)


@pytest.mark.parametrize("paper", list(numerals_scenes.INKS_ON_PAPER))
def test_every_ink_stands_out_from_its_paper(paper):
    for ink in numerals_scenes.INKS_ON_PAPER[paper]:
        mark = numerals_scenes.Mark(kind="digit", name="8", ink=ink)
        grid = numerals_scenes.Grid(paper=paper, rows=((mark,),))
        drawn = np.asarray(
            numerals_pictures.draw_grid(
                grid, random.Random(3), cell_pixels=(32, 32), is_test=False
            ),
            np.int32,
        ).reshape(-1, 3)
        distance = np.abs(drawn - np.median(drawn, axis=0)).max(1)
        assert (distance > 90).sum() > 40


def test_charts_of_the_two_splits_are_disjoint():
    seen = {
        is_test: {
            numerals_scenes.random_chart(rng, is_test=is_test).bars
            for rng in [random.Random(0)]
            for _ in range(800)
        }
        for is_test in (False, True)
    }
    assert not seen[False] & seen[True]
