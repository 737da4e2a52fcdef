"""The benchmark that counts what captions of grids read."""

from benchmarks import captions_read

_TRUE = (
    "<caption>\n- Layout: 2 rows of 2.\n- Row 1: red 9, blue K.\n- Row 2: red 1, red 9.\n</caption>"
)


def test_marks_are_compared_place_by_place():
    told = _TRUE.replace("- Layout: 2 rows of 2.\n", "").replace("red 1, red 9", "red 1, red 4")
    chart = "<caption>\n- Bar A: 4.\n</caption>"
    truths = {"t:1": _TRUE, "t:2": _TRUE, "t:3": _TRUE, "t:4": chart}
    responses = [
        {"id": "t:1", "caption": _TRUE},
        {"id": "t:2", "caption": told},
        {"id": "t:3", "caption": "<caption>\n- Row 1: red 9, blue K.\n</caption>"},
        {"id": "t:4", "caption": chart},
    ]
    assert captions_read.reading(truths, responses) == {
        "num_grids": 3,
        "num_marks": 8,
        "layout_right": 0.6667,
        "caption_right": 0.3333,
        "mark_right": 0.875,
        "digit_right": {"1": 1.0, "9": 0.75},
    }
