"""Two published ways to find the letter that a response chooses among its options."""

import hashlib
import re
from collections.abc import Sequence

from prism_jax.rewards.benchmarks import reading

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ENDS = ",.!?;:'"
_FEW_WORDS = 5


def choose(response: str, choices: Sequence[str], *, seed: str) -> tuple[str, reading.How]:
    """Return the letter by the rule of MMMU, and whether it was read or guessed.

    `(B)` wins over `B `, that over `B.`, and all of them over the text of an option, which counts
    in responses of more than five words. Of several candidates the one that stands last is taken.
    Where there is none, the published rule draws an option. The draw here follows from `seed` and
    the response, so that it is the same in every run.

    Source: lmms_eval/tasks/_task_utils/mmmu_mcq_utils.py.
    """
    for character in _ENDS:
        response = response.strip(character)
    text = f" {response} "
    letters = ALPHABET[: len(choices)]
    forms = (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} "))
    for form, place in forms:
        named = [letter for letter in letters if form.format(letter) in text]
        if named:
            return _last(named, [text.rfind(place.format(letter)) for letter in named]), "exact"
    if len(text.split()) > _FEW_WORDS:
        low = text.lower()
        options = dict(zip(letters, (choice.lower() for choice in choices), strict=True))
        named = [letter for letter, option in options.items() if option in low]
        if named:
            return _last(named, [low.rfind(options[letter]) for letter in named]), "loose"
    hashed = hashlib.sha256(f"{seed}\0{response}".encode("utf-8", "replace")).digest()
    return letters[int.from_bytes(hashed[:8]) % len(letters)], "guess"


def _last(named: Sequence[str], places: Sequence[int]) -> str:
    return named[places.index(max(places))] if len(named) > 1 else named[0]


# Phrases after which any letter counts.
_PHRASES = (
    *(
        f"{the}{kind}answer{verb}"
        for the in ("the ", "")
        for kind in ("", "correct ", "best ")
        for verb in (" is", "")
    ),
    *(
        f"{the}{kind}{noun} is"
        for the in ("the ", "")
        for kind in ("", "correct ")
        for noun in ("option", "choice")
    ),
    *("i choose", "i select", "i pick", "my answer is", "my choice is"),
)
_RELAXED = "ABCDEFGH"
_AFTER = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2), ("{}-", 1), ("{}_", 1))


def relaxed(response: str) -> str:
    """Return the letter from A to H by the rule of lmms-eval's reasoning tasks, "" without one.

    A letter at the beginning wins over one at the end, that over `1. A`, a letter after a phrase
    such as `the answer is`, `(A)`, `A.`, `A:`, `A)`, `A ` and a few more, and those over a letter
    anywhere. Within a form the first in the text wins, where a form counts by its last place.

    Source: lmms_eval/tasks/_task_utils/reasoning_utils.py `parse_mcq`.
    """
    text = response.strip()
    for character in (*_ENDS, '"'):
        text = text.strip(character)
    if not text.strip():
        return ""
    padded = f" {text} "
    candidates: list[tuple[int, int, str]] = []  # rank, place, letter
    for form, rank in (*_AFTER, ("{}=", 1)):
        for letter in _RELAXED:
            place = padded.rfind(form.format(letter))
            if place >= 0:
                candidates.append((rank, place, letter))
    low = padded.lower()
    for phrase in _PHRASES:
        start = low.find(phrase)
        if start >= 0:
            places = ((padded.find(letter, start), letter) for letter in _RELAXED)
            candidates += [(7, place, letter) for place, letter in places if place >= 0]
    inner = padded.strip()
    candidates += [(10, 0, letter) for letter in _RELAXED if inner.startswith(letter)]
    candidates += [(9, len(padded) - 1, letter) for letter in _RELAXED if inner.endswith(letter)]
    for number, letter in enumerate(_RELAXED, start=1):
        place = padded.rfind(f"{number}. {letter}")
        if place >= 0:
            candidates.append((8, place, letter))
    if not candidates:
        places = ((padded.rfind(letter), letter) for letter in _RELAXED)
        candidates = [(0, place, letter) for place, letter in places if place >= 0]
    if not candidates:
        return ""
    return max(candidates, key=lambda candidate: (candidate[0], -candidate[1]))[2]


def of_options(text: str) -> str | None:
    """Return the upper-case letter of the first `(b)` in a text, None without one."""
    match = re.search(r"\(([a-zA-Z])\)", text)
    return None if match is None else match.group(1).upper()
