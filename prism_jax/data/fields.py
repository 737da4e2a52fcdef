"""Read typed values from the dictionary of a row; a wrong value raises `RowError`."""

import base64
import datetime
import decimal
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from prism_jax.data import records

# `problem` is the column of geometry3k and the sets made like it.
PROMPT_COLUMNS = ("prompt", "question", "problem")
_MOST_LEVELS = 50
_OTHER_MEDIA = ("audios", "audio", "tools", "functions")
# The start, without white space, of a text that is a turn or a list of turns, not a question.
_TURNS_AS_TEXT = re.compile(r"""(?:\[\s*)?\{\s*\\?["'](?:role|from|content)\\?["']\s*:""")


def is_blank(value: Any) -> bool:
    """Return whether a value counts as missing: None, NaN, empty, or white space."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, float):
        return math.isnan(value)  # pandas fills gaps with it
    return value is None or (isinstance(value, list | dict | bytes) and not value)


def is_empty(value: Any) -> bool:
    """Return whether the value of a column counts as missing: blank, or empty JSON as text."""
    if isinstance(value, str) and "".join(value.split()) in ("[]", "{}", "null"):
        return True
    return is_blank(value)


def check_text(value: Any, name: str) -> str:
    """Return a string, after checking that UTF-8 can encode it."""
    if not isinstance(value, str):
        raise records.RowError("bad_type", f"{name} must be a string, got {show(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise records.RowError(
            "not_utf8", f"{name} holds half a surrogate pair at character {error.start}"
        ) from error
    return value


def optional_text(row: Mapping[str, Any], name: str) -> str | None:
    """Return a string field, None if it is missing or blank."""
    value = row.get(name)
    return None if is_blank(value) else check_text(value, name)


def row_id(row: Mapping[str, Any], place: records.Place) -> str:
    """Return the row's `id` (string or whole number), or its place if it has none."""
    value = row.get("id")
    if is_blank(value):
        return f"{place.file}:{place.row}"
    if _is_number(value) and value == int(value):
        return str(int(value))
    return check_text(value, "id")


def prompt(row: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the name and the value of the column that holds the prompt."""
    for name in PROMPT_COLUMNS:
        if not is_blank(row.get(name)):
            return name, row[name]
    first, *others = PROMPT_COLUMNS
    raise records.RowError(
        "empty_prompt", f"{first!r} (or {' or '.join(map(repr, others))}) is missing or empty"
    )


def answer_text(value: Any, name: str) -> str:
    """Return an answer as text; 7, 7.0 and "7" are the same."""
    if not isinstance(value, decimal.Decimal) and not _is_number(value):
        return check_text(value, name)
    if isinstance(value, float):
        # A column of 32 bits holds 7.3 as 7.300000190734863.
        with np.errstate(over="ignore"):
            short = np.float32(value)
        value = decimal.Decimal(str(short) if float(short) == value else repr(value))
    text = f"{decimal.Decimal(value):f}"
    return text.rstrip("0").removesuffix(".") if "." in text else text


def _is_number(value: Any) -> bool:
    """Return whether a value is a finite number; true and false are not."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def no_other_media(row: Mapping[str, Any]) -> None:
    """Refuse the optional columns of the formats that this project does not train on."""
    for name in _OTHER_MEDIA:
        if not is_empty(row.get(name)):
            raise records.RowError("unsupported", f"{name} is not supported, got a value")


def only(value: Mapping[str, Any], known: Iterable[str], name: str) -> None:
    """Raise RowError for fields other than the known ones, unless they are blank."""
    extra = [str(key) for key in value.keys() - set(known) if not is_blank(value[key])]
    if extra:
        raise records.RowError("unsupported", f"{name}: not supported: {', '.join(sorted(extra))}")


def turns_in_text(text: str, name: str) -> Any | None:
    """Return the turns in a text of JSON, None for any other text."""
    inner = text.strip()
    if inner[:1] == inner[-1:] == '"':  # JSON inside a JSON string
        inner = inner[1:-1].strip()
    if not _TURNS_AS_TEXT.match(inner):
        return None
    try:
        content = json.loads(text)
        return json.loads(content) if isinstance(content, str) else content
    except (ValueError, RecursionError) as error:
        if not inner.endswith(("]", "}")) and not _is_cut(error):
            return None  # a question that quotes turns and goes on
        raise records.RowError(
            "malformed", f"{name} looks like turns, but is not JSON: {error}"
        ) from error


def _is_cut(error: Exception) -> bool:
    """Return whether JSON is right as far as it goes, but its end is missing."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated") or error.pos >= len(error.doc.rstrip())


def mark_media(text: str, num_images: int, num_videos: int) -> str:
    """Return a text with marks in front: of pictures, of videos, whichever it does not mark."""
    if records.VIDEO_MARK not in text:
        text = records.VIDEO_MARK * num_videos + text
    if records.IMAGE_MARK not in text:
        text = records.IMAGE_MARK * num_images + text
    return text


def json_object(value: Any, name: str) -> dict[str, Any]:
    """Return a dict, given as such or as JSON text, with JSON values only; empty if blank."""
    if is_blank(value):
        return {}
    try:
        content = json.loads(value) if isinstance(value, str) else _json_value(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise records.RowError("bad_type", f"{name} does not hold JSON values: {error}") from error
    if not isinstance(content, dict):
        raise records.RowError("bad_type", f"{name} must be a dict, got {show(value)}")
    return _encodable(content, name)


def extra_info(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's `extra_info`, which is not used in training.

    A value that is not a dict is put under the name `extra_info`; dates, decimals and bytes become
    text.
    """
    value = row.get("extra_info")
    if is_blank(value):
        return {}
    try:
        if isinstance(value, str):
            try:
                content = json.loads(value)
            except ValueError:
                content = value
        else:
            content = _json_value(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise records.RowError(
            "bad_type", f"extra_info does not hold JSON values: {error}"
        ) from error
    return _encodable(
        content if isinstance(content, dict) else {"extra_info": content}, "extra_info"
    )


def _json_value(value: Any) -> Any:
    return json.loads(json.dumps(value, default=_plain))


def _plain(value: Any) -> Any:
    """Return text for values of parquet columns that JSON cannot express."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, decimal.Decimal):
        return answer_text(value, "a number")
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta):
        return str(value)
    raise TypeError(f"a value of type {type(value).__name__}")


def _encodable(content: dict[str, Any], name: str) -> dict[str, Any]:
    if _is_deeper(content, _MOST_LEVELS):
        raise records.RowError("bad_type", f"{name} is nested in more than {_MOST_LEVELS} levels")
    try:
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise records.RowError("not_utf8", f"{name} holds half a surrogate pair") from error
    return content


def _is_deeper(value: Any, num_levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return num_levels == 0 or any(_is_deeper(item, num_levels - 1) for item in inner)


def show(value: Any) -> str:
    """Return the type and the value, for messages."""
    if isinstance(value, str | bytes):
        value = value[:200]
    return f"{type(value).__name__} {records.shorten(repr(value), 80)}"
