"""Read typed values out of the dictionary of one row; a wrong value raises `RowError`."""

import json
from collections.abc import Mapping
from typing import Any

from prism_jax.data import records


def is_blank(value: Any) -> bool:
    """Tell whether a value counts as not given: None, an empty list or dict, or white space."""
    return (
        value is None
        or (isinstance(value, str | list | dict) and not value)
        or (isinstance(value, str) and not value.strip())
    )


def check_text(value: Any, name: str) -> str:
    """Return a string that can be written as UTF-8."""
    if not isinstance(value, str):
        raise records.RowError("bad_type", f"{name} must be a string, got {_show(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise records.RowError(
            "not_utf8", f"{name} holds half a surrogate pair at character {error.start}"
        ) from error
    return value


def optional_text(row: Mapping[str, Any], name: str) -> str | None:
    """Return a string field; None when it is missing or blank."""
    value = row.get(name)
    return None if is_blank(value) else check_text(value, name)


def row_id(row: Mapping[str, Any], place: records.Place) -> str:
    """Return the row's own `id` (string or integer); its place where it has none."""
    value = row.get("id")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return f"{place.file}:{place.row}" if is_blank(value) else check_text(value, "id")


def images(row: Mapping[str, Any], column: str = "images") -> tuple[records.Image, ...]:
    """Return the references of `column` or `image`: one or a list of them, none when blank.

    A reference is a path, bytes, `{"bytes", "path"}` (bytes win) or `{"image": one of these}`.
    """
    given = [name for name in (column, "image") if not is_blank(row.get(name))]
    if len(set(given)) > 1:
        raise records.RowError("bad_type", f"a row has {column!r} or 'image', not both")
    if not given:
        return ()
    name = given[0]
    values = row[name] if isinstance(row[name], list) else [row[name]]
    return tuple(_image(entry, f"{name}[{i}]") for i, entry in enumerate(values))


def _image(value: Any, name: str) -> records.Image:
    if isinstance(value, bytes):
        return records.Image(path=None, data=value)
    if isinstance(value, str):
        return records.Image(path=check_text(value, name), data=None)
    if isinstance(value, Mapping):
        if value.get("image") is not None:
            return _image(value["image"], f"{name}.image")
        data, path = value.get("bytes"), value.get("path")
        if data is not None and not isinstance(data, bytes):
            raise records.RowError("bad_type", f"{name}.bytes must be bytes, got {_show(data)}")
        if path is not None:
            check_text(path, f"{name}.path")
        if data is not None or path is not None:
            return records.Image(path=path or None, data=data)
    raise records.RowError(
        "bad_type",
        f"{name} must be a path, bytes, {{bytes, path}} or {{image}}, got {_show(value)}",
    )


def no_other_media(row: Mapping[str, Any]) -> None:
    """Refuse the optional columns of the formats that this project does not train on."""
    for name in ("videos", "video", "audios", "audio", "tools"):
        if not is_blank(row.get(name)):
            raise records.RowError("unsupported", f"{name} is not supported, got a value")


def messages(
    value: Any, name: str, *, role_tag: str, content_tag: str, roles: Mapping[str, str]
) -> tuple[records.Message, ...]:
    """Return the turns of a conversation; `roles` maps the file's role names to ours."""
    if not isinstance(value, list):
        raise records.RowError("bad_type", f"{name} must be a list of turns, got {_show(value)}")
    if not value:
        raise records.RowError("missing_field", f"{name} has no turns")
    turns = []
    for i, turn in enumerate(value):
        if not isinstance(turn, Mapping):
            raise records.RowError("bad_type", f"{name}[{i}] must be a dict, got {_show(turn)}")
        for tag in (role_tag, content_tag):
            if turn.get(tag) is None:
                raise records.RowError("missing_field", f"{name}[{i}] has no {tag!r}")
        role = turn[role_tag]
        if not isinstance(role, str) or role not in roles:
            raise records.RowError(
                "bad_role",
                f"{name}[{i}].{role_tag} must be one of {', '.join(roles)}, got {_show(role)}",
            )
        content = _content(turn[content_tag], f"{name}[{i}].{content_tag}")
        turns.append(records.Message(role=roles[role], content=content))
    return tuple(turns)


def _content(value: Any, name: str) -> str:
    """Return a turn's text; a list of `{"type": "image"|"text"}` parts becomes marked text."""
    if not isinstance(value, list):
        return check_text(value, name)
    texts = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            texts.append(records.IMAGE_MARK)
        elif kind == "text":
            texts.append(check_text(part.get("text"), f"{name}[{i}].text"))
        else:
            raise records.RowError(
                "bad_type", f"{name}[{i}] must be an image or text part, got {_show(part)}"
            )
    return "".join(texts)


def mark_images(text: str, num_images: int) -> str:
    """Put the marks in front of a text that has pictures but marks none."""
    if records.IMAGE_MARK in text:
        return text
    return records.IMAGE_MARK * num_images + text


def json_object(value: Any, name: str) -> dict[str, Any]:
    """Return a dict given as such or as JSON text, reduced to JSON values; empty when blank."""
    if is_blank(value):
        return {}
    try:
        found = json.loads(value if isinstance(value, str) else json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise records.RowError("bad_type", f"{name} does not hold JSON values: {error}") from error
    if not isinstance(found, dict):
        raise records.RowError("bad_type", f"{name} must be a dict, got {_show(value)}")
    try:
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise records.RowError("not_utf8", f"{name} holds half a surrogate pair") from error
    return found


def _show(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"
