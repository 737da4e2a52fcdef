"""Judge whether an answer means the same as the ground truth.

The rules read a text as what it most plausibly is: an option letter, a list or tuple, a set of
numbers, a time, a quantity with a unit, an equation, a phrase. Once both sides are read as the same
kind, that kind decides. Where two readings are possible and one of them is wrong, nothing is paid.
Two mathematical expressions that no rule could read go to math-verify, which is the only expensive
step and is passed in as `mathematics`.

`docs/judge.md` gives the rules with examples. Texts are limited to `MAX_CHARS` before anything is
read, and the cost of the rules is nearly linear in them.
Source: PRISM verl/verl/utils/reward_score/mm_gad_no_llm.py:361 (1024 characters).
"""

import json
import re

from prism_jax.rewards import answer_official, choices, compare, notation, phrases, sentences, tags

MAX_CHARS = 1024


def is_correct(answer: str, truth: str, mathematics: answer_official.Mathematics) -> bool:
    """Judge one answer against one ground truth; what is longer than `MAX_CHARS` is wrong.

    Whatever `mathematics` raises passes through: that is how the fast rules are run alone.
    """
    if max(len(answer), len(truth)) > MAX_CHARS or any(tag in answer for tag in tags.TAGS):
        return False
    given, wanted = notation.clean(answer), notation.clean(_unpacked(truth))
    if not given or not wanted or max(len(given), len(wanted)) > MAX_CHARS:
        return False
    if given == wanted or answer.strip() == truth.strip():
        return True
    givens, wanteds = _forms(given), _forms(wanted)
    by_options = _same_options(givens, wanteds)
    if by_options is not None:
        return by_options
    options = [choices.truth(form.value)[1] for form in wanteds]
    wanteds = [
        sentences.Stated("", notation.clean(option)) if option else form
        for form, option in zip(wanteds, options, strict=True)
    ]
    comparison = compare.Comparison(mathematics)
    for wanted_form in wanteds:
        for given_form in givens:
            if _about_the_same(given_form, wanted_form) and comparison.same(
                given_form.value, wanted_form.value
            ):
                return True
    twice = sentences.said_twice(givens[-1].value)
    return twice is not None and any(
        all(comparison.same(one, wanted_form.value) for one in twice)
        for wanted_form in wanteds
        if _about_the_same(givens[-1], wanted_form)
    )


def _forms(text: str) -> list[sentences.Stated]:
    """Return a text as it is, and what it states if it is a sentence."""
    stated = sentences.stated(text)
    return [sentences.Stated("", text)] + ([stated] if stated else [])


def _about_the_same(given: sentences.Stated, wanted: sentences.Stated) -> bool:
    return not given.subject or not wanted.subject or phrases.same(given.subject, wanted.subject)


def _same_options(givens: list[sentences.Stated], wanteds: list[sentences.Stated]) -> bool | None:
    """Compare chosen options; None where the truth is none, or the answer may be its text."""
    for wanted in wanteds:
        several = choices.letters(wanted.value)
        if len(several) > 1 and any(several == choices.letters(one.value) for one in givens):
            return True
    for wanted in wanteds:
        letter, option = choices.truth(wanted.value)
        if letter:
            chosen = next(filter(None, (choices.letter(one.value) for one in givens)), "")
            return chosen == letter if chosen or not option else None
    return None


def check_ground_truth(text: str) -> str | None:
    """Return why a ground truth cannot be judged against, None when it can.

    Meant for dataset builds, where a bad row is reported with its place.
    """
    if not text.strip():
        return "ground truth is empty"
    if len(text) >= MAX_CHARS:
        return f"ground truth must be shorter than {MAX_CHARS} characters, has {len(text)}"
    if any(tag in text for tag in tags.TAGS):
        return "ground truth contains a tag of the response format"
    if re.search(r"[\x00-\x08\x0e-\x1f\ufffd]", text):
        return "ground truth contains control or replacement characters"
    if _is_json(_unpacked(text)):
        return "ground truth is JSON or a list of texts, not one answer"
    if not notation.clean(text):
        return "ground truth is empty without its delimiters"
    if "\\" in text and not notation.is_balanced(text):
        return "ground truth has unbalanced braces"
    return None


def _unpacked(truth: str) -> str:
    """Return the only value of a truth in JSON, `{"target": "7"}` or `["7"]`; else the text."""
    if truth.strip()[:1] not in ("{", "[") or '"' not in truth:
        return truth
    try:
        value = json.loads(truth)
    except (ValueError, RecursionError):
        return truth
    values = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(values, list) or len(values) != 1:
        return truth
    is_text = isinstance(values[0], str | int | float) and not isinstance(values[0], bool)
    return str(values[0]) if is_text else truth


def _is_json(text: str) -> bool:
    """Say whether a text is an object, or a list that holds quoted texts, as no answer does."""
    text = text.strip()
    if re.fullmatch(r"\[\s*(['\"]).*\1\s*\]", text, re.DOTALL):
        return True
    if not re.match(r"\{\s*['\"]", text):
        return False
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return bool(re.match(r"\{\s*(['\"])[^'\"]*\1\s*:", text))
