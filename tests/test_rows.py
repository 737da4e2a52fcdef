"""Prompts and continuations in rows: what stands where, and what is refused."""

import dataclasses

import numpy as np
import pytest

from models import config as config_lib
from prism_jax import errors
from prism_jax import rows as packed_rows
from prism_jax.rows import Continuation
from tests.models import cases

_CONFIG = config_lib.from_hf(cases.CONFIGS["dense_tied_2_levels_head64"])
_IMAGE = cases.ROWS["one_image"][0]  # 4 words, 6 image tokens between two marks, 5 words
_TEXT = cases.ROWS["text_alone"][1]  # 9 words
_LARGEST = packed_rows.Largest(
    num_units=5,
    unit_sequences=1,
    unit_tokens=22,
    continued_tokens=5,
    prompt_patches=24,
    prompt_frames=1,
)


def _shape(**changes):
    arguments = {"row_tokens": 46, "row_sequences": 3, "microbatch_rows": 2}
    arguments |= {"patch_multiple": 1, "shared_units": None, "place": "rows"}
    largest = {k: changes.pop(k) for k in list(changes) if k not in arguments}
    return packed_rows.row_shape(dataclasses.replace(_LARGEST, **largest), **(arguments | changes))


def _after(prompt, *tokens):
    return Continuation(prompt=prompt, tokens=np.array(tokens, np.int32))


def test_a_row_holds_each_prompt_with_its_continuation_and_its_images_once():
    units = [[_after(0, 1, 2)], [_after(1, 3)], [_after(0, 4, 5, 6)]]
    packed = packed_rows.pack([_IMAGE, _TEXT], units, _shape(row_tokens=48), _CONFIG)
    text = packed.text
    row = [*_IMAGE.tokens, 1, 2, *_TEXT.tokens, 3]
    np.testing.assert_array_equal(text.tokens[0, 0, : len(row)], row)
    np.testing.assert_array_equal(text.tokens[0, 1, :20], [*_IMAGE.tokens, 4, 5, 6])
    np.testing.assert_array_equal(text.image_slots[0, 0, 5:11], np.arange(6))
    np.testing.assert_array_equal(text.image_slots[0, 1, 5:11], np.arange(6))
    assert (text.image_slots >= 0).sum() == 12
    starts = [(p.row, p.slot, p.start, p.offset, p.num_tokens) for p in packed.places]
    assert starts == [(0, 0, 17, 0, 2), (0, 1, 28, 2, 1), (1, 0, 17, 0, 3)]
    np.testing.assert_array_equal(packed.vision.pixels[0, 0, :24], _IMAGE.pixels[0])


def test_continuations_of_one_prompt_in_one_row_share_its_images():
    units = [[_after(0, 1, 2)], [_after(0, 3)]]
    packed = packed_rows.pack([_IMAGE], units, _shape(), _CONFIG)
    assert [place.row for place in packed.places] == [0, 0]
    slots = packed.text.image_slots[0, 0]
    np.testing.assert_array_equal(slots[5:11], slots[24:30])
    assert packed.vision.segments.ids[0, 0].max() == 1


def test_every_batch_within_the_bounds_fits():
    rng = np.random.default_rng(0)
    shape = _shape(num_units=23)
    assert (shape.num_microbatches, shape.row_patches) == (6, 48)
    assert _shape(num_units=23, patch_multiple=32).row_patches == 64
    prompts = [_IMAGE, _TEXT, cases.ROWS["text_alone"][0]]
    for _ in range(50):
        units = [
            [_after(rng.integers(3), *rng.integers(1, 99, rng.integers(1, 6)))] for _ in range(23)
        ]
        packed_rows.pack(prompts, units, shape, _CONFIG)
    longest = [[_after(0, 1, 2, 3, 4, 5)] for _ in range(23)]
    places = packed_rows.pack(prompts, longest, shape, _CONFIG).places
    assert max(place.row for place in places) == 11


def _shared(**changes):
    return _shape(**({"row_tokens": 60, "row_sequences": 4, "shared_units": 4} | changes))


def test_there_is_no_room_for_more_prompts_than_a_batch_has():
    shape = _shared(num_units=4)
    assert (shape.row_prompts, shape.row_prompt_tokens, shape.row_continued_tokens) == (1, 17, 43)
    assert (_shared(num_units=5).row_prompts, _shared(num_units=5).row_prompt_tokens) == (2, 34)


