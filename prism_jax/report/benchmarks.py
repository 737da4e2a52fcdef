"""The page about a suite of benchmarks: a table of scores, and a few prompts of each."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from prism_jax.report import examples, parts

Json = Any
# `suite.json`, a line of `responses.jsonl`, and `run.json`, as far as the page reads them.
_PASS = {"num_prompts": int, "response_tokens": float, "cut": float, "accuracy": dict}
SUITE = {
    "policy": {"folder": str, "step": (int, type(None))},
    "benchmarks": {str: {str: _PASS}},
}
RESPONSE = {
    "id": str,
    "draw": str,
    "ground_truth": str,
    "response": str,
    "reason": str,
    "ended": bool,
    "benchmark?": {"read": str, "how": str},
    "judged?": {"accuracy": float, "question": (str, type(None)), "reply": str},
}
IDENTITY = {"config": {"prompts": {"path": str}}}
_HOW = {
    "exact": "read exactly",
    "loose": "the nearest that fits",
    "guess": "guessed, as published",
    "none": "no answer found",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt and the first response to it."""

    line: Mapping[str, Json]  # of `responses.jsonl`
    question: str | None  # None: the data set is gone
    pictures: Sequence[examples.Picture]


def build(
    suite: Mapping[str, Json],
    scores: Sequence[Sequence[str]],
    shown: Mapping[str, Sequence[Example]],
    *,
    title: str,
) -> str:
    """Return the page.

    Args:
      suite: the content of `suite.json`.
      scores: rows of benchmark, number of prompts or groups, score, by rules, with a judge.
      shown: prompts by benchmark.
    """
    name = examples.clean(title)
    policy = suite["policy"]
    step = "" if policy["step"] is None else f", step {policy['step']}"
    lead = f"Policy {examples.clean(policy['folder'])}{step}. Intervals of 95\u00a0%."
    body = f'<header><h1>{name}</h1><p class="note">{lead}</p></header>'
    head = ("benchmark", "prompts or groups", "score", "by rules", "with a judge")
    rows = [[examples.clean(cell) for cell in row] for row in scores]
    body += f"<section><h2>Scores</h2>{parts.table(head, rows)}{_lengths(suite)}</section>"
    for benchmark, given in shown.items():
        articles = "".join(map(_example, given))
        note = '<p class="note">The first prompts, not chosen by hand.</p>' if given else ""
        body += f"<section><h2>{examples.clean(benchmark)}</h2>{note}{articles}</section>"
    return parts.document(name, body)


def _lengths(suite: Mapping[str, Json]) -> str:
    """Return a table of how long responses are and how many were cut."""
    rows = [
        (
            examples.clean(f"{name}, {draw}"),
            f"{values['response_tokens']:.0f}",
            parts.percent(values["cut"]),
        )
        for name, passes in suite["benchmarks"].items()
        for draw, values in passes.items()
    ]
    return parts.table(("benchmark", "tokens of a response", "cut by the limit"), rows)


def _example(example: Example) -> str:
    line = example.line
    question = "the question is not there any more"
    if example.question is not None:
        question = example.question
    reading = line.get("benchmark")
    read = "" if reading is None else f"<p>Read: <b>{examples.clean(reading['read'])}</b> "
    read += (
        "" if reading is None else f'<span class="note">{_HOW.get(reading["how"], "")}</span></p>'
    )
    return (
        '<article class="card example"><div class="question">'
        f"{examples.pictures(example.pictures, about=question)}<div>"
        f"<h3>{examples.clean(question)}</h3>"
        f"<p>Answer: <b>{examples.clean(line['ground_truth'])}</b></p>{read}</div></div>"
        f"{_response(line)}</article>"
    )


def _response(line: Mapping[str, Json]) -> str:
    is_right = line["reason"] == "correct"
    verdicts = [_verdict(f"rules: {'right' if is_right else 'wrong'}", is_right)]
    judged = line.get("judged")
    if judged is not None:
        is_right = judged["accuracy"] == 1.0
        reply = f" ({judged['reply'].strip()[:40]})" if judged["question"] is not None else ""
        verdicts.append(_verdict(f"judge: {'right' if is_right else 'wrong'}{reply}", is_right))
    cut = "" if line["ended"] else ' <span class="note">cut by the limit of tokens</span>'
    return (
        f'<section class="response"><h4>{" ".join(verdicts)}</h4>{cut}'
        f'<pre tabindex="0" aria-label="response">{examples.coloured(line["response"])}</pre>'
        "</section>"
    )


def _verdict(text: str, is_good: bool) -> str:
    return f'<span class="verdict {"good" if is_good else "bad"}">{examples.clean(text)}</span>'
