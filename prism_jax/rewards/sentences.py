"""Find the value that a sentence states: `The answer is 12`, `So x = 7`, `The area is 5 cm`.

Answers and truths are treated alike. If a sentence names its subject (`The dog is black`), the
subject is returned: two sentences about different things do not mean the same.
"""

import dataclasses
import re

from prism_jax.rewards import notation, quantities

_MONTHS = "jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec"
_CONCLUSION = r"(?:so|thus|hence|therefore|finally|in conclusion)[, ]+|故|所以|因此"
_ANSWER = (
    r"(?:(?:my |the )?(?:final |correct |right )?"
    r"(?:answer|option|choice|result|solution)\s*(?:is\s*[:=]?|[:=])\s*"
    r"|(?:答案|选项|应?选)\s*[是为:]?\s*)"
)
_STATEMENT = (
    rf"(?:=\s*|{_ANSWER}"
    r"|(?:it is|it's|there (?:is|are)|this is|that is|they are|we (?:get|have)"
    r"|(?:in )?(?:the )?year)\s+"
    rf"|(?:in|on|at)\s+(?=\d|(?:{_MONTHS})))"
)
_LEAD_IN = re.compile(rf"(?:{_CONCLUSION}){_STATEMENT}?|{_STATEMENT}", re.IGNORECASE)
_LABEL = re.compile(r"(?P<subject>[A-Za-z]{3,20}(?: [A-Za-z]{3,20}){0,3}):\s+")
_COPULA = re.compile(
    r"(?P<subject>[^=<>,;:\d]{1,120}?)\s(?:is|are|equals|was|were)\s+(?:equal to\s+)?",
    re.IGNORECASE,
)
# The last sentence of a solution.
_CLOSING = re.compile(
    r"(?:[.;\n]\s?|,\s(?=so|thus|hence|therefore))"
    rf"(?:(?:{_CONCLUSION})?{_ANSWER}|(?:{_CONCLUSION}))",
    re.IGNORECASE,
)
_NAMED = re.compile(
    r"(?i:(?:the )?(?:value|length|measure|size|area|perimeter|radius|diameter|volume) of )?"
    r"(?i:line |segment |side )?([A-Za-z]|[A-Z]{2,3}|\\angle [A-Z]{1,3})"
)
_TURNED = re.compile(r"([^.;]{1,120}) is the (?:final |correct |right )?(?:answer|result)")
_ANY_ANSWER = re.compile(_ANSWER, re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_DOUBT = re.compile(
    r"\b(?:or|not|no|none|never|neither|nor|if|unless|wrong|either|could|might|may|maybe|perhaps"
    r"|except|than|cannot|without|false|incorrect|nobody|nothing|hardly|other|another|opposite"
    r"|instead|rather|doubt|deny|disagree|reject|refuse|wonder|guess|suspect|whether)\b|n't\b",
    re.IGNORECASE,
)
_ROUNDED = re.compile(r"approx(?:\.|imate(?:ly)?)?|rounded|exact(?:ly)?", re.IGNORECASE)
_REPETITION = re.compile(r"(?:or|i\.e\.,?|that is,?|=|\\approx) ?", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Stated:
    """A value and its subject, "" for none (`The answer is 12`)."""

    subject: str
    value: str


def stated(text: str) -> Stated | None:
    """Return the value that a cleaned sentence states, None if the text is not such a sentence."""
    boxed = _boxed(text)
    if boxed is not None:
        return boxed
    closing = list(_CLOSING.finditer(text))
    subject, rest = "", text
    if closing and len(_ANY_ANSWER.findall(text)) < 2:
        before = text[: closing[-1].start()]
        if _DOUBT.search(before):
            return None
        rest = notation.clean(text[closing[-1].end() :])
        is_value = quantities.parse(before) is not None and before != rest
        if is_value and not _ANY_ANSWER.search(closing[-1].group()):
            return None  # `8. So 7` gives two answers, `8. The answer is 7` one
    match = _LEAD_IN.match(rest)
    if match and not _DOUBT.search(match.group()):
        rest = notation.clean(rest[match.end() :])
    match = _TURNED.fullmatch(rest)
    if match and not _DOUBT.search(match[1]):
        rest = notation.clean(match[1])
    match = _LABEL.match(rest) or _COPULA.match(rest)
    if match and match.end() < len(rest) and not _DOUBT.search(match["subject"]):
        subject, rest = match["subject"].strip(), notation.clean(rest[match.end() :])
        named = _NAMED.fullmatch(subject)
        if named and rest:
            # `The value of y is 5` is `y = 5`.
            subject, rest = "", f"{named[1]} = {rest}"
    return Stated(subject, rest) if rest and rest != text else None


def _boxed(text: str) -> Stated | None:
    """Read the only box of a text, if the words before it do not put it in doubt."""
    boxes = list(_BOX.finditer(text))
    if len(boxes) != 1:
        return None
    start = boxes[0].end() - 1
    stop = notation.closing(text, start)
    before, behind = text[: boxes[0].start()], text[stop + 1 :]
    if stop < 0 or behind.strip(" .$\n") or _DOUBT.search(before):
        return None
    value = notation.clean(text[start + 1 : stop])
    return Stated("", value) if re.search(r"[A-Za-z]{2}", before) and value else None


def said_twice(text: str) -> tuple[str, str] | None:
    """Split `1/2 (0.5)` or `0.5 or 50%` into two values that must both be right; None otherwise.

    A remark on rounding counts as a repetition of the value.
    """
    once = again = ""
    if text.endswith(")") and text.count("(") == 1 and not text.startswith("("):
        once, _, again = text[:-1].partition("(")
        again = again[match.end() :] if (match := _REPETITION.match(again)) else again
    elif len(parts := re.split(r",? or ", text, flags=re.IGNORECASE)) == 2:
        once, again = parts
    once, again = once.strip(), again.strip()
    if not once or not again:
        return None
    return once, once if _ROUNDED.fullmatch(again) else again
