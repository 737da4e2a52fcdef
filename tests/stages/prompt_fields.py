"""Prompts for the tests of the fields of stages that ask them, and what `prompts.…` changes.

Every row asks about a picture of its own and has the same ground truth, so that a script of texts
is right and wrong on any of them.
"""

import pathlib

from prism_jax.data import build, prompts, sources, validate
from prism_jax.rewards import score
from tests import data_files
from tests.stages import field_tables

NUM_ROWS = 6
TRUTH = "5 lb"


def response(answer: str, *, caption: str = "A grey field.") -> str:
    """Return a well-formed response."""
    told = f"<caption>\n{caption}\n</caption>\n<think>\nSo it is.\n</think>\n"
    return f"{told}<answer>\n{answer}\n</answer>"


# Right; right by the released rules alone; wrong, and beginning as every teacher; malformed.
TEXTS = (response(TRUTH), response("5 kg"), response("8", caption="A field."), "no tags")
TASKS = [
    score.Task(
        response=text,
        ended=True,
        ground_truth=TRUTH,
        equivalent_answers=(),
        data_source="",
    )
    for text in TEXTS
]


def write(folder: pathlib.Path) -> None:
    """Write rows and others to be compared with them, pictures twice, and a built folder."""
    rows = [_row(number) for number in range(NUM_ROWS)]
    for place, first in ((folder, 0), (folder / "elsewhere", 100)):
        place.mkdir(exist_ok=True)
        for number in range(NUM_ROWS):
            picture = data_files.png(first + number, size=(64, 64))
            (place / f"{number}.png").write_bytes(picture)
    files = {
        "rows": rows,
        "few": rows[3:],
        "broken": [*rows, _row(0, images=["none.png"])],
        "long": [*rows, _row(0, id="long", prompt=_turns("more " * 600))],
    }
    for name, found in files.items():
        data_files.write_lines(folder / f"{name}.jsonl", found)
    (folder / "reward.py").write_text("def score(sample):\n    return 0.5\n")
    source = sources.Source(kind="prompts", path=str(folder / "rows.jsonl"))
    build.build(source, str(folder / "store"), validate.Rules())


def _row(number: int, **changes) -> dict:
    row = {
        "id": f"row-{number}",
        "prompt": _turns(f"What number {number}? " + "Look. " * number),
        "images": [f"{number}.png"],
        "ground_truth": TRUTH,
        "teacher_caption": "<caption>\nA field.\n</caption>\n",
        "teacher_cot": f"<think>\nIt is.\n</think>\n<answer>\n{TRUTH}\n</answer>",
        "extra_info": {"question_type": ("a", "b")[number % 2]},
    }
    return row | changes


def _turns(text: str) -> list[dict]:
    return [
        {"role": "system", "content": prompts.SYSTEM_PROMPT},
        {"role": "user", "content": f"<image>\n{text}"},
    ]


def read(*, prefix: str = "", is_mixture: bool = False) -> field_tables.Fields:
    """Return the fields of the prompts, for a probe that reads them.

    Args:
      is_mixture: `path` names several data sets.
    """

    def at(name):
        return {f"{prefix}prompts.path": (name,) if is_mixture else name}

    own = prefix + "prompts."
    found = field_tables.each(
        at("@few.jsonl")
        | {
            own + "image_root": "@elsewhere",
            own + "max_rows": 2,
            own + "max_prompt_tokens": 20,
            own + "min_pixels": 96 * 96,
            own + "max_pixels": 32 * 32,
            own + "limit_image_pixels": 1,
        }
    )
    found |= field_tables.each({own + "overlong": "filter"}, before=at("@long.jsonl"))
    found |= field_tables.each({own + "max_bad_rows": 1}, before=at("@broken.jsonl"))
    if is_mixture:
        both = {own + "path": ("@rows.jsonl", "@few.jsonl")}
        found |= field_tables.each({own + "weights": (1.0, 9.0)}, before=both)
    return found


def judge(section: str) -> field_tables.Fields:
    """Return the fields of what judging may take, for `field_tables.judged`."""
    numbers = {"num_workers": 3, "deadline_seconds": 3.0, "memory_bytes": 1 << 30}
    return field_tables.each(field_tables.at(section, numbers))


def stored(*, prefix: str = "", is_mixture: bool = False) -> field_tables.Fields:
    """Return the field for a probe under which `field_tables.a_store` is an object store."""
    path = ("@store",) if is_mixture else "@store"
    before = {f"{prefix}prompts.path": path}
    return field_tables.each({f"{prefix}prompts.cache_dir": "@cache"}, before=before)


# Fields that may show by what is refused.
REFUSING = ("prompts.max_prompt_tokens", "prompts.overlong", "prompts.max_bad_rows")
REFUSING += ("prompts.cache_dir", "prompts.limit_image_pixels")
