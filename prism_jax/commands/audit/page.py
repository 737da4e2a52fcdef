"""The page of an audit, one HTML file without scripts, and its numbers as JSON."""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from prism_jax import intervals
from prism_jax.commands.audit.findings import Finding
from prism_jax.commands.audit.survey import Facts, Part
from prism_jax.report import examples, parts, plots

Json = Any
_MOST_IDS = 1000
_SHARES = (0, 0.5, 0.9, 0.99, 1)
_DROPPED_SHOWN = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """A row as it is shown."""

    id: str
    question: str
    truth: str | None
    responses: dict[str, str]
    pictures: tuple[examples.Picture, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Audit:
    """All that a page shows."""

    title: str
    kind: str
    data: tuple[Part, ...]
    tests: tuple[Part, ...]
    findings: tuple[Finding, ...]
    teachers_right: tuple[bool, ...]
    has_tokens: bool

    def rows(self) -> list[Facts]:
        """Return the facts about all valid rows."""
        return [facts for part in self.data for facts in part.facts]


def summary(audit: Audit) -> dict[str, Json]:
    """Return the numbers of the page as JSON values."""
    rows = audit.rows()
    distinct = {seen.pixels: seen for row in rows for seen in row.pictures}
    formats = collections.Counter(seen.format for seen in distinct.values())
    return {
        "kind": audit.kind,
        "data": [part.report.summary() | {"path": part.name} for part in audit.data],
        "tests": [part.report.summary() | {"path": part.name} for part in audit.tests],
        "rows": len(rows),
        "rows_with_system_turn": sum(row.has_system for row in rows),
        "rows_by_pictures": _counts(len(row.pictures) for row in rows),
        "rows_by_turns": _counts(row.num_turns for row in rows),
        "lengths": {
            name: _quantiles(values) | {"sum": sum(values)}
            for name, values in lengths(audit).items()
        },
        "pictures": {
            "used": sum(len(row.pictures) for row in rows),
            "distinct": len(distinct),
            "by_format": dict(formats.most_common()),
            "longer_side_pixels": _quantiles(_sides(audit)),
            "bytes": sum(seen.num_bytes for seen in distinct.values()),
        },
        "responses": {
            "strict_format": _share([row.strict_ok for row in rows]),
            "official_format": _share([row.official_ok for row in rows]),
            "right": _share(audit.teachers_right),
        },
        "findings": {
            one.name: {
                "rows": len(one.rows),
                "ids": [row.id for row in one.rows[:_MOST_IDS]],
                "details": list(one.details[:_MOST_IDS]),
            }
            for one in audit.findings
        },
    }


def lengths(audit: Audit) -> dict[str, list[int]]:
    """Return the lengths of rows by name: in tokens where they were counted, in characters else."""
    rows = audit.rows()
    if not audit.has_tokens:
        return {
            "question_chars": [row.question_chars for row in rows],
            "response_chars": [length for row in rows for length in row.response_chars],
        }
    name = "row_tokens" if audit.kind == "sft" else "prompt_tokens"
    return {
        name: [row.tokens for row in rows],
        "response_tokens": [length for row in rows for length in row.response_tokens],
    }


def build(audit: Audit, show: Callable[[Facts], Shown], *, num_examples: int) -> str:
    """Return the page.

    Args:
      show: reads a row again.
      num_examples: rows that are shown, and rows that are shown of each finding.
    """
    name = examples.clean(audit.title)
    rows = audit.rows()
    body = "".join(
        (
            f"<header><h1>{name}</h1>{_lead(audit)}</header>",
            _tiles(audit),
            parts.section("Rows left out", _dropped([*audit.data, *audit.tests])),
            parts.section("Findings", _findings(audit, show, num_examples)),
            parts.section("Lengths and pictures", _plots(audit)),
            parts.section("Responses", _responses(audit)),
            parts.section("Rows", "".join(_article(show(r), None) for r in rows[:num_examples])),
        )
    )
    return parts.document(name, body)


def _lead(audit: Audit) -> str:
    read = "; ".join(
        f"{examples.clean(part.name)}: {part.report.num_kept:,} of {part.report.num_read:,} rows"
        for part in audit.data
    )
    tests = ", ".join(examples.clean(part.name) for part in audit.tests)
    against = f" Compared with {tests}." if tests else " Compared with no test set."
    return f'<p class="note">Rows of kind {audit.kind}. {read}.{against}</p>'


def _tiles(audit: Audit) -> str:
    wrong = sum(part.report.num_wrong for part in audit.data)
    tiles = [("rows", len(audit.rows())), ("wrong rows", wrong)]
    tiles += [(one.name, len(one.rows)) for one in audit.findings]
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="card tile"><span class="name">{examples.clean(name)}</span>'
            f"<b>{count:,}</b></div>"
            for name, count in tiles
        )
        + "</div>"
    )


