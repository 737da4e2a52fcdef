"""The results of the honesty panel on the page: probes, other pictures, swaps, and the router.

The panel's metrics begin with `honesty/`; docs/honesty.md explains them.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from prism_jax.report import examples, parts, plots, results

AREA = "honesty/"
_ABSENT = '<span class="absent-value">not measured</span>'
_CHANGED_TITLE = "Other pictures, segments scored as the other, and captions against cots"
_PROBES = {"length": "length alone", "last_token": "last token alone"}
_CHANGES = {
    "blank_image": "grey picture",
    "shuffled_image": "another prompt's picture",
    "replaced_image": "noise for a picture",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """A measurement of the panel."""

    when: str
    step: int
    values: Mapping[str, float]  # by metric, without the area

    def segments(self) -> list[str]:
        """Return the segments whose pairs were measured."""
        end = "_pair_accuracy"
        names = [name.removesuffix(end) for name in self.values if name.endswith(end)]
        return [name for name in names if f"{name}_teacher_cut_fraction" in self.values]

    def warnings(self) -> list[str]:
        """Return a line for each segment whose accuracy a probe explains."""
        lines = []
        for name in self.segments():
            if self.values.get(f"{name}_probe_explains") != 1:
                continue
            accuracies = {
                probe_name: self.values[f"{name}_{probe}_probe_accuracy"]
                for probe, probe_name in _PROBES.items()
                if f"{name}_{probe}_probe_accuracy" in self.values
            }
            best = max(accuracies, key=lambda probe_name: accuracies[probe_name])
            lines.append(
                f"{self.when}: {name}: {best} tells teacher from student in "
                f"{parts.percent(accuracies[best])} of pairs, the discriminator in "
                f"{parts.percent(self.values[f'{name}_pair_accuracy'])}. It may look at nothing "
                "else."
            )
        return lines


def panels(chain: results.Results) -> list[Panel]:
    """Return the last measurement of the warm-up, and alignment's first and last."""
    measured = []
    for step, times in (("warmup", ("after warm-up",)), ("align", ("alignment", "alignment"))):
        rows = [row for row in chain.metrics[step] if any(name.startswith(AREA) for name in row)]
        if not rows:
            continue
        ends = rows[-1:] if len(times) == 1 or len(rows) == 1 else [rows[0], rows[-1]]
        for row, when in zip(ends, times, strict=False):
            values = {
                name.removeprefix(AREA): float(value)
                for name, value in row.items()
                if name.startswith(AREA)
            }
            label = when if step == "warmup" else f"{when}, step {row['step']}"
            measured.append(Panel(when=label, step=row["step"], values=values))
    return measured


def build(chain: results.Results) -> str:
    """Return the part of the page, or a line if nothing was measured."""
    measured = panels(chain)
    if not measured:
        return '<h3>Does it look?</h3><p class="note">The honesty panel was not measured.</p>'
    warnings = "".join(
        f'<p class="warning"><strong>Warning.</strong> {examples.clean(line)}</p>'
        for panel in measured
        for line in panel.warnings()
    )
    return (
        "<h3>Does it look?</h3>"
        + warnings
        + _accuracies(measured)
        + _curves(chain, measured[-1])
        + _details(_CHANGED_TITLE, _changed(measured))
        + _details("Experts of captions and cots", _router(measured))
    )


def summary(chain: results.Results) -> list[dict[str, object]]:
    """Return the measurements and warnings for `summary.json`."""
    return [dataclasses.asdict(panel) | {"warnings": panel.warnings()} for panel in panels(chain)]


