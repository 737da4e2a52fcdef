"""Write the results in docs/science.md, and its curves, from the committed records of campaigns.

    python -m benchmarks.campaign_page            (write them)
    python -m benchmarks.campaign_page --check    (exit 1 where they are not what the records say)

The records are benchmarks/results/*_campaign_*.json, from `benchmarks.campaign --record=FILE`.
"""

import argparse
import html
import json
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from prism_jax import intervals
from prism_jax.report import parts, plots, results

Json = Any
_ROOT = pathlib.Path(__file__).resolve().parent.parent
_PAGE, _CURVES = _ROOT / "docs" / "science.md", _ROOT / "docs" / "science_curves.html"
START = "<!-- Made by python -m benchmarks.campaign_page -->"
END = "<!-- End -->"
_LEAST_SEEDS = 5
_SKILLS = {"n": "neither", "p": "perception", "r": "reasoning", "b": "either"}
_NINE = "9"


def comparisons(policies: dict[str, Json]) -> list[tuple[str, str]]:
    """Return the pairs of policies whose difference, first minus second, is of interest."""
    pairs = [
        ("sft_grpo", "sft"),
        ("prism", "sft"),
        ("prism_grpo", "prism"),
        ("prism_grpo", "sft_grpo"),
        ("prism_dapo", "sft_dapo"),
        ("prism_gspo", "sft_gspo"),
        ("prism_grpo", "sft_grpo_longer"),
        ("prism", "more_sft"),
        ("prism_grpo", "more_sft_grpo"),
        ("adversary_grpo", "sft_grpo"),
    ]
    for name, policy in policies.items():
        if policy["group"] in ("ablations", "options"):
            pairs.append((name, "prism_grpo" if name.endswith("_grpo") else "prism"))
    return pairs


def right(record: Json, name: str) -> dict[str, list[int]]:
    """Return for each seed in which a policy was evaluated 1 or 0 a prompt."""
    return {
        seed: [int(digit) for digit in found["policies"][name]["right"]]
        for seed, found in record["seeds"].items()
        if name in found["policies"]
    }


def difference(record: Json, first: str, second: str) -> Json | None:
    """Return first minus second in the seeds that have both; None: no seed has.

    Returns:
      by_seed: differences of the shares of right answers; seeds, prompts: their intervals.
    """
    firsts, seconds = right(record, first), right(record, second)
    paired = {
        seed: [a - b for a, b in zip(firsts[seed], seconds[seed], strict=True)]
        for seed in firsts
        if seed in seconds
    }
    if not paired:
        return None
    by_seed = {seed: statistics.fmean(values) for seed, values in paired.items()}
    return {
        "by_seed": by_seed,
        "seeds": intervals.over_seeds(list(by_seed.values())),
        "prompts": intervals.over_prompts(list(paired.values())),
    }


def is_shown(found: Json) -> bool:
    """Return whether enough seeds ran and their interval excludes 0."""
    mean = found["seeds"]
    return len(found["by_seed"]) >= _LEAST_SEEDS and (mean.low > 0 or mean.high < 0)


def render(record: Json, name: str) -> str:
    """Return the tables of a campaign."""
    seeds = ", ".join(record["seeds"])
    head = [
        f"### `{record['size']}`, seeds {seeds}",
        "",
        f"{record['where']}. JAX {record['versions']['jax']}; [record](../benchmarks/results/"
        f"{name}). Percent; a policy that is missing was not run."
        + (f" [Gaps in alignment]({_CURVES.name})." if _has_curves(record) else ""),
    ]
    return "\n".join(
        [*head, "", *_policies(record), "", *_differences(record), "", *_costs(record), ""]
    )


def _policies(record: Json) -> list[str]:
    columns = ("policy", "seeds", "right", *_SKILLS.values(), "9 read", "format", "tokens", "RL")
    lines = [_row(columns), _row(["---"] * len(columns))]
    for name, policy in record["policies"].items():
        by_seed = right(record, name)
        if not by_seed:
            continue
        found = [record["seeds"][seed]["policies"][name] for seed in by_seed]
        means = [statistics.fmean(values) for values in by_seed.values()]
        nines = [one["digits_right"][_NINE] for one in found if _NINE in one["digits_right"]]
        lines.append(
            _row(
                [
                    policy["title"],
                    str(len(by_seed)),
                    _points(intervals.over_seeds(means), sign=""),
                    *(_share(record, by_seed, letter) for letter in _SKILLS),
                    f"{100 * statistics.fmean(nines):.0f}" if nines else "–",
                    f"{100 * statistics.fmean(one['format_valid'] for one in found):.0f}",
                    f"{statistics.fmean(one['response_tokens'] for one in found):.0f}",
                    _sampled(found),
                ]
            )
        )
    return lines


