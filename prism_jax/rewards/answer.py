"""Judge whether an answer means the same as the ground truth.

The rules classify a text as its most plausible kind: an option letter, a list or tuple, a set of
numbers, a time, a quantity with a unit, an equation, a phrase. If both sides are of the same kind,
the rules of that kind decide. If two readings are possible and one of them is wrong, the answer is
wrong. Two mathematical expressions that no rule can read go to math-verify, the only expensive
step, which is passed in as `mathematics`.

`docs/judge.md` gives the rules with examples. Texts are limited to `MAX_CHARS` before they are
read, and the cost of the rules is nearly linear in their length.
Source: PRISM verl/verl/utils/reward_score/mm_gad_no_llm.py:361 (1024 characters).
"""

import json
import re

from prism_jax.rewards import answer_official, choices, compare, notation, phrases, sentences, tags

MAX_CHARS = 1024


def is_correct(answer: str, truth: str, mathematics: answer_official.Mathematics) -> bool:
    """Judge an answer against a ground truth; a text longer than `MAX_CHARS` is wrong.

    Exceptions of `mathematics` pass through, so that the fast rules can be run alone.
    """
    if max(len(answer), len(truth)) > MAX_CHARS or any(tag in answer for tag in tags.TAGS):
        return False
    given, wanted = notation.clean(answer), notation.clean(_unpacked(truth))
    if not given or not wanted or max(len(given), len(wanted)) > MAX_CHARS:
        return False
    if given == wanted or answer.strip() == truth.strip():
        return True
    givens, wanteds = _forms(given), _forms(wanted)
    comparison = compare.Comparison(mathematics)
    by_options = _same_options(givens, wanteds, comparison)
    if by_options is not None:
        return by_options
    options = [choices.truth(form.value)[1] for form in wanteds]
    wanteds = [
        sentences.Stated("", notation.clean(option)) if option else form
        for form, option in zip(wanteds, options, strict=True)
    ]
    for wanted_form in wanteds:
        for given_form in givens:
            if _about_the_same(given_form, wanted_form) and comparison.same(
                given_form.value, wanted_form.value
            ):
                return True
    for wanted_form in wanteds:
        once, again = sentences.said_twice(wanted_form.value) or ("", "")
        if comparison.same(again, once) and comparison.same(givens[-1].value, once):
            return True
    twice = sentences.said_twice(givens[-1].value)
    return twice is not None and any(
        all(comparison.same(value, wanted_form.value) for value in twice)
        for wanted_form in wanteds
        if _about_the_same(givens[-1], wanted_form)
    )


def _forms(text: str) -> list[sentences.Stated]:
    """Return the text itself, and the value that it states if it is a sentence."""
    stated = sentences.stated(text)
    return [sentences.Stated("", text)] + ([stated] if stated else [])


def _about_the_same(given: sentences.Stated, wanted: sentences.Stated) -> bool:
    return not given.subject or not wanted.subject or phrases.same(given.subject, wanted.subject)


def _same_options(
    givens: list[sentences.Stated], wanteds: list[sentences.Stated], comparison: compare.Comparison
) -> bool | None:
    """Compare option letters; None if the truth has none, or the answer may be an option's text.

    Where both sides give the text of the option too, it must not be another one's.
    """
    for wanted in wanteds:
        several = choices.letters(wanted.value)
        if len(several) > 1 and any(several == choices.letters(one.value) for one in givens):
            return True
    for wanted in wanteds:
        letter, option = choices.truth(wanted.value)
        if not letter:
            continue
        if letter == "I" and any(choices.is_statement(one.value, letter) for one in givens):
            return True
        named = [(choices.letter(one.value), one.value) for one in givens]
        given_letter, value = next((pair for pair in named if pair[0]), ("", ""))
        if given_letter == letter and option:
            text = notation.clean(choices.remark(value))
            return not comparison.contradicts(text, notation.clean(option))
        return given_letter == letter if given_letter or not option else None
    return None


def check_ground_truth(text: str) -> str | None:
    """Return why a ground truth cannot be judged against, None if it can.

    For dataset builds, which report a bad row with its position.
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
    """Return whether a text is a JSON object or a list of quoted texts, which no answer is."""
    text = text.strip()
    if re.fullmatch(r"\[\s*(['\"]).*\1\s*\]", text, re.DOTALL):
        return True
    if not re.match(r"\{\s*['\"]", text):
        return False
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return bool(re.match(r"\{\s*(['\"])[^'\"]*\1\s*:", text))