def _details(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>{body}</details>" if body else ""


def _accuracies(measured: Sequence[Panel]) -> str:
    rows = [
        (
            f"{examples.clean(panel.when)} <small>{name}, "
            f"{panel.values.get('num_pairs', 0):.0f} pairs</small>",
            _share(panel, f"{name}_pair_accuracy"),
            *(_share(panel, f"{name}_{probe}_probe_accuracy") for probe in _PROBES),
            _share(panel, f"{name}_teacher_cut_fraction"),
        )
        for panel in measured
        for name in panel.segments()
    ]
    head = ("measured", "discriminator", *_PROBES.values(), "teacher's segment cut")
    note = (
        '<p class="note">How often teacher and student are told apart on held-out pairs: by the '
        "discriminator, and by probes that see only the length or the last token. If a probe is "
        "as good, the scores may reward nothing else.</p>"
    )
    return note + parts.table(head, rows)


def _curves(chain: results.Results, last: Panel) -> str:
    step = "align" if last.when.startswith("alignment") else "warmup"
    figures = []
    for name in last.segments():
        lines = [
            plots.Line(name=label, curve=chain.curve(step, f"{AREA}{name}_{metric}"), colour=colour)
            for label, metric, colour in (
                ("discriminator", "pair_accuracy", "a"),
                ("length", "length_probe_accuracy", "b"),
                ("last token", "last_token_probe_accuracy", "c"),
            )
        ]
        figures.append(
            parts.lines(
                f"Told apart: {name}",
                f"Share of pairs, in {'alignment' if step == 'align' else 'warm-up'}",
                lines,
                unit="share",
                has_zero=True,
                absent="not measured",
            )
        )
    return parts.row(*figures)


def _changed(measured: Sequence[Panel]) -> str:
    rows = []
    for panel in measured:
        for name in panel.segments():
            for change, label in (*_CHANGES.items(), ("swapped", "scored as the other segment")):
                if f"{name}_{change}_change" not in panel.values:
                    continue
                rows.append(
                    (
                        f"{examples.clean(panel.when)} <small>{name}: {label}</small>",
                        f"{panel.values[f'{name}_{change}_change']:.3g}",
                        _share(panel, f"{name}_{change}_pair_accuracy"),
                        _share(panel, f"{name}_pair_accuracy"),
                    )
                )
        for name, other in (("caption", "cot"), ("cot", "caption")):
            key = f"{name}_against_{other}_pair_accuracy"
            if key in panel.values:
                label = f"teacher's {name} against student's {other}"
                rows.append(
                    (
                        f"{examples.clean(panel.when)} <small>{label}</small>",
                        "–",
                        _share(panel, key),
                        _share(panel, f"{name}_pair_accuracy"),
                    )
                )
    if not rows:
        return ""
    deviations = ", ".join(
        f"{panel.values[key]:.3g} ({examples.clean(panel.when)})"
        for panel in measured
        for key in panel.values
        if key.endswith("_score_std")
    )
    note = (
        '<p class="note">How far a score moves on average, and how often the teacher is still '
        "scored above the student. A discriminator that does not look at pictures moves by 0; "
        "one that does not know the name of its segment is not tested with the other name. "
        "Where captions are compared with cots no score moves: one share high and the other low "
        "means that the scores of the two kinds lie at different levels."
        + (f" Standard deviation of the scores: {deviations}." if deviations else "")
        + "</p>"
    )
    head = ("change", "score moves by", "pairs told apart", "without the change")
    return note + parts.table(head, rows)


def _router(measured: Sequence[Panel]) -> str:
    rows = []
    for panel in measured:
        for name in panel.segments():
            start, end = f"{name}_expert_", "_load"
            loads = [v for k, v in panel.values.items() if k.startswith(start) and k.endswith(end)]
            if loads:
                rows.append(
                    (
                        f"{examples.clean(panel.when)} <small>{name}</small>",
                        " · ".join(parts.percent(value) for value in loads),
                        _bits(panel, "router_information_bits_mean"),
                        _bits(panel, "router_information_bits_max"),
                    )
                )
    if not rows:
        return ""
    note = (
        '<p class="note">Share of the tokens of each segment on each expert, over all layers, and '
        "the information of an expert about the segment: 1 bit where captions and cots use "
        "different experts, 0 where they use the same.</p>"
    )
    head = ("measured", "load of each expert", "bits, mean of layers", "bits, highest layer")
    return note + parts.table(head, rows)


def _share(panel: Panel, name: str) -> str:
    return parts.percent(panel.values[name]) if name in panel.values else _ABSENT


def _bits(panel: Panel, name: str) -> str:
    return f"{panel.values[name]:.3f}" if name in panel.values else _ABSENT
