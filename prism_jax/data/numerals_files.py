"""Write `numerals` examples as files in the published formats.

Stage 1 gets LLaMA-Factory sharegpt JSON with PNG files beside it, the later stages get parquet with
the picture's bytes in the row. All functions return what they wrote, for the manifest.
"""

import collections
import hashlib
import json
import pathlib
from collections.abc import Iterator

import pyarrow
from pyarrow import parquet

from prism_jax.data import numerals_demonstrations as demonstrations
from prism_jax.data import numerals_examples as examples
from prism_jax.data import numerals_pictures as pictures
from prism_jax.data import prompts

DATA_SOURCE = "numerals"
# What the released files hold where a list of equivalent answers is empty.
# Source: PRISM verl/verl/utils/reward_score/math_verify_with_format.py:81.
_NO_EQUIVALENT = "__EMPTY__"
_ROWS_PER_GROUP = 256

_TEXT = pyarrow.string()
SCHEMA = pyarrow.schema(
    [
        ("data_source", _TEXT),
        ("prompt", pyarrow.list_(pyarrow.struct([("role", _TEXT), ("content", _TEXT)]))),
        ("images", pyarrow.list_(pyarrow.struct([("bytes", pyarrow.binary())]))),
        ("ability", _TEXT),
        (
            "reward_model",
            pyarrow.struct(
                [
                    ("style", _TEXT),
                    ("ground_truth", _TEXT),
                    ("equivalent_answers", pyarrow.list_(_TEXT)),
                ]
            ),
        ),
        (
            "extra_info",
            pyarrow.struct(
                [
                    ("index", pyarrow.int64()),
                    ("split", _TEXT),
                    ("question", _TEXT),
                    ("answer", _TEXT),
                    ("question_type", _TEXT),
                ]
            ),
        ),
        ("teacher_response", _TEXT),
        ("teacher_caption", _TEXT),
        ("teacher_cot", _TEXT),
    ]
)

# LLaMA-Factory's entry of dataset_info.json for each file of stage 1.
_MESSAGES_ENTRY = {
    "formatting": "sharegpt",
    "columns": {"messages": "messages", "images": "images"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    },
}
_CONVERSATIONS_WITH_SYSTEM_ENTRY = {
    "formatting": "sharegpt",
    "columns": {"messages": "conversations", "images": "images", "system": "system"},
}
DATASET_ENTRIES = {
    "base": _CONVERSATIONS_WITH_SYSTEM_ENTRY,
    "public": _MESSAGES_ENTRY,
    "teacher": _CONVERSATIONS_WITH_SYSTEM_ENTRY,
}


def sharegpt_row(example: examples.Example, response: str, image: str) -> dict:
    """Return one row of stage 1: `messages` for public, `conversations` for teacher and base."""
    user = prompts.user_turn(example.question.text)
    if example.stream == "public":
        messages = [
            {"role": "system", "content": prompts.SYSTEM_PROMPT},
            {"role": "user", "content": user},
            {"role": "assistant", "content": response},
        ]
        return {"messages": messages, "images": [image]}
    turns = [{"from": "human", "value": user}, {"from": "gpt", "value": response}]
    row = {"conversations": turns, "images": [image]}
    # Two of four base rows, a terse and a detailed one, have a system prompt to look past.
    has_system_prompt = example.stream == "teacher" or example.index % 4 >= 2
    row["system"] = prompts.SYSTEM_PROMPT if has_system_prompt else ""
    return row


def _demonstrate(example: examples.Example, slips: examples.Slips) -> demonstrations.Demonstration:
    if example.stream == "public":
        return example.public(slips)
    if example.stream == "base":
        return example.untagged(is_detailed=example.index % 2 == 1)
    return example.teacher


def write_sharegpt(
    folder: pathlib.Path,
    rows: Iterator[examples.Example],
    *,
    stream: str,
    slips: examples.Slips,
) -> dict:
    """Write `<stream>.json` and `images/<stream>/*.png` into the folder; return the counts."""
    image_folder = folder / "images" / stream
    image_folder.mkdir(parents=True)
    counts, types = collections.Counter(), collections.Counter()
    with (folder / f"{stream}.json").open("w", encoding="utf-8") as file:
        file.write("[\n")
        for example in rows:
            png = pictures.png_bytes(example.picture())
            path = image_folder / f"{example.index:06d}.png"
            path.write_bytes(png)
            told = _demonstrate(example, slips)
            image = path.relative_to(folder).as_posix()
            row = sharegpt_row(example, told.response, image)
            file.write(",\n" if counts["rows"] else "")
            file.write(json.dumps(row, ensure_ascii=False))
            types[example.question.type] += 1
            counts["rows"] += 1
            counts["rows_misread"] += told.is_misread
            counts["rows_with_arithmetic_slip"] += told.num_arithmetic_slips > 0
            counts["rows_with_wrong_answer"] += told.answer != example.teacher.answer
        file.write("\n]\n")
    return {
        **counts,
        "question_types": dict(sorted(types.items())),
        "images_sha256": images_sha256(image_folder),
    }


def parquet_row(example: examples.Example) -> dict:
    """Return one row of alignment and RLVR.

    An option's text is as good an answer as its letter; other questions have one answer.
    """
    teacher = example.teacher
    caption, cot = demonstrations.split_segments(teacher.response)
    equivalent = [_NO_EQUIVALENT]
    if example.question.options:
        option = example.question.options["ABCD".index(teacher.answer)]
        equivalent = [f"{teacher.answer}. {option}", option]
    question = example.question.text
    return {
        "data_source": DATA_SOURCE,
        "prompt": [
            {"role": "system", "content": prompts.SYSTEM_PROMPT},
            {"role": "user", "content": prompts.user_turn(question)},
        ],
        "images": [{"bytes": pictures.png_bytes(example.picture())}],
        "ability": "math",
        "reward_model": {
            "style": "rule",
            "ground_truth": teacher.answer,
            "equivalent_answers": equivalent,
        },
        "extra_info": {
            "index": example.index,
            "split": "test" if example.is_test else "train",
            "question": question,
            "answer": teacher.answer,
            "question_type": example.question.type,
        },
        "teacher_response": teacher.response,
        "teacher_caption": caption,
        "teacher_cot": cot,
    }


def write_parquet(path: pathlib.Path, rows: Iterator[examples.Example]) -> dict:
    """Write the examples as one parquet file, a row group at a time; return the counts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    types = collections.Counter()
    with parquet.ParquetWriter(path, SCHEMA, compression="snappy") as writer:
        group = []
        for example in rows:
            group.append(parquet_row(example))
            types[example.question.type] += 1
            if len(group) == _ROWS_PER_GROUP:
                writer.write_table(pyarrow.Table.from_pylist(group, schema=SCHEMA))
                group = []
        if group:
            writer.write_table(pyarrow.Table.from_pylist(group, schema=SCHEMA))
    return {"rows": types.total(), "question_types": dict(sorted(types.items()))}


def file_sha256(path: pathlib.Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def images_sha256(folder: pathlib.Path) -> str:
    """Return one SHA-256 over names and contents of all PNG files of a folder, in order of name."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.png")):
        digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()
