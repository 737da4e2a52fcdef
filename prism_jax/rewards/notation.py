"""Bring an answer's spelling to one form: LaTeX layout, markdown, Unicode, delimiters.

Nothing here changes a value. Every function is linear in the text or nearly so, and texts are
limited to 1024 characters before they arrive.
"""

import re
import unicodedata

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUPERSCRIPT_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_INVISIBLE = re.compile("[\u200b-\u200f\u2060\ufeff]")
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_MULTIPLY = {"×": "*", "⋅": "*", "·": "*", "∗": "*", "\\times": "*", "\\cdot": "*"}
_CHARACTERS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "，": ",", "；": ";", "、": ",", "。": ".",
    "“": '"', "”": '"', "‘": "'", "’": "'", "′": "'", "µ": "μ", "º": "°", "˚": "°", "⟨": "<",
    "⟩": ">", "∙": "*", "÷": "/", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "≈": "\\approx ",
    "π": "\\pi ", "∞": "\\infty ", "∠": "\\angle ", "△": "\\triangle ", "∪": "\\cup ",
    "∩": "\\cap ", "∈": "\\in ", "±": "\\pm ", ">=": "\\ge ", "<=": "\\le ", "!=": "\\ne ",
    "∥": "\\parallel ", "⊥": "\\perp ", "∅": "\\emptyset ", "∴": "", "Δ": "\\Delta ",
    "α": "\\alpha ", "β": "\\beta ", "γ": "\\gamma ", "θ": "\\theta ", "λ": "\\lambda ",
    "φ": "\\phi ", "ω": "\\omega ",
} | _MULTIPLY  # fmt: skip
_COMMANDS = (
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right|displaystyle|bigl?|bigr?|Bigl?|Bigr?)(?![A-Za-z])"), ""),
    (re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mathit|mathsf|operatorname|mbox|ce)"
                r"\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degrees?(?![A-Za-z])"), "° "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<=\d)\\[,!;: ](?=\d{3})"), ","),
    (re.compile(r"(?<!\\)\\(?:[,!;: ]|quad|qquad)|(?<!\\)~"), " "),
    (re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\\(?:times|cdot|ast)(?![A-Za-z])"), "*"),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\\(leq|geq|neq|leqslant|geqslant)(?![A-Za-z])"),
     lambda found: "\\" + found.group(1)[:2]),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\therefore(?![A-Za-z])"), ""),
    (re.compile(r"\\Delta\s*(?=[A-Z]{3})"), r"\\triangle "),
    (re.compile(r"(?<=[A-Z]) ?\|\| ?(?=[A-Z])"), r" \\parallel "),
    # Units first: `\mu F`. `answer.latex` turns the letters back.
    (re.compile(r"\\mu(?![A-Za-z])\s*"), "μ"),
    (re.compile(r"\\Omega(?![A-Za-z])"), "Ω"),
    (re.compile(r"\\overline\s*\{([A-Z']+)\}"), r"\1"),
    (re.compile(r"\\(?:langle)(?![A-Za-z])"), "<"),
    (re.compile(r"\\(?:rangle)(?![A-Za-z])"), ">"),
    (re.compile(r"\*\*(?=[^*\s])(.+?)(?<=[^*\s])\*\*"), r"\1"),
)  # fmt: skip
_MATRIX = re.compile(
    r"(?:^|(?<==)) ?\\begin\{(?P<kind>[pb]matrix)\}(?P<cells>[^,]*?)\\end\{(?P=kind)\}$"
)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("`", "`"), ('"', '"'),
               ("'", "'"))  # fmt: skip
_INNER_DOLLARS = re.compile(r"(?<!\\)\$([^$]+?)(?<!\\)\$")
_INNER_PARENTHESES = re.compile(r"\\[()]")


def clean(text: str) -> str:
    """Return one spelling for texts that differ in layout only."""
    text = _INVISIBLE.sub("", text).strip()
    if text.isdecimal() and text.isascii():
        return text
    text = _VULGAR.sub(lambda found: " " + unicodedata.normalize("NFKC", found.group()), text)
    text = _SUPERSCRIPT_RUN.sub(
        lambda found: "^{" + found.group().translate(_SUPERSCRIPTS) + "}", text
    )
    for character, plain in _CHARACTERS.items():
        text = text.replace(character, plain) if character in text else text
    text = re.sub("[₀-₉]+", lambda found: "_" + unicodedata.normalize("NFKC", found.group()), text)
    text = re.sub("[①-⑨]", lambda found: f"({ord(found.group()) - ord('①') + 1}) ", text)
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/")
    text = _without_wrapping(text)
    for pattern, plain in _COMMANDS:
        text = pattern.sub(plain, text)
    text = _without_wrapping(text)
    text = _INNER_DOLLARS.sub(r"\1", text)
    text = _INNER_PARENTHESES.sub(" ", text)
    text = re.sub(r"[ \t\r\f\v\xa0]+", " ", text)
    text = _MATRIX.sub(_rows, text)
    return re.sub(r" (?=\^)", "", text).strip()


def _rows(found: re.Match) -> str:
    """Write a matrix in brackets or parentheses as `[[1,2],[3,4]]`."""
    rows = [row.split("&") for row in found["cells"].split("\\\\") if row.strip()]
    return "[" + ",".join("[" + ",".join(map(str.strip, row)) + "]" for row in rows) + "]"


def _without_wrapping(text: str) -> str:
    """Remove delimiters and boxes around the whole text, and the full stop behind it."""
    while True:
        text = text.strip()
        shorter = text.rstrip(",;") if not text.endswith("\\,") else text
        if shorter.endswith(".") and not shorter.endswith(".."):
            shorter = shorter[:-1]
        for left, right in _DELIMITERS:
            inner = shorter[len(left) : -len(right)]
            if (
                shorter.startswith(left)
                and shorter.endswith(right)
                and len(shorter) >= len(left) + len(right)
                and left not in inner
                and right not in inner
            ):
                shorter = inner
        box = _BOXED.match(shorter)
        if box and closing(shorter, box.end() - 1) == len(shorter) - 1:
            shorter = shorter[box.end() : -1]
        if shorter == text:
            return text
        text = shorter


def closing(text: str, start: int) -> int:
    """Return the index of the bracket that closes the one at `start`, -1 without one.

    Kinds may be mixed, as in the half-open interval [0, 1).
    """
    depth = 0
    for index in range(start, len(text)):
        if text[index] in "([{":
            depth += 1
        elif text[index] in ")]}":
            depth -= 1
            if depth == 0:
                return index
    return -1


def is_balanced(text: str) -> bool:
    """Say whether the braces of LaTeX groups pair up (escaped ones included)."""
    depth = 0
    for character in text:
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return False
    return depth == 0


def words(text: str) -> str:
    """Return the text as lower-case words for the comparison of names and phrases.

    Quotes, end punctuation, hyphens inside words, the points of abbreviations, the lowering of
    indices and a leading article do not count; signs,
    decimal points and anything else between digits or single letters do.
    """
    text = re.sub(r"\"|(?<=[^\d\s])[,;:](?=\s|$)", "", text.lower())
    text = re.sub(r"(?<=[a-z]{2})-(?=[a-z]{2})|(?<=\b[a-z])-(?=[a-z]{3})", " ", text)
    text = re.sub(r"(?<=[a-z])\.|(?<=[a-z)])_(?=\{?\d)", "", text)
    text = re.sub(r"\s+", " ", text).strip(" .,;:")
    text = re.sub(r"(?<=\w\w)[!?]+$", "", text)
    return re.sub(r"^(?:an? (?=\S\S)|the (?=\S))", "", text)