def _dropped(given: Sequence[Part]) -> str:
    rows = []
    for part in given:
        for reason, count in part.report.counts().items():
            of_reason = [row for row in part.report.dropped if row.reason == reason]
            shown = "".join(
                f"<small>{examples.clean(str(row))}</small>" for row in of_reason[:_DROPPED_SHOWN]
            )
            rows.append((examples.clean(part.name), reason, f"{count:,}", shown))
    if not rows:
        return "<p>None.</p>"
    table = parts.table(("data set", "reason", "rows", "the first ones"), rows)
    return table.replace("<table>", '<table class="wrapped">', 1)


def _findings(audit: Audit, show: Callable[[Facts], Shown], num_examples: int) -> str:
    blocks = []
    for one in audit.findings:
        body = f'<p class="note">{examples.clean(one.meaning)} {len(one.rows):,} rows.</p>'
        pairs = zip(one.rows[:num_examples], one.details, strict=False)
        body += "".join(_article(show(row), detail) for row, detail in pairs)
        name = examples.clean(one.name)
        blocks.append(f"<h3>{name}</h3>{body}")
    return "".join(blocks)


def _plots(audit: Audit) -> str:
    figures = []
    for name, values in lengths(audit).items():
        title, unit = name.rpartition("_")[0].capitalize(), name.rpartition("_")[2]
        unit = "characters" if unit == "chars" else unit
        plot = plots.histogram(values, title=title, unit=unit)
        figures.append(parts.figure(title, f"Length in {unit}", plot))
    plot = plots.histogram(_sides(audit), title="Pictures", unit="pixels")
    figures.append(parts.figure("Pictures", "Longer side of each distinct picture", plot))
    head = ("", "least", "median", "90 %", "99 %", "greatest", "in all")
    named = lengths(audit) | {"longer_side_pixels": _sides(audit)}
    rows = [
        (
            name.replace("_", " "),
            *(f"{value:,}" for value in _quantiles(values).values()),
            f"{sum(values):,}" if name in lengths(audit) else "",
        )
        for name, values in named.items()
        if values
    ]
    return parts.row(*figures) + parts.table(head, rows)


def _responses(audit: Audit) -> str:
    rows = audit.rows()
    bars = [
        plots.Bar(name=name, rate=_rate(values), colour=colour)
        for name, values, colour in (
            ("strict", [row.strict_ok for row in rows], "a"),
            ("official", [row.official_ok for row in rows], "b"),
            ("right", audit.teachers_right, "c"),
        )
    ]
    title = "Whole responses"
    note = "In the strict and the official format; judged right, where there is a ground truth"
    return parts.row(parts.figure(title, note, plots.rates(bars, title=title)))


def _article(row: Shown, detail: str | None) -> str:
    pictures = examples.pictures(row.pictures, about=row.question or row.id)
    note = "" if detail is None else f'<p class="warning">{examples.clean(detail)}</p>'
    truth = "" if row.truth is None else f"<p>Answer: <b>{examples.clean(row.truth)}</b></p>"
    responses = "".join(
        f'<section class="response"><h4>{examples.clean(name)}</h4>'
        f'<pre tabindex="0" aria-label="{examples.clean(name)}">{examples.coloured(text)}</pre>'
        "</section>"
        for name, text in row.responses.items()
    )
    return (
        f'<article class="card example"><div class="question">{pictures}<div>'
        f'<h3>{examples.clean(row.question)}</h3><p class="note">{examples.clean(row.id)}</p>'
        f'{truth}{note}</div></div><div class="stages">{responses}</div></article>'
    )


def _sides(audit: Audit) -> list[int]:
    distinct = {seen.pixels: seen for row in audit.rows() for seen in row.pictures}
    return [max(seen.width_pixels, seen.height_pixels) for seen in distinct.values()]


def _quantiles(values: Sequence[int]) -> dict[str, int]:
    """Return the values below which these shares of them lie, the greatest value for 1."""
    ordered = sorted(values)
    names = ("least", "median", "p90", "p99", "greatest")
    if not ordered:
        return {}
    return {
        name: ordered[min(int(share * len(ordered)), len(ordered) - 1)]
        for name, share in zip(names, _SHARES, strict=True)
    }


def _counts(values) -> dict[str, int]:
    return {str(value): count for value, count in sorted(collections.Counter(values).items())}


def _share(values: Sequence[bool | None]) -> dict[str, float] | None:
    rate = _rate(values)
    return None if rate is None else dataclasses.asdict(rate)


def _rate(values: Sequence[bool | None]) -> intervals.Rate | None:
    known = [float(value) for value in values if value is not None]
    return intervals.rate(known, num_responses=1) if known else None
