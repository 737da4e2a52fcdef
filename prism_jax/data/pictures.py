"""The pictures of a row: in a column, in a turn, or in a part of a turn's content.

  "a.png", bytes, {"path": "a.png"}, {"bytes": …, "path": …}, {"image": any of these}, {"url": …}

A dict may set a size: `min_pixels`, `max_pixels`, or `resized_height` and `resized_width`. If two
places name the pictures of a row, they must name the same pictures.
"""

import dataclasses
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

from prism_jax.data import fields, records

# Default bounds on the area of a picture in pixels: 4 and 16384 tokens.
# Source: qwen-vl-utils vision_process.py IMAGE_MIN_TOKEN_NUM, IMAGE_MAX_TOKEN_NUM.
LEAST_PIXELS = 4 * 32 * 32
MOST_PIXELS = 16384 * 32 * 32

_SCALE = tuple(field.name for field in dataclasses.fields(records.Scale))
_NESTED = ("image", "url", "image_url")
KEYS = ("bytes", "path", *_NESTED, *_SCALE)
# A picture for each mark of the turns; None if the turns do not name it.
Named = Sequence[records.Image | None]


def of_row(
    row: Mapping[str, Any], column: str = "images", *, also: str | None = "image"
) -> tuple[records.Image, ...]:
    """Return the pictures of `column`, or of the column `also`: one, a list, or none if blank."""
    names = dict.fromkeys((column, also) if also else (column,))
    given = [name for name in names if not fields.is_blank(row.get(name))]
    if len(given) > 1:
        raise records.RowError("bad_type", f"a row has {column!r} or {also!r}, not both")
    if not given:
        return ()
    name = given[0]
    values = row[name] if isinstance(row[name], list) else [row[name]]
    return tuple(read(value, f"{name}[{i}]") for i, value in enumerate(values))


def read(value: Any, name: str) -> records.Image:
    """Return the picture that a value refers to, without opening it."""
    if isinstance(value, bytes):
        return records.Image(path=None, data=value)
    if isinstance(value, str):
        return records.Image(path=fields.check_text(value, name), data=None)
    if not isinstance(value, Mapping):
        raise records.RowError(
            "bad_type",
            f"{name} must be a path, bytes, {{bytes, path}} or {{image}}, got {fields.show(value)}",
        )
    fields.only(value, (*KEYS, "type"), name)
    kind = value.get("type")
    if not fields.is_blank(kind) and kind not in ("image", "image_url"):
        raise records.RowError("bad_type", f"{name}.type must be image, got {fields.show(kind)}")
    given = [
        _nested(value[key], f"{name}.{key}")
        for key in _NESTED
        if not fields.is_blank(value.get(key))
    ]
    stored = _bytes_and_path(value, name)
    given += [stored] if stored is not None else []
    if not given:
        raise records.RowError(
            "bad_type",
            f"{name} must have one of bytes, path, image and url, got {fields.show(dict(value))}",
        )
    picture = given[0]
    for other in given[1:]:
        picture = same(picture, other, name)
    scale = _scale(value, name)
    if scale is None:
        return picture
    return same(picture, dataclasses.replace(picture, scale=scale), name)


def _bytes_and_path(value: Mapping[str, Any], name: str) -> records.Image | None:
    """Return the picture of `bytes` and `path`, None without them."""
    data, path = value.get("bytes"), value.get("path")
    data = None if isinstance(data, str) and not data else data  # JSON has no empty bytes
    if data is not None and not isinstance(data, bytes):
        raise records.RowError("bad_type", f"{name}.bytes must be bytes, got {fields.show(data)}")
    path = None if fields.is_blank(path) else fields.check_text(path, f"{name}.path")
    if data is None and path is None:
        return None
    return records.Image(path=path, data=None if path is not None and not data else data)


def _nested(value: Any, name: str) -> records.Image:
    if isinstance(value, Mapping) and "url" in value:
        fields.only(value, ("url",), name)
        value = value["url"]
    return read(value, name)


