"""Compare statements of geometry: `AB ⊥ CD`, `△ABC ≅ △DEF`, `∠ABC`; names of points."""

import re

_RELATION = re.compile(r" ?\\(perp|parallel|cong|sim)(?![A-Za-z]) ?")
_WORDS = re.compile(
    r"(?<=[A-Z]) (?:is |are )?(perpendicular|parallel|congruent|similar) (?:to|with) "
    r"(?=[A-Z\\])|(?<=[A-Z]) (?:is |are )?(perpendicular|parallel|congruent|similar)(?: to)? "
    r"(?=\\triangle)"
)
_COMMANDS = {"perpendicular": "perp", "congruent": "cong", "similar": "sim"}
_SEGMENT = re.compile(r"(?:\\overline ?|line |segment )?\{?([A-Z])([A-Z])\}?")
_ANGLE = re.compile(r"m?\\angle ([A-Z])([A-Z])([A-Z])")
_A_POINT = re.compile(r"^(?:the )?point (?=[A-Z]? ?\()", re.IGNORECASE)
_VARIABLES = re.compile(r"\([a-z](?: ?, ?[a-z]){1,3}\) ?= ?(?=\()")
_POINT = re.compile(
    r"(?P<name>[A-Z]'?|[a-z](?= ?=)|\\(?:vec|overrightarrow) ?\{[A-Za-z]+\})"
    r"(?: ?=? ?(?=\([^()]*\)$)| ?= ?(?=\\?\{[^{}]*\}$))"
)


def same(answer: str, truth: str) -> bool | None:
    """Compare with a truth that is a relation between figures or the name of an angle."""
    angles = _ANGLE.fullmatch(answer), _ANGLE.fullmatch(truth)
    if all(angles):
        # The vertex is in the middle; the name may be read from either side.
        return angles[0].groups() in (angles[1].groups(), angles[1].groups()[::-1])
    given, wanted = _statement(answer), _statement(truth)
    if given is None or wanted is None:
        return None
    # All four relations are symmetric.
    return given == wanted or (given[0], given[2], given[1]) == wanted


def _statement(text: str) -> tuple[str, str, str] | None:
    """Return the relation and the two figures."""
    text = _WORDS.sub(
        lambda match: f" \\{_COMMANDS.get(match[1] or match[2], match[1] or match[2])} ", text
    )
    parts = _RELATION.split(text)
    if len(parts) != 3 or not all(parts):
        return None
    left, relation, right = (part.strip() for part in parts)
    if relation in ("perp", "parallel"):
        left, right = _segment(left), _segment(right)
    return relation, left, right


def _segment(text: str) -> str:
    """Return the ends of a segment in alphabetical order."""
    match = _SEGMENT.fullmatch(text)
    return "".join(sorted(match.groups())) if match else text


def name(text: str) -> str:
    """Return the name of a point, `A` of `A(2,3)`, "" without one."""
    match = _POINT.match(text)
    return match["name"] if match else ""


def without_names(answer: str, truth: str) -> tuple[str, str]:
    """Drop the name of a point, `A(2,3)`, unless the two differ; write `f(x) =` as `y =`."""
    texts = [re.sub(r"^f ?\(x\) ?=(?!.*=)", "y =", text) for text in (answer, truth)]
    texts = [_without_variables(_A_POINT.sub("", text)) for text in texts]
    points = [_POINT.match(text) if "," in text or ";" in text else None for text in texts]
    if all(points) and points[0]["name"] != points[1]["name"]:
        return answer, truth
    given, wanted = (
        text[point.end() :] if point else text for text, point in zip(texts, points, strict=True)
    )
    return given, wanted


def _without_variables(text: str) -> str:
    """Drop the left side of `(x, y) = (3, -4)`, if its letters are in alphabetical order."""
    match = _VARIABLES.match(text)
    letters = re.findall("[a-z]", match.group()) if match else []
    return text[match.end() :] if letters and letters == sorted(letters) else text
