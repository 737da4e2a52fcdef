"""The fields of a request: each is honoured, or the request is refused with the field's name.

A field that is null counts as absent. A field of OpenAI's API that this server does not have is
accepted with the value that switches it off, and with no other.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

from prism_jax.commands.serve.refusals import Refusal

_SHOWN_CHARS = 60


class Fields:
    """The fields of one JSON object; reading a field takes it, and `close` refuses the others."""

    def __init__(self, value: Any, place: str):
        """Store the fields.

        Args:
          place: the object's field, "" for the request.
        """
        if not isinstance(value, dict):
            raise Refusal(
                f"{place or 'the request'} must be a JSON object, got {show(value)}",
                field=place or None,
            )
        self._place = place
        self._fields = {name: item for name, item in value.items() if item is not None}

    def name(self, field: str) -> str:
        """Return the full name of a field."""
        return f"{self._place}.{field}" if self._place else field

    def take(self, field: str) -> Any:
        """Return a field's value, None if it is absent."""
        return self._fields.pop(field, None)

    def needed(self, field: str) -> Any:
        """Return the value of a field that must be there."""
        value = self.take(field)
        if value is None:
            raise self.refusal(field, "is missing")
        return value

    def integer(self, field: str, least: int, most: int) -> int | None:
        """Return a whole number, None if it is absent."""
        value = self.take(field)
        if value is None:
            return None
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not is_whole or not least <= value <= most:
            rule = f"must be a whole number between {least} and {most}"
            raise self.refusal(field, f"{rule}, got {show(value)}")
        return value

    def number(self, field: str, least: float, most: float) -> float | None:
        """Return a number, None if it is absent."""
        value = self.take(field)
        if value is None:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not least <= value <= most:
            rule = f"must be a number between {least:g} and {most:g}"
            raise self.refusal(field, f"{rule}, got {show(value)}")
        return float(value)

    def boolean(self, field: str) -> bool:
        """Return true or false; False if it is absent."""
        value = self.take(field)
        if value is not None and not isinstance(value, bool):
            raise self.refusal(field, f"must be true or false, got {show(value)}")
        return bool(value)

    def text(self, field: str) -> str | None:
        """Return a text, None if it is absent."""
        value = self.take(field)
        return None if value is None else self.checked_text(field, value)

    def checked_text(self, field: str, value: Any) -> str:
        """Return the value, which must be a text that UTF-8 can encode."""
        if not isinstance(value, str):
            raise self.refusal(field, f"must be a text, got {show(value)}")
        if value != value.encode(errors="replace").decode():
            raise self.refusal(field, "must not hold half of a surrogate pair")
        return value

    def choice(self, field: str, values: Sequence[str]) -> str | None:
        """Return one of some texts, None if it is absent."""
        value = self.take(field)
        if value is not None and value not in values:
            raise self.refusal(field, f"must be one of {', '.join(values)}, got {show(value)}")
        return value

    def off(self, field: str, *values: Any) -> None:
        """Refuse a field that the server does not have, unless its value switches it off."""
        value = self.take(field)
        if value is None or any(type(value) is type(off) and value == off for off in values):
            return
        allowed = " or ".join(["null", *map(json.dumps, values)])
        raise self.refusal(
            field, f"is not supported: it must be {allowed}, got {show(value)}", "unsupported_value"
        )

    def close(self) -> None:
        """Refuse the fields that were not taken."""
        for field in self._fields:
            raise self.refusal(field, "is not a field of this server", "unknown_parameter")

    def refusal(self, field: str, message: str, code: str = "invalid_value") -> Refusal:
        """Return the error about a field of this object."""
        name = self.name(field)[:200]
        return Refusal(f"{name} {message}", field=name, code=code)


def show(value: Any) -> str:
    """Return a value for a message, shortened."""
    try:
        text = json.dumps(value, ensure_ascii=True)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"


def parse(body: bytes) -> Any:
    """Return the value of a JSON text; no key may stand twice in an object."""
    try:
        return json.loads(
            body.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant
        )
    except UnicodeDecodeError as error:
        raise Refusal(f"the body is not UTF-8 at byte {error.start}", code="invalid_json") from None
    except RecursionError:
        raise Refusal("the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise Refusal(f"the body is not JSON: {error}", code="invalid_json") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        name = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {show(name)} stands twice in an object")
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")
