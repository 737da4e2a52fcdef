"""The values of a configuration as typed structs: every field is there, nothing else is."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from prism_jax import config_usage

T = TypeVar("T")


def section(kind: type[T], values: Mapping[str, Any], place: str, wrong: list[str]) -> T | None:
    """Return the struct of these values, or None; problems are added to `wrong`."""
    before = len(wrong)
    kinds = typing.get_type_hints(kind)
    for name in values:
        if name not in kinds:
            new = config_usage.RENAMED.get(name)
            wrong.append(f"{place}.{name} is " + (f"{place}.{new} now" if new else "no field"))
    wrong += [f"{place}.{name} is missing" for name in kinds if name not in values]
    built = {
        name: _value(kinds[name], values[name], f"{place}.{name}", wrong)
        for name in kinds
        if name in values
    }
    if len(wrong) > before:
        return None
    struct = kind(**built)
    wrong += [f"{place}.{problem}" for problem in struct.problems()]
    return struct


def _value(kind: Any, value: Any, place: str, wrong: list[str]) -> Any:
    if dataclasses.is_dataclass(kind):
        if isinstance(value, Mapping):
            return section(kind, value, place, wrong)
    elif _is_union(kind):
        return _union(kind, value, place, wrong)
    elif typing.get_origin(kind) is Literal:
        if value in typing.get_args(kind):
            return value
    elif typing.get_origin(kind) is tuple:
        if isinstance(value, list | tuple):
            kinds = typing.get_args(kind)
            if kinds[-1] is Ellipsis:
                kinds = (kinds[0],) * len(value)
            if len(kinds) == len(value):
                pairs = enumerate(zip(kinds, value, strict=True))
                return tuple(_value(k, v, f"{place}[{i}]", wrong) for i, (k, v) in pairs)
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    wrong.append(f"{place} must be {_name(kind)}, got {value!r}")
    return None


def _is_union(kind: Any) -> bool:
    """Return whether a type is `A | B`; with a Literal in it Python makes it another way."""
    return isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union


def _union(kind: Any, value: Any, place: str, wrong: list[str]) -> Any:
    """Return the value in the first of the kinds that it fits."""
    tried: list[str] = []
    for option in typing.get_args(kind):
        if option is types.NoneType:
            if value is None:
                return None
            continue
        tried = []
        parsed = _value(option, value, place, tried)
        if not tried:
            return parsed
        if dataclasses.is_dataclass(option) and value is not None:
            wrong += tried
            return None
    wrong.append(f"{place} must be {_name(kind)}, got {value!r}")
    return None


def _name(kind: Any) -> str:
    """Return how a message names a type."""
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(kind)))
    if _is_union(kind):
        return " or ".join(
            "None" if k is types.NoneType else _name(k) for k in typing.get_args(kind)
        )
    if typing.get_origin(kind) is tuple:
        inner = ", ".join("…" if k is Ellipsis else _name(k) for k in typing.get_args(kind))
        return f"a tuple ({inner})"
    return {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}.get(
        kind, "a group of fields"
    )
