"""Our model against Hugging Face's own classes, float32, live; needs torch."""

import functools

import numpy as np
import pytest

from tests.models import cases, ours

pytest.importorskip("torch", reason="live comparison with Hugging Face needs torch")

from tests.models import reference

pytestmark = pytest.mark.torch

# One image, and a video alone, are parts of other rows: decoding reads the latter.
_CASES = [
    ("dense_tied_2_levels_head64", "text_alone"),
    ("dense_tied_2_levels_head64", "two_images_of_different_size"),
    ("dense_tied_2_levels_head64", "rows_of_different_length"),
    ("dense_tied_2_levels_head64", "a_video_and_an_image"),
    ("dense_untied_3_levels_head72", "rows_of_different_length"),
    ("dense_untied_3_levels_head72", "a_video_and_an_image"),
    ("moe_untied", "rows_of_different_length"),
    ("moe_untied", "a_video_and_an_image"),
    ("moe_tied_8_experts", "two_images_of_different_size"),
]


@functools.cache
def _reference(case: str):
    return reference.model(cases.CONFIGS[case])


def _close(ours_, theirs, what: str) -> None:
    scale = np.abs(theirs).max()
    worst = np.abs(ours_ - theirs).max()
    assert worst <= 1e-4 * scale + 1e-7, f"{what}: {worst} of {scale}"


@pytest.mark.parametrize(("case", "rows"), _CASES)
def test_hidden_states_logits_and_every_gradient_equal_hugging_face(case, rows):
    theirs = reference.forward(_reference(case), cases.ROWS[rows], rows)
    found = ours.forward(case, cases.ROWS[rows], rows)
    for number, row in enumerate(cases.ROWS[rows]):
        used = len(row.tokens)
        for what in ("hidden", "logits"):
            _close(found[what][number, :used], theirs[what][number, :used], what)
    assert ("load_balance" in found) == ("load_balance" in theirs) == ("moe" in case)
    if "moe" in case:
        _close(found["load_balance"], theirs["load_balance"], "load_balance")
    assert set(found["gradients"]) == set(theirs["gradients"])
    for name, gradient in theirs["gradients"].items():
        _close(found["gradients"][name], gradient, name)


@pytest.mark.parametrize("case", ["dense_tied_2_levels_head64", "moe_untied"])
def test_greedy_decoding_with_a_cache_equals_generate_token_by_token(case):
    rows = [*cases.ROWS["rows_of_different_length"], *cases.ROWS["a_video"]]
    found = ours.greedy(case, rows, 12)
    for row, tokens in zip(rows, found, strict=True):
        assert tokens.tolist() == reference.greedy(_reference(case), row, 12)
