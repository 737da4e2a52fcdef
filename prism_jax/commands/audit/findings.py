"""What is wrong with rows: cut texts, repetitions, answers that earn nothing, leaks."""

import collections
import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence

from prism_jax.commands.audit import pictures
from prism_jax.commands.audit.survey import Facts
from prism_jax.rewards import answer, score

# A response as the strict format wants it, around a ground truth.
_RESPONSE = "<caption>a</caption><think>b</think><answer>{}</answer>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """Rows with the same problem."""

    name: str
    meaning: str
    rows: tuple[Facts, ...]
    details: tuple[str, ...]  # one a row


Grade = Callable[[Sequence[score.Task]], list[score.Reward]]


def find(
    rows: Sequence[Facts], tests: Sequence[tuple[str, Sequence[Facts]]], grade: Grade | None
) -> tuple[list[Finding], list[bool]]:
    """Return all findings, also those without rows, and whether each teacher's answer is right.

    Args:
      tests: test sets by name.
      grade: the judge; None: rows have no truths.
    """
    findings = [cut(rows), at_limit(rows), *repeated(rows)]
    verdicts: list[bool] = []
    if grade is not None:
        findings.append(not_earned(rows, grade))
        verdicts = teachers_right(rows, grade)
    for name, others in tests:
        findings += leaks(rows, name, others)
    return [one for one in findings if one is not None], verdicts


def cut(rows: Sequence[Facts]) -> Finding:
    """Return rows with responses that look cut."""
    meaning = "A response that is learned from, or is compared with, seems to end too early."
    return _finding("cut response", meaning, ((row, "; ".join(row.cut)) for row in rows if row.cut))


def at_limit(rows: Sequence[Facts]) -> Finding | None:
    """Return rows whose responses have the greatest length of all and no end.

    Three of them, and half of all responses of that length, show a limit. None without lengths in
    tokens.
    """
    most = max((length for row in rows for length in row.response_tokens), default=None)
    if most is None:
        return None
    at_most = [
        (row, has_end)
        for row in rows
        for length, has_end in zip(row.response_tokens, row.has_end, strict=True)
        if length == most
    ]
    limited = [(row, f"{most} tokens") for row, has_end in at_most if not has_end]
    if len(limited) < max(3, len(at_most) / 2):
        limited = []
    meaning = "Responses of the greatest length stop without an end: a limit may have cut them."
    return _finding("response at a limit", meaning, limited)


def repeated(rows: Sequence[Facts]) -> list[Finding]:
    """Return rows with the question and the pictures of an earlier row, and those that disagree."""

    def key(row: Facts) -> Hashable:
        return row.question, tuple(seen.pixels for seen in row.pictures)

    groups = [group for group in _groups(rows, key).values() if len(group) > 1]
    again = [(row, f"as {group[0].id}") for group in groups for row in group[1:]]
    other = [
        (row, f"{row.truth} here, {group[0].truth} in {group[0].id}")
        for group in groups
        for row in group[1:]
        if row.truth is not None and row.truth != group[0].truth
    ]
    meaning = "The same question about the same pictures as in an earlier row."
    conflict = "The same question about the same pictures has another ground truth."
    return [
        _finding("repeated prompt", meaning, again),
        _finding("two truths", conflict, other),
    ]


def not_earned(rows: Sequence[Facts], grade: Grade) -> Finding:
    """Return rows whose ground truth, given as the answer, is not judged right."""
    with_truth = [row for row in rows if row.truth is not None]
    keys = dict.fromkeys((row.truth, row.equivalents, row.data_source) for row in with_truth)
    tasks = [_task(_RESPONSE.format(key[0]), key) for key in keys]
    reasons = {
        key: answer.check_ground_truth(key[0])
        or (None if reward.accuracy == 1 else f"the judge's reason is {reward.reason.value}")
        for key, reward in zip(keys, grade(tasks), strict=True)
    }
    wrong = []
    for row in with_truth:
        reason = reasons[row.truth, row.equivalents, row.data_source]
        if reason is not None:
            wrong.append((row, reason))
    meaning = "The judge does not accept the ground truth as an answer: nothing can earn it."
    return _finding("answer that cannot be earned", meaning, wrong)


def teachers_right(rows: Sequence[Facts], grade: Grade) -> list[bool]:
    """Return whether each teacher's answer is right, of rows with a truth and an answer."""
    tasks = [
        _task(_RESPONSE.format(row.answer), (row.truth, row.equivalents, row.data_source))
        for row in rows
        if row.truth is not None and row.answer is not None
    ]
    return [reward.accuracy == 1 for reward in grade(tasks)]


def leaks(rows: Sequence[Facts], name: str, others: Sequence[Facts]) -> list[Finding]:
    """Return rows that a test set has as well, by picture and question, picture, or question."""
    by_pixels = collections.defaultdict(list)
    by_question = collections.defaultdict(list)
    for row in others:
        by_question[row.question].append(row)
        for seen in row.pictures:
            by_pixels[seen.pixels].append(row)
            by_pixels[seen.file].append(row)
    look = _looking_alike(rows, others)
    both, picture, similar, text = [], [], [], []
    for row in rows:
        same = [o for s in row.pictures for k in (s.pixels, s.file) for o in by_pixels.get(k, ())]
        same_text = by_question.get(row.question, [])
        near = [o for seen in row.pictures for o in look.get(seen.pixels, ())]
        with_both = [o for o in [*same, *near] if o.question == row.question]
        if not row.pictures:
            # Without a picture the question is all there is.
            with_both = [o for o in same_text if not o.pictures]
        for matches, target in (
            (with_both, both),
            (same, picture),
            (near, similar),
            (same_text, text),
        ):
            if matches:
                target.append((row, f"row {matches[0].id} of {name}"))
                break
    return [
        _finding(f"test row in {name}", "Picture and question are those of a test row.", both),
        _finding(f"test picture in {name}", "A test row has the same picture.", picture),
        _finding(f"look-alike in {name}", "A test row has a picture that looks the same.", similar),
        _finding(f"test question in {name}", "A test row asks it about another picture.", text),
    ]


def _looking_alike(rows: Sequence[Facts], others: Sequence[Facts]) -> dict[bytes, list[Facts]]:
    """Return the rows of the other set by the pixels of a picture here that looks like theirs."""
    here = list({seen.pixels: seen for row in rows for seen in row.pictures}.values())
    there, of_rows = {}, collections.defaultdict(list)
    for row in others:
        for seen in row.pictures:
            there[seen.pixels] = seen
            of_rows[seen.pixels].append(row)
    their = list(there.values())
    look = collections.defaultdict(list)
    for i, j in pictures.alike(here, their):
        look[here[i].pixels] += of_rows[their[j].pixels]
    return look


def _task(response: str, key: tuple[str, tuple[str, ...], str]) -> score.Task:
    truth, equivalents, data_source = key
    return score.Task(
        response=response,
        ended=True,
        ground_truth=truth,
        equivalent_answers=equivalents,
        data_source=data_source,
    )


def _groups(rows: Iterable[Facts], key: Callable[[Facts], Hashable]) -> dict[Hashable, list[Facts]]:
    groups = collections.defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return groups


def _finding(name: str, meaning: str, pairs: Iterable[tuple[Facts, str]]) -> Finding:
    pairs = list(pairs)
    return Finding(
        name=name,
        meaning=meaning,
        rows=tuple(row for row, _ in pairs),
        details=tuple(detail for _, detail in pairs),
    )