def _share(record: Json, by_seed: dict[str, list[int]], letter: str) -> str:
    """Return the share of right answers among the prompts of a kind, over all seeds."""
    values = [
        value
        for seed, answers in by_seed.items()
        for value, kind in zip(answers, record["seeds"][seed]["skills"], strict=True)
        if kind == letter
    ]
    return f"{100 * statistics.fmean(values):.0f}" if values else "–"


def _sampled(found: Sequence[Json]) -> str:
    numbers = sorted({one.get("responses_sampled", 0) for one in found})
    return "–" if numbers == [0] else " to ".join(map(str, numbers))


def _differences(record: Json) -> list[str]:
    columns = ("difference", "seed by seed", "mean, over seeds", "over prompts", "shown")
    lines = [_row(columns), _row(["---"] * len(columns))]
    titles = {name: policy["title"] for name, policy in record["policies"].items()}
    for first, second in comparisons(record["policies"]):
        found = difference(record, first, second)
        if found is None:
            continue
        prompts = found["prompts"]
        lines.append(
            _row(
                [
                    f"{titles[first]} − {titles[second]}",
                    ", ".join(f"{100 * value:+.1f}" for value in found["by_seed"].values()),
                    _points(found["seeds"], sign="+"),
                    f"[{100 * prompts.low:+.1f}, {100 * prompts.high:+.1f}]",
                    "yes" if is_shown(found) else "no",
                ]
            )
        )
    return lines


def _costs(record: Json) -> list[str]:
    """Return the wall seconds of the steps that train or sample, means over seeds."""
    seconds: dict[str, list[float]] = {}
    for found in record["seeds"].values():
        for step, value in found["seconds"].items():
            seconds.setdefault(step, []).append(value)
    trained = {step: values for step, values in seconds.items() if step[:9] != "evaluate_"}
    cells = (f"{step} {statistics.fmean(values):.0f}" for step, values in sorted(trained.items()))
    return [f"Wall seconds a step, means over seeds: {', '.join(cells)}."]


def _points(mean: intervals.Mean, *, sign: str) -> str:
    text = f"{100 * mean.mean:{sign}.1f}"
    if mean.low is None or mean.high is None:
        return text
    return f"{text} [{100 * mean.low:{sign}.1f}, {100 * mean.high:{sign}.1f}]"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def curves(found: dict[str, Json]) -> str:
    """Return the page of both gaps over alignment, means over seeds."""
    sections = []
    for name, record in found.items():
        figures = []
        steps = sorted({step for seed in record["seeds"].values() for step in seed["curves"]})
        for step in steps:
            lines = [
                plots.Line(name=segment, curve=_mean_curve(record, step, segment), colour=colour)
                for segment, colour in (("caption", "a"), ("cot", "b"), ("response", "c"))
            ]
            measured = sum(step in seed["curves"] for seed in record["seeds"].values())
            figures.append(
                parts.lines(
                    html.escape(step),
                    f"Teacher's score minus the policy's, mean over {measured} seeds",
                    lines,
                    unit="score",
                    has_zero=True,
                    absent="not measured",
                )
            )
        sections.append(parts.section(html.escape(name), parts.row(*figures)))
    return parts.document("Gaps in alignment", "".join(sections))


def _has_curves(record: Json) -> bool:
    return any(seed["curves"] for seed in record["seeds"].values())


def _mean_curve(record: Json, step: str, segment: str) -> results.Curve:
    key = f"{segment}_gap"
    all_values = [
        seed["curves"][step][key]
        for seed in record["seeds"].values()
        if key in seed["curves"].get(step, {})
    ]
    means = [statistics.fmean(values) for values in zip(*all_values, strict=False)]
    return results.Curve(
        steps=tuple(range(1, len(means) + 1)), values=tuple(means), num_not_finite=0
    )


def pages(found: dict[str, Json], page: str) -> dict[pathlib.Path, str]:
    """Return the texts of docs/science.md and of its curves."""
    before, rest = page.split(START)
    _, after = rest.split(END)
    tables = "\n".join(render(record, name) for name, record in found.items())
    body = f"{before}{START}\n\n{tables or 'Nothing has been run yet.'}\n{END}{after}"
    return {_PAGE: body} | (
        {_CURVES: curves(found)} if any(map(_has_curves, found.values())) else {}
    )


def main(arguments: Sequence[str]) -> int:
    """Write or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 where they are not as written")
    args = parser.parse_args(arguments)
    paths = sorted((_ROOT / "benchmarks" / "results").glob("*_campaign_*.json"))
    found = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    texts = pages(found, _PAGE.read_text(encoding="utf-8"))
    if args.check:
        return int(any(not p.is_file() or p.read_text() != text for p, text in texts.items()))
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
