"""Read typed values out of the dictionary of one row; a wrong value raises `RowError`."""

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

_MOST_LEVELS = 50
_OTHER_MEDIA = ("videos", "video", "audios", "audio", "tools", "functions")
# How a text begins, without white space, that is a list of turns or one turn and not a question.
_TURNS_AS_TEXT = re.compile(r"""(?:\[\s*)?\{\s*\\?["'](?:role|from|content)\\?["']\s*:""")


def is_blank(value: Any) -> bool:
    """Return whether a value counts as not given: None, NaN, nothing in it, or white space."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, float):
        return math.isnan(value)  # pandas fills gaps with it
    return value is None or (isinstance(value, list | dict | bytes) and not value)


def check_text(value: Any, name: str) -> str:
    """Return a string that can be written as UTF-8."""
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
    """Return a string field; None when it is missing or blank."""
    value = row.get(name)
    return None if is_blank(value) else check_text(value, name)


def row_id(row: Mapping[str, Any], place: records.Place) -> str:
    """Return the row's own `id` (string or whole number); its place where it has none."""
    value = row.get("id")
    if is_blank(value):
        return f"{place.file}:{place.row}"
    if _is_number(value) and value == int(value):
        return str(int(value))
    return check_text(value, "id")


def answer_text(value: Any, name: str) -> str:
    """Return an answer, given as text or as a number: 7, 7.0 and "7" are the same."""
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
    """Return whether a value is a finite number; true and false are none."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def no_other_media(row: Mapping[str, Any]) -> None:
    """Refuse the optional columns of the formats that this project does not train on."""
    for name in _OTHER_MEDIA:
        value = row.get(name)
        if isinstance(value, str) and "".join(value.split()) in ("[]", "{}", "null"):
            continue
        if not is_blank(value):
            raise records.RowError("unsupported", f"{name} is not supported, got a value")


def only(value: Mapping[str, Any], known: Iterable[str], name: str) -> None:
    """Refuse by name whatever else a turn, a part or a picture holds, unless it is blank."""
    extra = [str(key) for key in value.keys() - set(known) if not is_blank(value[key])]
    if extra:
        raise records.RowError("unsupported", f"{name}: not supported: {', '.join(sorted(extra))}")


def turns_in_text(text: str, name: str) -> Any | None:
    """Return the turns that a text holds as JSON; None for any other text."""
    inner = text.strip()
    if inner[:1] == inner[-1:] == '"':  # the JSON text of a JSON text
        inner = inner[1:-1].strip()
    if not _TURNS_AS_TEXT.match(inner):
        return None
    try:
        found = json.loads(text)
        return json.loads(found) if isinstance(found, str) else found
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
        found = json.loads(value) if isinstance(value, str) else _json_value(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise records.RowError("bad_type", f"{name} does not hold JSON values: {error}") from error
    if not isinstance(found, dict):
        raise records.RowError("bad_type", f"{name} must be a dict, got {show(value)}")
    return _encodable(found, name)


def extra_info(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a row tells about itself, which nothing learns from.

    What is no dict is kept under the name `extra_info`; dates, decimals and bytes become text.
    """
    value = row.get("extra_info")
    if is_blank(value):
        return {}
    try:
        if isinstance(value, str):
            try:
                found = json.loads(value)
            except ValueError:
                found = value
        else:
            found = _json_value(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise records.RowError(
            "bad_type", f"extra_info does not hold JSON values: {error}"
        ) from error
    return _encodable(found if isinstance(found, dict) else {"extra_info": found}, "extra_info")


def _json_value(value: Any) -> Any:
    return json.loads(json.dumps(value, default=_plain))


def _plain(value: Any) -> Any:
    """Return text for the values of parquet columns that JSON has none for."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, decimal.Decimal):
        return answer_text(value, "a number")
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta):
        return str(value)
    raise TypeError(f"a value of type {type(value).__name__}")


def _encodable(found: dict[str, Any], name: str) -> dict[str, Any]:
    if _is_deeper(found, _MOST_LEVELS):
        raise records.RowError("bad_type", f"{name} is nested in more than {_MOST_LEVELS} levels")
    try:
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise records.RowError("not_utf8", f"{name} holds half a surrogate pair") from error
    return found


def _is_deeper(value: Any, num_levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return num_levels == 0 or any(_is_deeper(one, num_levels - 1) for one in inner)


def show(value: Any) -> str:
    """Return the type and the value, for messages."""
    if isinstance(value, str | bytes):
        value = value[:200]
    return f"{type(value).__name__} {records.shorten(repr(value), 80)}"
