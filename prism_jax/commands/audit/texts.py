"""Texts of rows: the question without its form, the responses, and whether they were cut."""

import hashlib
import re
import unicodedata

from prism_jax.data import records
from prism_jax.rewards import tags

_TAGS = ("caption", "think", "answer")
# Words and marks after which no text ends.
_MIDDLE = re.compile(r"(?:[,;(\[{=+]|\b(?:the|an|and|or|of|to|is|are|was|with|that|in|by|for))\Z")
# Last characters of texts that are complete.
_ENDS = tuple(".!?>)]}\"'”’»…。！？）」$%*`|")
_BOXED = re.compile(r"\\boxed\s*\{")


def question(row: records.Row) -> str:
    """Return the text of the user's turns without marks of pictures."""
    if isinstance(row, records.PairRow):
        turns = [row.prompt]
    else:
        messages = row.messages if isinstance(row, records.SFTRow) else row.prompt
        turns = [turn.content for turn in messages if turn.role == "user"]
    return records.without_marks("\n".join(turns)).strip()


def question_key(text: str) -> bytes:
    """Return 16 bytes that two questions share when they differ in case, space and marks alone."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(character for character in plain if character.isalnum() or character in "+-<>=")
    return hashlib.sha256(words.encode()).digest()[:16]


def responses(row: records.Row) -> dict[str, str]:
    """Return the texts that are learned from, by name."""
    if isinstance(row, records.SFTRow):
        learned = [t.content for t in row.messages if t.role == "assistant" and t.is_learned]
        if len(learned) == 1:
            return {"response": learned[0]}
        return {f"response {number}": text for number, text in enumerate(learned, start=1)}
    if isinstance(row, records.PairRow):
        return {name: text for name, text in records.get_segments(row).items() if text is not None}
    if row.teacher_caption is not None and row.teacher_cot is not None:
        return {"teacher_caption": row.teacher_caption, "teacher_cot": row.teacher_cot}
    return {} if row.teacher_response is None else {"teacher_response": row.teacher_response}


def whole_response(row: records.Row) -> str | None:
    """Return the text whose format and answer count, None without one."""
    given = responses(row)
    if isinstance(row, records.PromptRow):
        # The released files hold the parts beside the whole text, which may have no tags.
        if row.teacher_caption is not None and row.teacher_cot is not None:
            parts = row.teacher_caption, row.teacher_cot
            joined = parts[0] + parts[1]
            return joined if tags.format_ok(joined, gate="strict") else row.teacher_response
        return row.teacher_response
    if isinstance(row, records.SFTRow):
        return list(given.values())[-1]
    return given.get("teacher_response")


def cut_reason(text: str) -> str | None:
    """Return why a text looks cut, None if it does not."""
    for tag in _TAGS:
        if text.count(f"<{tag}>") > text.count(f"</{tag}>"):
            return f"<{tag}> is not closed"
    if text.count("```") % 2:
        return "a block of code is not closed"
    for match in _BOXED.finditer(text):
        if not _is_closed(text, match.end()):
            return "\\boxed{ is not closed"
    if _MIDDLE.search(text.rstrip()):
        return "it ends in the middle of a sentence"
    return None


def is_ended(text: str) -> bool:
    """Return whether the last character may end a text."""
    return text.rstrip().endswith(_ENDS)


def _is_closed(text: str, start: int) -> bool:
    """Return whether the brace that was opened before `start` is closed."""
    depth = 1
    for character in text[start:]:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return True
    return False
