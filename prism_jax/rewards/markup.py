"""Remove the decoration of an answer: markdown, HTML, code fences, LaTeX fonts and colours.

Text that is struck out (`~~7~~`, `<s>7</s>`, `\\cancel{7}`) keeps its marks and so equals nothing.
All functions are linear in the text, since runs of white space have been merged.
"""

import html
import re

_SPACE = re.compile(r"\s+")
_LINE_ENDS = frozenset("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")
# The mark of a final answer in worked solutions (GSM8K).
_FINAL = re.compile(r"(?:^|\n)####(?!#) ?")
_HEADING = re.compile(r"#{1,6} ")
_BULLET = re.compile(r"[*•●▪] (?=\S)")
_ENTITY = re.compile(r"&(?:nbsp|lt|gt|le|ge|ne|amp|quot|deg|times|pi|infin|minus|radic|plusmn);")
_CLOSING_TAG = re.compile(
    r"</(b|i|u|em|strong|p|div|span|font|center|code|mark|big|small|h[1-6]|li|ul|ol|tt|pre)>"
)
_ATTRIBUTES = r"(?: [a-z-]{1,20}=[^<>]{0,200})?"
_SUB_SUP = re.compile(r"<(su[bp])>([^<>]{1,40})</\1>")
_BREAK = re.compile(r"<br ?/?>")
_AFTER = r"(?=$|[\s.,;:!?)\]])"
_STRONG = re.compile(
    rf"(?:^|(?<=[\s(\[:]))(\*\*\*?|__)(?=[^*_\s])([^*_]{{1,400}})(?<=[^*_\s])\1{_AFTER}"
)
_EMPHASIS = re.compile(
    rf"(?:^|(?<=[A-Za-z][A-Za-z] )|(?<=: ))([*_])(?=[^*_\s])([^*_]{{1,400}})(?<=[^*_\s])\1{_AFTER}"
)
# Commands whose last argument is the text; the number of arguments before it.
_COMMANDS = {
    "textcolor": 1, "colorbox": 1, "fcolorbox": 2, "underline": 0, "emph": 0, "text": 0,
    "textrm": 0, "textbf": 0, "textit": 0, "textsf": 0, "texttt": 0, "textnormal": 0, "mathrm": 0,
    "mathbf": 0, "mathit": 0, "mathsf": 0, "mathtt": 0, "boldsymbol": 0, "bm": 0, "bold": 0,
    "operatorname": 0, "mbox": 0, "ce": 0, "uline": 0, "pmb": 0,
    "hbox": 0, "textup": 0, "si": 0, "unit": 0,
}  # fmt: skip
# Commands that change the text after them, with the number of their arguments.
_SWITCHES = {
    "color": 1, "displaystyle": 0, "textstyle": 0, "tiny": 0, "small": 0, "normalsize": 0,
    "large": 0, "Large": 0, "LARGE": 0, "huge": 0, "Huge": 0, "bf": 0, "rm": 0, "it": 0,
    "bfseries": 0, "centering": 0,
}  # fmt: skip
_COMMAND = re.compile(r"\\([A-Za-z]{2,12})(?![A-Za-z])\*? ?")


def merge_space(text: str) -> str:
    """Write each run of white space as a newline if it ends a line, else as a blank."""
    return _SPACE.sub(
        lambda match: " " if _LINE_ENDS.isdisjoint(match.group()) else "\n", text
    ).strip()


def plain(text: str) -> str:
    """Return the text without decoration; white space has been merged."""
    if "#" in text:
        text = _HEADING.sub("", _final(text), count=1) if text[0] == "#" else _final(text)
    if text.startswith("```") and text.endswith("```") and text.count("```") == 2:
        language, line_end, body = text[3:-3].partition("\n")
        text = (body if line_end and language.isalnum() else text[3:-3]).strip()
    if "&" in text:
        text = _ENTITY.sub(lambda match: html.unescape(match.group()), text)
    if "<" in text:
        text = _without_tags(text)
    match = _BULLET.match(text)
    text = text[match.end() :] if match else text
    if "*" in text or "_" in text:
        text = _EMPHASIS.sub(r"\2", _STRONG.sub(r"\2", text))
    return _without_commands(text) if "\\" in text else text


def _final(text: str) -> str:
    """Return the text after the last `####`, or the whole text if there is none."""
    marks = list(_FINAL.finditer(text))
    return text[marks[-1].end() :].strip() or text if marks else text


def _without_tags(text: str) -> str:
    text = _BREAK.sub("\n", text)
    text = _SUB_SUP.sub(lambda match: "_^"[match[1] == "sup"] + "{" + match[2] + "}", text)
    for name in dict.fromkeys(_CLOSING_TAG.findall(text)):
        # Without its end, `a<b>c` is an inequality.
        text = re.sub(f"<{name}{_ATTRIBUTES}>", "", text).replace(f"</{name}>", "")
    return text.strip()


def _without_commands(text: str) -> str:
    """Replace commands of fonts and colours, and the braces around their text, by blanks."""
    commands = [
        match for match in _COMMAND.finditer(text) if match[1] in _COMMANDS or match[1] in _SWITCHES
    ]
    if not commands:
        return text
    ends, pieces = _brace_ends(text), list(text)
    for command in commands:
        num_arguments = _SWITCHES.get(command[1], _COMMANDS.get(command[1], 0))
        stop = command.end()
        for _ in range(num_arguments):
            if stop not in ends:
                break
            stop = ends[stop] + 1
        else:
            if command[1] in _COMMANDS and stop not in ends:
                continue
            pieces[command.start() : stop] = [" "] + [""] * (stop - command.start() - 1)
            if command[1] in _COMMANDS:
                pieces[stop] = pieces[ends[stop]] = " "
    return _SPACE.sub(lambda run: "\n" if "\n" in run.group() else " ", "".join(pieces)).strip()


def _brace_ends(text: str) -> dict[int, int]:
    """Return the position of the closing brace for each opening brace."""
    ends, open_braces = {}, []
    for place, character in enumerate(text):
        if character == "{":
            open_braces.append(place)
        elif character == "}" and open_braces:
            ends[open_braces.pop()] = place
    return ends
