"""Lists of named values: the solutions of one unknown, conditions, the coordinates of a point.

    x = 1 or x = -1     x = -1, 1     x_1 = 1, x_2 = -1     y = 2, x > 1     y = 2, x = 1

The values of one unknown have no order, nor have conditions on several ones. `(1, 2)` names x
before y, whatever the order of `y = 2, x = 1`.
"""

import dataclasses
import re

from prism_jax.rewards import equations, expressions, geometry, sets, structure

# Of other names the values may be a sequence: `S = 1, 2, 3`.
_VARIABLE = re.compile("[a-z]|alpha|beta|theta|phi|lambda|omega")
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def named_alike(
    answer: structure.Parts, truth: structure.Parts
) -> tuple[structure.Parts, structure.Parts]:
    """Write `x = 1, 2` as `x = 1, x = 2`, and an answer `x_1 = 1, x_2 = 2` so if the truth is."""
    answer, truth = _distributed(answer), _distributed(truth)
    if not is_of_one_unknown(truth):
        return answer, truth
    named = [equations.name_and_value(item) for item in answer.items]
    name = equations.name_and_value(truth.items[0])[0]
    if [one for one, _ in named] != [f"{name}{place + 1}" for place in range(len(named))]:
        return answer, truth
    items = tuple(f"{name} = {value}" for _, value in named)
    return dataclasses.replace(answer, items=items), truth


def _distributed(parts: structure.Parts) -> structure.Parts:
    """Give all values the name that stands before the first, if they are plain numbers."""
    name = equations.name_and_value(parts.items[0])[0]
    rest = parts.items[1:]
    is_bare = not parts.brackets and not parts.is_numbered
    if not is_bare or not _VARIABLE.fullmatch(name) or not all(map(_is_plain, rest)):
        return parts
    items = (parts.items[0], *(f"{name} = {item}" for item in rest))
    return dataclasses.replace(parts, items=items)


def _is_plain(item: str) -> bool:
    """Return whether a part is a value without a name or a relation."""
    is_value = bool(re.search(r"\d", item)) and not expressions.RELATION.search(item)
    return is_value and not equations.is_equation(item) and not geometry.name(item)


def is_of_one_unknown(parts: structure.Parts) -> bool:
    """Return whether all parts are values of one name, which have no order."""
    names = {equations.name_and_value(item)[0] for item in parts.items}
    is_bare = not parts.brackets and not parts.is_numbered
    return is_bare and len(parts.items) > 1 and len(names) == 1 and "" not in names


def are_conditions(answer: structure.Parts, truth: structure.Parts) -> bool:
    """Return whether both are lists of conditions that hold together, in any order.

    Two conditions on one unknown may answer two questions, unless "and" joins them.
    """
    for parts in (answer, truth):
        if parts.brackets or parts.is_numbered:
            return False
        names = [equations.name_and_value(item)[0] or sets.variable(item) for item in parts.items]
        if "" in names or not any(map(expressions.RELATION.search, parts.items)):
            return False
    return len(set(names)) == len(names) or truth.is_conjunction


def in_order_of_names(
    answer: structure.Parts, truth: structure.Parts
) -> tuple[structure.Parts, structure.Parts] | None:
    """Sort the named values of one side by name, as the point of the other side has them.

    Only letters that follow each other have an order. Beside a bare list, values that are not in
    it have two readings: the result is None.
    """
    sides = []
    for parts, other in ((answer, truth), (truth, answer)):
        names = [equations.name_and_value(item)[0] for item in parts.items]
        if "" not in names and "".join(sorted(names)) in _ALPHABET and names != sorted(names):
            if other.brackets != "()":
                return None
            items = tuple(item for _, item in sorted(zip(names, parts.items, strict=True)))
            parts = dataclasses.replace(parts, items=items)
        sides.append(parts)
    return sides[0], sides[1]