def test_a_prompt_stands_once_in_a_row_and_is_expanded_for_attention():
    units = [[_after(0, 1, 2)], [_after(0, 3)], [_after(1, 4, 5)], [_after(0, 6)]]
    shape = _shared()
    packed = packed_rows.pack([_IMAGE, _TEXT], units, shape, _CONFIG)
    text = packed.text
    room = shape.row_prompt_tokens
    row = text.tokens[0, 0]
    once = [*_IMAGE.tokens, *_TEXT.tokens]
    np.testing.assert_array_equal(row[: len(once)], once)
    np.testing.assert_array_equal(row[room : room + 6], [1, 2, 3, 4, 5, 6])
    assert (text.segments.ids[0, 0] > 0).sum() == len(once) + 6
    np.testing.assert_array_equal(text.image_slots[0, 0, 5:11], np.arange(6))
    # The same sequences as in rows that repeat prompts, with the same positions.
    whole = packed_rows.pack(
        [_IMAGE, _TEXT], units, _shape(row_tokens=92, row_sequences=4), _CONFIG
    )
    expanded = np.append(row, 0)[text.shared.source[0, 0]]
    np.testing.assert_array_equal(expanded[:92], whole.text.tokens[0, 0])
    for axis in range(3):
        laid = np.append(text.positions[0, axis, 0], 0)[text.shared.source[0, 0]]
        np.testing.assert_array_equal(laid[:92], whole.text.positions[0, axis, 0])
    np.testing.assert_array_equal(
        text.shared.segments.ids[0, 0, :92], whole.text.segments.ids[0, 0]
    )
    spots = [(p.before, p.start, p.offset) for p in packed.places]
    last, behind = len(_IMAGE.tokens) - 1, len(once) - 1
    assert spots == [
        (last, room, 0), (last, room + 2, 2), (behind, room + 3, 3), (last, room + 5, 5),
    ]  # fmt: skip


def test_every_batch_within_the_bounds_fits_rows_that_share_prompts():
    rng = np.random.default_rng(0)
    prompts = [_IMAGE, _TEXT, cases.ROWS["text_alone"][0], _IMAGE, _TEXT]
    shape = _shared(num_units=20)
    for _ in range(50):
        units = [
            [_after(prompt, *rng.integers(1, 99, rng.integers(1, 6)))]
            for prompt in range(5)
            for _ in range(4)
        ]
        packed = packed_rows.pack(prompts, units, shape, _CONFIG)
        owners = packed.text.shared.owner.reshape(shape.num_rows, -1)
        width = packed.text.tokens.shape[-1]
        for row, ids in zip(
            owners, packed.text.segments.ids.reshape(shape.num_rows, -1), strict=True
        ):
            np.testing.assert_array_equal(np.sort(row[row < width]), np.flatnonzero(ids))


def test_pairs_of_other_prompts_fit_as_many_as_are_promised():
    rng = np.random.default_rng(0)
    prompts = [_IMAGE, _TEXT] * 10
    for row_tokens in (22, 60, 90):
        shape = _shared(num_units=20, row_tokens=row_tokens)
        num_pairs = shape.any_pairs(20)
        assert 1 <= num_pairs <= 10
        for _ in range(20):
            units = [
                [_after(prompt, *rng.integers(1, 99, rng.integers(1, 6)))]
                for prompt in range(num_pairs)
                for _ in range(2)
            ]
            packed_rows.pack(prompts, units, shape, _CONFIG)


def test_pairs_stand_side_by_side_in_one_row():
    units = [[_after(0, 1, 2), _after(0, 3)], [_after(1, 4), _after(1, 5)]]
    shape = _shape(num_units=2, unit_sequences=2, unit_tokens=44, row_sequences=2)
    packed = packed_rows.pack([_IMAGE, _TEXT], units, shape, _CONFIG)
    assert [(p.row, p.slot) for p in packed.places] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_batch_without_images_has_the_shapes_of_one_with_images():
    with_images = packed_rows.pack([_IMAGE], [[_after(0, 1)]], _shape(), _CONFIG)
    without = packed_rows.pack([_TEXT], [[_after(0, 1)]], _shape(), _CONFIG)
    assert without.vision.pixels.shape == with_images.vision.pixels.shape
    assert not without.vision.segments.ids.any()
    none = packed_rows.pack([_TEXT], [[_after(0, 1)]], _shape(prompt_patches=0), _CONFIG)
    assert none.vision is None


def test_rows_that_are_too_short_are_refused_with_the_length_they_need():
    with pytest.raises(errors.InputError, match=r"rows.row_tokens must be >= 22, .*got 21 and 3"):
        _shape(row_tokens=21)
    with pytest.raises(errors.InputError, match=r"rows.row_sequences >= 2, got 99 and 1"):
        _shape(row_tokens=99, unit_sequences=2, row_sequences=1)


def test_a_batch_beyond_the_bounds_is_refused():
    with pytest.raises(ValueError, match=r"unit 0 .* fits none of 4 rows"):
        packed_rows.pack([_IMAGE], [[_after(0, *range(1, 40))]], _shape(), _CONFIG)
