"""Read the letter of a multiple-choice answer: `B`, `(B)`, `B. cat`, `The answer is B`.

Letters run from A to J, as in benchmarks with ten options. An answer that names two options has no
letter: a hedge is never right.
"""

import re

from prism_jax.rewards import remarks

_LETTER = "[A-Ja-j]"
_ALONE = re.compile(
    r"(?:option|choice|letter|point|vertex|figure|image|picture|graph|diagram)?\s?"
    rf"[(\[{{]?\s?({_LETTER})\s?[)\]}}]?[.:)]?",
    re.IGNORECASE,
)
_WITH_TEXT = re.compile(
    rf"(?:[(\[]\s?({_LETTER})\s?[)\]]\s?[:.,-]?\s?|({_LETTER})\s?[.):]\s?"
    r"|([A-J])(?:(?:[,;]| -)\s+|\s?\n|\s+(?=because\b|since\b|[(\[][^()\[\]]*[)\]]$)))"
    r"(?P<text>\S.*)",
    re.DOTALL,
)
_PHRASE = re.compile(
    r"\b(?:answer|option|choice|choose|pick|select|it is|it's|so)\s?(?:is|would be)?\s?[:=]?\s?"
    r"(?:option|choice)?\s?(?:\(\s?([A-Ja-j])\s?\)|([A-J]))(?![\w'])",
    re.IGNORECASE,
)
# Not I, which is a statement.
_ONLY = re.compile(r"(?:[Oo]nly )?(?:[Oo]ption )?\(?([A-HJ])\)?(?: only)?")
_STATED = re.compile(
    rf"\(?({_LETTER})\)?\s+is\s+(?:the\s+)?"
    r"(?:(?:correct|right|best)(?:\s+(?:answer|option|choice|one))?|answer)"
)
# A box says which letter counts, whatever stands before it.
_BOXED = re.compile(
    r"\\(?:boxed|fbox)\s*\{\s*(?:\\[a-z]+\s*\{\s*)?\(?([A-Ja-j])(?:[).:]*\s*\}|[).:]+\s)"
)
_STATED_TRUTH = re.compile(
    r"(?i:the )?(?i:option|choice|answer) \(?([A-J])\)? is (?:the )?(?:correct|right)"
    r"(?: (?:answer|option|choice))?"
)
_NEGATION = re.compile(
    r"\b(?:not|wrong|incorrect|never|neither|nor|unsure|maybe|cannot|doubt|deny|disagree|reject"
    r"|refuse|wonder|guess|suspect|whether)\b|n't\b",
    re.IGNORECASE,
)
_NUMERAL = r"\(?(?:I{1,3}|IV|VI{0,3})\)?"
_NUMERALS = rf"{_NUMERAL}(?:(?:, and |, ?| and | & ){_NUMERAL})*"
_SEVERAL = re.compile(rf"{_NUMERAL}, {_NUMERALS}")
_STATEMENTS = re.compile(
    rf"(?:[Oo]nly )?(?:[Ss]tatements? )?(?P<names>{_NUMERALS})(?: only)?"
    r"(?: (?:is|are) (?:true|correct))?"
)
_ROMAN = ("I", "II", "III", "IV", "V", "VI", "VII", "VIII")
_TRUTH_WITH_TEXT = re.compile(r"(?:\(([A-Ja-j])\)\s*|([A-J])[.:)]\s+)(?P<text>\S.*)", re.DOTALL)


def truth(text: str) -> tuple[str, str]:
    """Return the letter and the option text of a multiple-choice truth, "" for a missing part."""
    if re.fullmatch(r"\(?[A-J]\)?\.?", text):
        return text.strip("()."), ""
    stated = _STATED_TRUTH.fullmatch(text)
    if stated:
        return stated[1], ""
    match = _TRUTH_WITH_TEXT.fullmatch(text)
    if match and not remarks.hedges(match["text"]):
        return (match.group(1) or match.group(2)).upper(), match["text"].strip()
    return "", ""


def letter(text: str) -> str:
    """Return the only letter that an answer chooses, in upper case, or "" if there is none."""
    text = text.strip("* \n")
    alone = _ALONE.fullmatch(text) or _STATED.fullmatch(text) or _ONLY.fullmatch(text)
    if alone:
        return alone.group(1).upper()
    if _SEVERAL.fullmatch(text):
        return ""  # `I, II` is no I with a text
    match = _WITH_TEXT.fullmatch(text)
    if match:
        named = "".join(group for group in match.groups()[:3] if group).upper()
        said_letters = _phrase_letters(match["text"])
        said_letters |= {boxed.upper() for boxed in _BOXED.findall(match["text"])}
        if said_letters - {named} or remarks.takes_back(match["text"], named):
            return ""
        return named
    said_letters = _phrase_letters(text)
    phrases = list(_PHRASE.finditer(text))
    if len(said_letters) != 1 or _NEGATION.search(text):
        return ""
    named = said_letters.pop()
    remark = text[phrases[-1].end() :].lstrip(" .,:;)-\n")
    return "" if remarks.takes_back(remark, named) else named


def remark(text: str) -> str:
    """Return the text after the letter of an answer that `letter` reads, "" if there is none."""
    match = _WITH_TEXT.fullmatch(text.strip("* \n"))
    if match:
        return match["text"]
    phrases = list(_PHRASE.finditer(text))
    return text[phrases[-1].end() :].lstrip(" .,:;)-\n") if phrases else ""


def letters(text: str) -> frozenset[str]:
    """Return the labels of an answer that chooses several: `A, C`, `(A) and (C)`, `AC`, `①③`.

    The order of two letters does not count; `BCA` may be the answer to a question about order.
    """
    if re.fullmatch(r"\([^()]*\)", text):
        return frozenset()  # a pair, whose order counts
    text = re.sub(r"^(?:[Oo]nly )?[\[{]?(.*?)[\]}]?$", r"\1", re.sub(r"\) ?\(", ") (", text))
    parts = [part for part in re.split(r"[\s,;&]+(?:and\s+)?", text) if part]
    if len(parts) == 1 and re.fullmatch("[A-J]{2,10}", text):
        is_sorted = sorted(set(text)) == list(text)
        parts = list(text) if is_sorted or (len(text) == 2 and text[0] != text[1]) else []
    if len(parts) > 2 and parts[-1] == "only":
        parts.pop()
    if any(part.endswith(".") for part in parts) and "," not in text:
        return frozenset()  # `C. A and B` chooses C
    if len(parts) > 1 and all(part.strip("().") in _ROMAN for part in parts):
        return frozenset(part.strip("().") for part in parts)
    matches = [re.fullmatch(r"\(?([A-Ja-j])[.)]?|\(([1-9])\)", part) for part in parts]
    if not all(matches) or len({one[2] is None for one in matches}) > 1:
        return frozenset()
    return frozenset((one[1] or one[2]).upper() for one in matches)


def same_statements(answer: str, truth: str) -> bool | None:
    """Compare statements by their Roman numerals, `I and II only`; None if a side is no such list.

    `I` and `I only` mean the same: whoever names a statement leaves the others out.
    """
    matches = [_STATEMENTS.fullmatch(text) for text in (answer, truth)]
    if not all(matches):
        return None
    given, wanted = (set(re.findall("[IV]+", match["names"])) for match in matches)
    return given == wanted


def is_statement(text: str, numeral: str) -> bool:
    """Return whether a text names this statement alone: `I only`."""
    return text in (f"{numeral} only", f"only {numeral}", f"Only {numeral}")


def _phrase_letters(text: str) -> set[str]:
    return {(a or b).upper() for a, b in _PHRASE.findall(text) if a or b.isupper()}
