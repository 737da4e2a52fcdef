"""Normalise the spelling of an answer: LaTeX layout, markdown, Unicode, delimiters.

No value is changed. All functions are nearly linear in the text, and callers limit texts to 1024
characters.
"""

import re
import unicodedata

from prism_jax.rewards import markup

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
    "φ": "\\phi ", "ω": "\\omega ", "≅": "\\cong ", "∼": "\\sim ", "∽": "\\sim ", "⟂": "\\perp ",
    "≃": "\\approx ", "≒": "\\approx ", "‖": "\\parallel ", "∖": "\\setminus ", "ℝ": "\\mathbb{R} ",
    "∣": "|", "⩽": "\\le ", "⩾": "\\ge ", "∉": "\\notin ", "∨": "\\lor ",
    "∧": "\\land ", "\\lt ": "<", "\\gt ": ">", "～": "~",
} | _MULTIPLY  # fmt: skip
# Only as a separate value; `Infinity War` is a name.
_INFINITY = re.compile(
    r"(?<![A-Za-z\\])(?<![A-Za-z\\] )((?:negative|minus|positive|plus) |- ?)?"
    r"(?:infinity|inf)(?![A-Za-z])(?! [A-Za-z])",
    re.IGNORECASE,
)
_COMMANDS = (
    (re.compile(r"\\(?:[dtcs]|nice)frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right|displaystyle|bigl?|bigr?|Bigl?|Bigr?)(?![A-Za-z])"), ""),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degrees?(?![A-Za-z])"), "° "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\(?:SI|qty) ?\{([^{}]*)\} ?\{([^{}]*)\}"), r"\1 \2"),
    (re.compile(r"(?<=\d)\\[,!;: ](?=\d{3})"), ","),
    (re.compile(r"(?<=[A-Z]) ?~ ?(?=\\triangle|[A-Z]{2,})"), r" \\sim "),
    (re.compile(r"(?<!\\)\\(?:[,!;: ]|quad|qquad)|(?<![\\~])~(?!~)"), " "),
    (re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\\(?:times|cdot|ast)(?![A-Za-z])"), "*"),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\\(leq|geq|neq|leqslant|geqslant|leqq|geqq)(?![A-Za-z])"),
     lambda match: "\\" + match.group(1)[:2]),
    (re.compile(r"(?:the )?square root of (\d+|[a-z])$"), r"\\sqrt{\1}"),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\therefore(?![A-Za-z])"), ""),
    (re.compile(r"\\Delta\s*(?=[A-Z]{3})"), r"\\triangle "),
    (re.compile(r"(?<=[A-Z]) ?(?:\|\||//) ?(?=[A-Z])"), r" \\parallel "),
    (re.compile(r"\\(?:simeq|doteq|approxeq|thickapprox)(?![A-Za-z])"), r"\\approx "),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\(?:infin|infty)(?![A-Za-z]) ?"), r"\\infty "),
    (_INFINITY, lambda match: ("-" if match[1] and match[1][0] in "nNmM-" else "") + r"\infty "),
    (re.compile(r"(?:^|(?<=[(\[{,;=<>])) ?\+ ?(?=\\infty )"), ""),
    (re.compile(r"(?<![\\A-Za-z])[Aa]ngle ?(?=[A-Z]{1,3}(?![A-Za-z])|\d(?!\d))"), r"\\angle "),
    (re.compile(r"(?<![\\A-Za-z])[Tt]riangle ?(?=[A-Z]{3}(?![A-Za-z]))"), r"\\triangle "),
    (re.compile(r"\\(angle|triangle) ?\{([A-Z]{1,3})\}"), r"\\\1 \2"),
    (re.compile(r"\\(angle|triangle|measuredangle)(?![A-Za-z]) ?"), r"\\\1 "),
    (re.compile(r" ?\\(perp|parallel|cong|sim)(?![A-Za-z]) ?"), r" \\\1 "),
    # Units first: `\mu F`. `expressions.latex` turns the letters back.
    (re.compile(r"\\mu(?![A-Za-z])\s*"), "μ"),
    (re.compile(r"\\Omega(?![A-Za-z])"), "Ω"),
    (re.compile(r"\\overline\s*\{([A-Z']+)\}"), r"\1"),
    (re.compile(r"\\(?:langle)(?![A-Za-z])"), "<"),
    (re.compile(r"\\(?:rangle)(?![A-Za-z])"), ">"),
)  # fmt: skip
# Some characters have long spellings; a text longer than this cannot be an answer.
MAX_CLEAN_CHARS = 4096
_ENVIRONMENT = re.compile(
    r"\\begin\{((?:equation|align|aligned|gather)\*?)\}(.*)\\end\{\1\}", re.DOTALL
)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_DELIMITERS = (
    ("$$", "$$"),
    ("$", "$"),
    ("\\(", "\\)"),
    ("\\[", "\\]"),
    ("`", "`"),
    ('"', '"'),
    ("'", "'"),
)
_INNER_DOLLARS = re.compile(r"(?<!\\)\$([^$]+?)(?<!\\)\$")
_INNER_PARENTHESES = re.compile(r"\\[()]")


def clean(text: str) -> str:
    """Return the same spelling for texts that differ only in layout."""
    text = markup.merge_space(_INVISIBLE.sub("", text))
    if text.isdecimal() and text.isascii():
        return text
    text = _VULGAR.sub(lambda match: " " + unicodedata.normalize("NFKC", match.group()), text)
    text = _SUPERSCRIPT_RUN.sub(
        lambda match: "^{" + match.group().translate(_SUPERSCRIPTS) + "}", text
    )
    text = _without_wrapping(markup.plain(text))
    for character, plain in _CHARACTERS.items():
        text = text.replace(character, plain) if character in text else text
    text = re.sub("[₀-₉]+", lambda match: "_" + unicodedata.normalize("NFKC", match.group()), text)
    text = re.sub("[①-⑨]", lambda match: f"({ord(match.group()) - ord('①') + 1}) ", text)
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/")
    if len(text) > MAX_CLEAN_CHARS:
        return text
    text = _without_wrapping(markup.merge_space(text))
    if match := _ENVIRONMENT.fullmatch(text):
        text = match[2].replace("&", "")
    for pattern, plain in _COMMANDS:
        text = pattern.sub(plain, text)
    text = _without_wrapping(markup.plain(markup.merge_space(text)))
    text = _INNER_DOLLARS.sub(r"\1", text)
    text = _INNER_PARENTHESES.sub(" ", text)
    text = markup.merge_space(text)
    text = re.sub(r"_\{ ?(\d+|[A-Za-z]) ?\}", r"_\1", re.sub(r"(_\{ ?\d+ ?\})(?=\d)", r"\1 ", text))
    return re.sub(r" (?=\^)", "", text).strip()


def _without_wrapping(text: str) -> str:
    """Remove delimiters and boxes around the whole text, and a full stop after it."""
    while True:
        text = text.strip()
        shorter = text.rstrip(",;") if not text.endswith("\\,") else text
        if shorter.endswith(".") and not shorter.endswith(".."):
            shorter = shorter[:-1]
        if shorter.endswith("\\\\"):
            shorter = shorter[:-2]
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
    """Return the index of the bracket that closes the bracket at `start`, -1 if there is none.

    Brackets of different kinds may pair, as in the half-open interval [0, 1).
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
    """Return whether the braces of LaTeX groups pair up (escaped ones included)."""
    depth = 0
    for character in text:
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return False
    return depth == 0
