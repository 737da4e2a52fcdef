"""Write `numerals` examples as files in the published formats.

Stage 1 uses LLaMA-Factory's sharegpt JSON with PNG files beside it, the later stages use parquet
with the picture's bytes in the row. All functions return counts for the manifest.
"""

import collections
import hashlib
import json
import pathlib
from collections.abc import Iterable

import pyarrow
from pyarrow import parquet

from prism_jax.data.numerals import rows as numerals_rows

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


def write_sharegpt(folder: pathlib.Path, rows: Iterable[numerals_rows.Row], *, stream: str) -> dict:
    """Write `<stream>.json` and `images/<stream>/*.png` to the folder; return the counts."""
    image_folder = folder / "images" / stream
    image_folder.mkdir(parents=True)
    counts, types = collections.Counter(), collections.Counter()
    with (folder / f"{stream}.json").open("w", encoding="utf-8") as file:
        file.write("[\n")
        for row in rows:
            (folder / row.values["images"][0]).write_bytes(row.png)
            file.write(",\n" if counts["rows"] else "")
            file.write(json.dumps(row.values, ensure_ascii=False))
            types[row.question_type] += 1
            counts["rows"] += 1
            counts["rows_misread"] += row.is_misread
            counts["rows_with_arithmetic_slip"] += row.has_arithmetic_slip
            counts["rows_with_wrong_answer"] += row.has_wrong_answer
        file.write("\n]\n")
    return {
        **counts,
        "question_types": dict(sorted(types.items())),
        "images_sha256": images_sha256(image_folder),
    }


def write_parquet(path: pathlib.Path, rows: Iterable[numerals_rows.Row]) -> dict:
    """Write a parquet file, a row group at a time; return the counts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    types = collections.Counter()
    with parquet.ParquetWriter(path, SCHEMA, compression="snappy") as writer:
        group = []
        for row in rows:
            group.append(row.values)
            types[row.question_type] += 1
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
    """Return a SHA-256 over names and contents of all PNG files of a folder, in order of name."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.png")):
        digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()
