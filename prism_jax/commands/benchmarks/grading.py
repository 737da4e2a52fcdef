"""Grade the responses to a benchmark by the rules of its scorer."""

from collections.abc import Mapping, Sequence
from typing import Any

from prism_jax import errors
from prism_jax.data import records
from prism_jax.rewards import score, tags
from prism_jax.rewards.benchmarks import facts as facts_lib
from prism_jax.rewards.benchmarks import reading, rules
from prism_jax.setup import judging

Json = Any
# The part of a record about its benchmark, as a resumed job reads it.
RECORD = {
    "name": str,
    "protocol": str,
    "read": str,
    "how": frozenset(("exact", "loose", "guess", "none")),
    "group": {str: str},
}


def facts_of(rows: Sequence[records.PromptRow]) -> list[facts_lib.Facts] | None:
    """Return the facts of rows of a benchmark, None if they are of none.

    Raises:
      InputError: only some of the rows are of a benchmark.
    """
    facts = [facts_lib.read(row.extra_info, place=f"row {row.id}") for row in rows]
    if all(one is None for one in facts):
        return None
    for row, one in zip(rows, facts, strict=True):
        if one is None:
            raise errors.InputError(f"row {row.id} is of no benchmark, as others of its data are")
    return facts


def grade(
    facts: Sequence[facts_lib.Facts],
    responses: Sequence[tags.Segments],
    judge: judging.SharedJudge,
    *,
    accuracy_weight: float,
    format_weight: float,
) -> list[tuple[score.Reward, dict[str, Json]]]:
    """Return each response's reward by the rules, and what its record says about the benchmark.

    A response needs no format: its reward weighs the accuracy and the format as training does.
    """
    readings = [
        rules.read(one, response.text) for one, response in zip(facts, responses, strict=True)
    ]
    open_ones = [one for one in readings if one.is_right is None]
    verdicts = iter(judge.verdicts([_question(one) for one in open_ones]))
    graded = []
    for one, read, response in zip(facts, readings, responses, strict=True):
        reason = next(verdicts) if read.is_right is None else _reason(read)
        accuracy = float(reason is score.Reason.CORRECT)
        reward = score.Reward(
            total=accuracy_weight * accuracy + format_weight * response.format_ok,
            accuracy=accuracy,
            format=float(response.format_ok),
            reason=reason,
        )
        graded.append((reward, _record(one, read)))
    return graded


def _question(read: reading.Reading) -> score.Question:
    return score.Question(
        answer=read.answer,
        ground_truth=read.truths[0],
        equivalent_answers=read.truths[1:],
        data_source="",
        judge="rounded",
    )


def _reason(read: reading.Reading) -> score.Reason:
    if read.is_right:
        return score.Reason.CORRECT
    return score.Reason.NO_ANSWER if read.how == "none" else score.Reason.WRONG


def _record(facts: facts_lib.Facts, read: reading.Reading) -> dict[str, Json]:
    return {
        "name": facts.name,
        "protocol": facts.protocol,
        "read": read.answer,
        "how": read.how,
        "group": dict(facts.group),
    }


def reading_of(record: Mapping[str, Json]) -> reading.Reading:
    """Return the reading that a record keeps."""
    read = record["benchmark"]
    return reading.Reading(answer=read["read"], is_right=record["accuracy"] == 1.0, how=read["how"])
