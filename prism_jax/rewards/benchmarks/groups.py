"""Scores of questions that belong together: We-Math's steps, HallusionBench's figures and pairs.

Each is a mean over groups of a credit from 0 to 1, so that it has an interval. A group counts only
if all its questions were answered.

Source: PRISM scripts/eval/tasks/wemath/wemath_utils.py, hallusion_bench/utils.py.
"""

import collections
from collections.abc import Mapping, Sequence

Group = Mapping[str, str]
# Scores by name: the credit of each group.
Scores = dict[str, list[float]]

_MULTI = "multi"


def scores(name: str, questions: Sequence[tuple[Group, bool]]) -> Scores:
    """Return the group scores of a benchmark from each question's group and whether it is right."""
    if name == "wemath":
        return _wemath(questions)
    if name == "hallusion":
        return _hallusion(questions)
    return {}


def wemath_keys(key: str) -> tuple[str, ...]:
    """Return the keys of all questions of the problem that `2steps_1` and the like belong to.

    Raises:
      ValueError: there is no such key.
    """
    steps, _, part = key.partition("steps_")
    if steps not in ("2", "3") or part not in (*"123"[: int(steps)], _MULTI):
        raise ValueError(key)
    return tuple(f"{steps}steps_{number}" for number in (*"123"[: int(steps)], _MULTI))


def wemath_problem(group: Group) -> tuple[str, str]:
    """Return the key of a problem: problems of two and of three steps are numbered apart."""
    return group["problem"], group["key"].partition("_")[0]


def _wemath(questions: Sequence[tuple[Group, bool]]) -> Scores:
    """Return the two scores and the shares of the four dimensions.

    Of a problem and its steps, each a question:

      problem  steps       strict                    loose
      right    all right   complete mastery (1)      complete mastery (1)
      right    some wrong  rote memorization (0)     complete mastery (1)
      right    all wrong   rote memorization (0)     rote memorization (0)
      wrong    all right   inadequate generalization (0.5)
      wrong    some wrong  insufficient knowledge (0)
    """
    problems: dict[tuple[str, str], dict[str, bool]] = collections.defaultdict(dict)
    for group, is_right in questions:
        problems[wemath_problem(group)][group["key"]] = is_right
    scores_by_name: Scores = collections.defaultdict(list)
    for answers in problems.values():
        keys = wemath_keys(next(iter(answers)))
        if answers.keys() != set(keys):
            continue
        *steps, whole = (answers[key] for key in keys)
        generalizes = not (all(steps) and not whole)
        scores_by_name["insufficient_knowledge"].append(float(not whole and not all(steps)))
        scores_by_name["inadequate_generalization"].append(float(not generalizes))
        for kind, knows in (("strict", all(steps)), ("loose", any(steps))):
            scores_by_name[f"score_{kind}"].append(float(whole and knows) + 0.5 * (not generalizes))
            scores_by_name[f"complete_mastery_{kind}"].append(float(whole and knows))
            if whole:  # the published share is of the problems that are right
                scores_by_name[f"rote_memorization_{kind}"].append(float(not knows))
    return dict(scores_by_name)


def _hallusion(questions: Sequence[tuple[Group, bool]]) -> Scores:
    """Return the shares of right answers, of figures and of questions that are right throughout."""
    figures: dict[tuple[str, ...], list[bool]] = collections.defaultdict(list)
    pairs: dict[tuple[str, ...], list[bool]] = collections.defaultdict(list)
    for group, is_right in questions:
        start = group["category"], group["subcategory"], group["set"]
        pairs[*start, group["question"]].append(is_right)
        # Without a figure there is nothing to be consistent about.
        if not has_no_figure(group):
            figures[*start, group["figure"]].append(is_right)
    parts = {
        "aAcc": [float(is_right) for _, is_right in questions],
        "fAcc": [float(all(answers)) for answers in figures.values()],
        "qAcc": [float(all(answers)) for answers in pairs.values()],
    }
    return {name: values for name, values in parts.items() if values}


def has_no_figure(group: Group) -> bool:
    """Return whether a question is asked without its figure; then "unclear" is right."""
    return group["category"] == "VS" and group["figure"] == "0"
