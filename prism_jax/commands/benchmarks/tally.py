"""The scores of a benchmark from the records of a pass, by rules and with a model's verdicts."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from prism_jax import intervals
from prism_jax.rewards.benchmarks import groups

Json = Any
# The responses to each prompt, in order.
Prompts = Sequence[Sequence[Mapping[str, Json]]]


def summary(prompts: Prompts, *, num_responses: int) -> dict[str, Json] | None:
    """Return the scores as JSON values, None for prompts of no benchmark.

    A score of groups is computed for the first response to each question, for the second, and so
    on; it is their mean. Its interval counts groups, not responses.
    """
    first = prompts[0][0]
    if first.get("benchmark") is None:
        return None
    records = [record for prompt in prompts for record in prompt]
    readings = [record["benchmark"] for record in records]
    content: dict[str, Json] = {
        "name": first["benchmark"]["name"],
        "protocol": first["benchmark"]["protocol"],
        "guessed": sum(one["how"] == "guess" for one in readings) / len(readings),
        "unread": sum(one["how"] == "none" for one in readings) / len(readings),
        "rules": _scores(prompts, num_responses, verdicts=lambda record: record["accuracy"]),
        "judged": None,
    }
    if first.get("judged") is not None:
        verdicts = [record["judged"] for record in records]
        content["judged"] = _scores(
            prompts, num_responses, verdicts=lambda record: record["judged"]["accuracy"]
        ) | {
            "num_asked": sum(one["question"] is not None for one in verdicts),
            "num_refused": sum(one["is_refused"] for one in verdicts),
        }
    return content


def _scores(prompts: Prompts, num_responses: int, *, verdicts: Any) -> dict[str, Json]:
    accuracies = [[verdicts(record) for record in prompt] for prompt in prompts]
    means = [sum(values) / num_responses for values in accuracies]
    return {
        "accuracy": dataclasses.asdict(intervals.rate(means, num_responses=num_responses)),
        "groups": _group_scores(prompts, accuracies, num_responses),
    }


def _group_scores(
    prompts: Prompts, accuracies: Sequence[Sequence[float]], num_responses: int
) -> dict[str, Json]:
    name = prompts[0][0]["benchmark"]["name"]
    values: dict[str, list[list[float]]] = {}
    for number in range(num_responses):
        questions = [
            (prompt[number]["benchmark"]["group"], answers[number] == 1.0)
            for prompt, answers in zip(prompts, accuracies, strict=True)
        ]
        for score, credits in groups.scores(name, questions).items():
            values.setdefault(score, []).append(credits)
    return {
        score: {"num_groups": len(draws[0])} | dataclasses.asdict(_rate(draws))
        for score, draws in values.items()
    }


def _rate(draws: Sequence[Sequence[float]]) -> intervals.Rate:
    """Return the mean over draws; only groups that have a credit in a draw count in it."""
    if len({len(credits) for credits in draws}) > 1:  # a share of some of the groups
        size = max(map(len, draws))
        mean = sum(sum(credits) / len(credits) for credits in draws) / len(draws)
        return intervals.rate([mean] * size, num_responses=1)
    means = [sum(credits) / len(draws) for credits in zip(*draws, strict=True)]
    return intervals.rate(means, num_responses=len(draws))


def line(scores: Mapping[str, Json]) -> str:
    """Return the scores of a pass as the end of a line."""
    parts = []
    for name, of in (("", scores["rules"]), ("judged ", scores["judged"])):
        if of is None:
            continue
        if name:
            parts.append(f"{name}accuracy {rate(of['accuracy'])}")
        parts += [f"{name}{group} {rate(value)}" for group, value in of["groups"].items()]
    if scores["guessed"]:
        parts.append(f"{100 * scores['guessed']:.1f} % guessed")
    return "".join(f", {part}" for part in parts)


def rate(values: Mapping[str, float]) -> intervals.Rate:
    """Return a rate from its JSON values."""
    return intervals.Rate(mean=values["mean"], low=values["low"], high=values["high"])
