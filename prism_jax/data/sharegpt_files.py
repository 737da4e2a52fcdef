"""Write demonstrations in LLaMA-Factory's sharegpt form, with pictures as files beside them."""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

from prism_jax.data import image_files, records, sharegpt

Json = Any
_SPEAKERS = {"user": "human", "assistant": "gpt"}


def write(path: pathlib.Path, rows: Iterable[records.SFTRow]) -> int:
    """Write `path` atomically, with the pictures below its folder; return the row count.

    `dataset_info.json` beside it gets an entry with the file's name for LLaMA-Factory.
    """
    partial = path.with_name(path.name + ".partial")
    count, has_videos = 0, False
    with partial.open("w", encoding="utf-8") as file:
        file.write("[")
        for row in rows:
            file.write(",\n" if count else "\n")
            file.write(json.dumps(_row(row, path.parent), ensure_ascii=False))
            count += 1
            has_videos |= bool(row.videos)
        file.write("\n]\n")
    partial.replace(path)
    names = {"messages": "conversations", "images": "images", "system": "system"}
    names |= {"videos": "videos"} if has_videos else {}
    entry = {"file_name": path.name, "formatting": "sharegpt", "columns": names}
    info = path.with_name(sharegpt.DATASET_INFO)
    info.write_text(json.dumps({path.stem: entry}, indent=1) + "\n", encoding="utf-8")
    return count


def _row(row: records.SFTRow, folder: pathlib.Path) -> dict[str, Json]:
    turns = [turn for turn in row.messages if turn.role != "system"]
    entry: dict[str, Json] = {
        "id": row.id,
        "conversations": [
            {"from": _SPEAKERS[turn.role], "value": turn.content}
            | ({} if turn.is_learned else {"loss": False})
            for turn in turns
        ],
        "images": [image_files.reference(image, folder) for image in row.images],
    }
    if row.videos:
        entry["videos"] = [image_files.video_reference(video, folder) for video in row.videos]
    if row.messages[0].role == "system":
        entry["system"] = row.messages[0].content
    return entry
