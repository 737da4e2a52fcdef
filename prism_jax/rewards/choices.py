"""Read the letter of a multiple-choice answer: `B`, `(B)`, `B. cat`, `The answer is B`.

Letters run from A to J, as in benchmarks with ten options. An answer that names two options has
no letter: a hedge is never right.
"""

import re

_LETTER = "[A-Ja-j]"
_ALONE = re.compile(
    r"(?:option|choice|letter|point|vertex|figure|image|picture|graph|diagram)?\s*"
    rf"[(\[{{]?\s*({_LETTER})\s*[)\]}}]?[.:)]?",
    re.IGNORECASE,
)
_WITH_TEXT = re.compile(
    rf"(?:[(\[]\s*({_LETTER})\s*[)\]]\s*[:.,-]?\s*|({_LETTER})\s*[.):]\s*"
    r"|([A-J])(?:(?:[,;]| -)\s+|\s*\n|\s+(?=because\b|since\b|[(\[][^()\[\]]*[)\]]$)))"
    r"(?P<text>\S.*)",
    re.DOTALL,
)
_PHRASE = re.compile(
    r"\b(?:answer|option|choice|choose|pick|select|it is|it's|so)\s*(?:is|would be)?\s*[:=]?\s*"
    r"(?:option|choice)?\s*(?:\(\s*([A-Ja-j])\s*\)|([A-J]))(?![\w'])",
    re.IGNORECASE,
)
_STATED = re.compile(
    rf"\(?({_LETTER})\)?\s+is\s+(?:the\s+)?"
    r"(?:(?:correct|right|best)(?:\s+(?:answer|option|choice|one))?|answer)"
)
# The start of a remark that takes a letter back; "Not enough information" is an option's text.
_REJECTION = re.compile(
    r"(?:is |are )?(?:not (?:\(?[A-J]\b|it\b|sure|correct|right|true|the )|isn't|wrong(?! \w)"
    r"|nor|unsure|maybe)"
)
_NEGATION = re.compile(r"\b(?:not|isn't|wrong|incorrect|never|neither|nor|unsure|maybe)\b", re.I)
_HEDGE = re.compile(
    r"^\W*[A-Ja-j]\W*(?:$|[,;])|^\W*(?:or|and|/|,|&|\+|not)\W*[A-Ja-j]\b(?![a-z'])"
    r"|\bor\s+(?:option\s+)?\(?[A-J]\)?(?![\w'])"
    r"|(?:^|\s)\([A-Ja-j]\)(?!\w)|(?:^|\s)[A-J][.)](?:\s|$)|\n\s*[A-J]\s*(?:\n|$)|\(ii\)"
)
_TRUTH_WITH_TEXT = re.compile(r"(?:\(([A-Ja-j])\)\s*|([A-J])[.:)]\s+)(?P<text>\S.*)", re.DOTALL)


def truth(text: str) -> tuple[str, str]:
    """Return the letter and the option text of a multiple-choice truth; "" for what is absent."""
    if re.fullmatch(r"\(?[A-J]\)?\.?", text):
        return text.strip("()."), ""
    found = _TRUTH_WITH_TEXT.fullmatch(text)
    if found and not _HEDGE.search(found["text"]):
        return (found.group(1) or found.group(2)).upper(), found["text"].strip()
    return "", ""


def letter(text: str) -> str:
    """Return the one letter that an answer chooses, in upper case; "" when there is not one."""
    text = text.strip("* \n")
    alone = _ALONE.fullmatch(text) or _STATED.fullmatch(text)
    if alone:
        return alone.group(1).upper()
    found = _WITH_TEXT.fullmatch(text)
    if found:
        named = "".join(group for group in found.groups()[:3] if group).upper()
        said = _phrase_letters(found["text"])
        if _HEDGE.search(found["text"]) or said - {named} or _REJECTION.match(found["text"]):
            return ""
        return named
    said = _phrase_letters(text)
    phrases = list(_PHRASE.finditer(text))
    if len(said) != 1 or _HEDGE.search(text[phrases[-1].end() :]):
        return ""
    return "" if _NEGATION.search(text) else said.pop()


def letters(text: str) -> frozenset[str]:
    """Return the letters of an answer that chooses several options: `A, C`, `(A) and (C)`, `AC`."""
    if re.fullmatch(r"\([^()]*\)", text):
        return frozenset()  # a pair, whose order counts
    parts = [part for part in re.split(r"\s*[,;&]\s*(?:and\s+)?|\s+and\s+|\s+", text) if part]
    if len(parts) == 1 and re.fullmatch("[A-J]{2,10}", text):
        parts = list(text) if sorted(set(text)) == list(text) else []
    if len({part.endswith(".") for part in parts}) > 1:
        return frozenset()  # `C. A and B` chooses C
    found = [re.fullmatch(r"\(?([A-Ja-j])[.)]?", part) for part in parts]
    return frozenset(one.group(1).upper() for one in found) if all(found) else frozenset()


def _phrase_letters(text: str) -> set[str]:
    return {(a or b).upper() for a, b in _PHRASE.findall(text) if a or b.isupper()}
