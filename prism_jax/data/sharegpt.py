"""Demonstrations in LLaMA-Factory's sharegpt form, both variants, and its `dataset_info.json`.

  {"conversations": [{"from": "human", "value": "<image>…"}, {"from": "gpt", "value": "…"}], …}
  {"messages": [{"role": "user", "content": "<image>…"}, {"role": "assistant", "content": "…"}], …}

with optional `images` (or `image`), `videos` (or `video`), `system`, `id` and `loss_mask`. For the
fields of a turn, a picture and a video see `turns`, `pictures` and `clips`.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from prism_jax import errors
from prism_jax.data import clips, fields, paths, pictures, records
from prism_jax.data import turns as turns_lib

DATASET_INFO = "dataset_info.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """The names in a file: its columns, the keys of a turn, and the roles."""

    messages: str
    images: str
    system: str
    role_tag: str
    content_tag: str
    user_tag: str
    assistant_tag: str
    system_tag: str
    # A column that may hold the pictures instead; None: only `images` is read.
    also_images: str | None = "image"
    videos: str = "videos"
    also_videos: str | None = "video"


CONVERSATIONS = Columns(
    messages="conversations",
    images="images",
    system="system",
    role_tag="from",
    content_tag="value",
    user_tag="human",
    assistant_tag="gpt",
    system_tag="system",
)
MESSAGES = Columns(
    messages="messages",
    images="images",
    system="system",
    role_tag="role",
    content_tag="content",
    user_tag="user",
    assistant_tag="assistant",
    system_tag="system",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """The entry of a data set in `dataset_info.json`: the file's full path and its names."""

    path: str
    columns: Columns


def parse(
    row: Mapping[str, Any], *, place: records.Place, source: str, columns: Columns | None
) -> records.SFTRow:
    """Read a row; without `columns`, the row's keys determine the variant."""
    fields.no_other_media(row)
    names = _variant(row) if columns is None else columns
    if fields.is_blank(row.get(names.messages)):
        raise records.RowError("missing_field", f"{names.messages!r} is missing or empty")
    conversation = turns_lib.read(
        row[names.messages],
        names.messages,
        role_tag=names.role_tag,
        content_tag=names.content_tag,
        roles={
            names.user_tag: "user",
            names.assistant_tag: "assistant",
            names.system_tag: "system",
        },
    )
    turns = turns_lib.with_row_flags(conversation.messages, row)
    system = fields.optional_text(row, names.system)
    if system is not None:
        if turns[0].role == "system":
            raise records.RowError(
                "bad_role", f"a system turn and the column {names.system!r} are both given"
            )
        turns = (records.Message(role="system", content=system), *turns)
    return records.SFTRow(
        id=fields.row_id(row, place),
        source=source,
        messages=turns,
        images=pictures.of_marks(
            conversation.pictures, pictures.of_row(row, names.images, also=names.also_images)
        ),
        videos=clips.of_marks(
            conversation.videos, clips.of_row(row, names.videos, also=names.also_videos)
        ),
    )


def _variant(row: Mapping[str, Any]) -> Columns:
    variants = [names for names in (CONVERSATIONS, MESSAGES) if row.get(names.messages) is not None]
    if len(variants) != 1:
        rule = "a row must have exactly one of 'conversations' and 'messages'"
        raise records.RowError(
            "missing_field", f"{rule}, got {', '.join(sorted(map(str, row))) or 'nothing'}"
        )
    return variants[0]


def find_entry(path: str, name: str) -> Entry:
    """Return the entry of the data set `name` in a `dataset_info.json`.

    Raises:
      InputError: there is no such entry, or it is not for a local sharegpt file.

    Source: LLaMA-Factory src/llamafactory/data/parser.py get_dataset_list, data/README.md.
    """
    with paths.open_binary(path) as stream:
        try:
            listed = json.loads(stream.read().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise errors.InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(listed, dict) or not isinstance(listed.get(name), dict):
        known = ", ".join(sorted(listed)[:10]) if isinstance(listed, dict) else "no object"
        raise errors.InputError(
            f"{path}: no data set {name!r}; it has: {records.shorten(known, 200)}"
        )
    entry = {key: value for key, value in listed[name].items() if not fields.is_blank(value)}
    if entry.get("ranking") is False:
        del entry["ranking"]
    where = f"{path}: {name}"
    _check_keys(entry, {"file_name", "formatting", "columns", "tags"}, where)
    presets = {"sharegpt": CONVERSATIONS, "openai": MESSAGES}
    formatting = entry.get("formatting", "alpaca")
    if not isinstance(formatting, str) or formatting not in presets:
        raise errors.InputError(
            f"{where}: formatting must be sharegpt or openai, got {_shown(formatting)}"
        )
    columns, tags = entry.get("columns", {}), entry.get("tags", {})
    for value, part in ((columns, "columns"), (tags, "tags")):
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise errors.InputError(f"{where}: {part} must map names to names, got {_shown(value)}")
    _check_keys(columns, {"messages", "images", "videos", "system"}, f"{where}: columns")
    known_tags = {"role_tag", "content_tag", "user_tag", "assistant_tag", "system_tag"}
    # The other two tags name roles of tool calls, which no row may have.
    _check_keys(tags, known_tags | {"observation_tag", "function_tag"}, f"{where}: tags")
    names = columns | {tag: value for tag, value in tags.items() if tag in known_tags}
    names |= {f"also_{name}": None for name in ("images", "videos") if name in columns}
    return Entry(
        path=_file_of(path, entry.get("file_name"), where),
        columns=dataclasses.replace(presets[formatting], **names),
    )


def _file_of(path: str, file_name: Any, where: str) -> str:
    """Return the full path of an entry's file in the folder of `dataset_info.json`."""
    if not isinstance(file_name, str):
        raise errors.InputError(f"{where}: file_name must name a file, got {_shown(file_name)}")
    folder = paths.parent(path)
    try:
        paths.inside(folder, fields.check_text(file_name, "file_name"))
    except records.RowError as error:
        raise errors.InputError(
            f"{where}: file_name must name a file in the folder of {DATASET_INFO}, got "
            f"{_shown(file_name)}"
        ) from error
    return paths.join(folder, file_name)


def _shown(value: Any) -> str:
    return records.shorten(repr(value), 100)


def _check_keys(entries: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(entries) - known)
    if unknown:
        names = records.shorten(", ".join(unknown), 200)
        raise errors.InputError(f"{where}: not supported: {names}")