def _scale(value: Mapping[str, Any], name: str) -> records.Scale | None:
    """Return the size that a dict sets, None if it sets none."""
    given = {}
    for key in _SCALE:
        number = value.get(key)
        if fields.is_blank(number):
            continue
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not 1 <= number < 2**31 or number != int(number):
            raise records.RowError(
                "bad_type", f"{name}.{key} must be a positive whole number, got {number!r}"
            )
        given[key] = int(number)
    if not given:
        return None
    sides = given.keys() & {"resized_height", "resized_width"}
    if sides and (len(sides) == 1 or len(given) > 2):
        raise records.RowError(
            "unsupported",
            f"{name} must have resized_height and resized_width, or bounds on its pixels, "
            f"got {', '.join(given)}",
        )
    if sides:
        area = given["resized_height"] * given["resized_width"]
        if not LEAST_PIXELS <= area <= MOST_PIXELS:
            raise records.RowError(
                "unsupported",
                f"{name}: resized_height x resized_width must be from {LEAST_PIXELS} to "
                f"{MOST_PIXELS} pixels, got {given['resized_height']} x {given['resized_width']}",
            )
    least = given.get("min_pixels", LEAST_PIXELS)
    most = given.get("max_pixels", MOST_PIXELS)
    if not sides and least > most:
        raise records.RowError(
            "unsupported",
            f"{name}: min_pixels must be <= max_pixels, got {least} and {most} "
            f"(without a value: {LEAST_PIXELS} and {MOST_PIXELS})",
        )
    return records.Scale(**given)


def scale_fields(scale: records.Scale) -> dict[str, int]:
    """Return the size of a picture as the fields of its dict."""
    return {name: value for name, value in dataclasses.asdict(scale).items() if value is not None}


def same(first: records.Image, second: records.Image, name: str) -> records.Image:
    """Return the picture that two places name.

    Raises:
      RowError: they name different pictures or sizes, or cannot be compared.
    """
    if first.data is not None and second.data is not None:
        is_same = first.data == second.data
    elif first.path is not None and second.path is not None:
        is_same = posixpath.normpath(first.path) == posixpath.normpath(second.path)
    else:
        is_same = False
    scales = {image.scale for image in (first, second) if image.scale is not None}
    if not is_same or len(scales) > 1:
        difference = "two pictures" if not is_same else "two sizes"
        raise records.RowError(
            "image_mismatch",
            f"{name}: {difference} are named, {_called(first)} and {_called(second)}",
        )
    return records.Image(
        path=first.path if first.path is not None else second.path,
        data=first.data if first.data is not None else second.data,
        scale=next(iter(scales), None),
    )


def _called(image: records.Image) -> str:
    path = "bytes of the row" if image.path is None else records.shorten(repr(image.path), 80)
    if image.scale is None:
        return path
    sizes = scale_fields(image.scale).items()
    return f"{path} with " + ", ".join(f"{name} {value}" for name, value in sizes)


def of_marks(named: Named, column: tuple[records.Image, ...]) -> tuple[records.Image, ...]:
    """Return the pictures of a row's marks, from the turns that name them and from its column.

    Raises:
      RowError: turns and column name different pictures, or a mark has none. If the turns name no
        pictures, `validate.check_row` checks the number of the column's.
    """
    if all(image is None for image in named):
        return column
    if not column:
        if None in named:
            raise records.RowError(
                "placeholders", f"picture {list(named).index(None) + 1} of the turns has no name"
            )
        return tuple(image for image in named if image is not None)
    if len(named) != len(column):
        raise records.RowError(
            "placeholders", f"the turns show {len(named)} pictures, the row has {len(column)}"
        )
    return tuple(
        stored if image is None else same(image, stored, f"picture {number}")
        for number, (image, stored) in enumerate(zip(named, column, strict=True), start=1)
    )
