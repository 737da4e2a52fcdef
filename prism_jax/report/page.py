"""The report as one HTML file: nothing is loaded, no script runs, absent numbers are "not run"."""

from collections.abc import Sequence

from prism_jax import intervals, progress
from prism_jax.report import examples, honesty, parts, plots, results, style

_NAMES = {
    "caption": "caption (perception)",
    "cot": "think and answer (reasoning)",
    "response": "whole response",
}
_LINES = {"caption": ("perception", "a"), "cot": ("reasoning", "b"), "response": ("response", "c")}
_NOT_RUN = '<span class="absent-value">not run</span>'
_WHEN = {"warmup_held_out": "warmup", "before": "align", "after": "align"}
# Nothing but what is in the file, whatever a response says.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def build(
    found: results.Results, shown: Sequence[examples.Example], *, title: str, selection: str
) -> str:
    """Return the page.

    Args:
      selection: says how the examples were chosen.
    """
    name = examples.clean(title)
    body = "".join(
        (
            f"<header><h1>{name}</h1>{_lead(found)}</header>",
            _tiles(found),
            _section("Accuracy and format", _rate_plots(found)),
            _section("Training", _curve_plots(found)),
            _section("Stages", _stages_table(found) + _types_table(found)),
            _section("Discriminator", _discriminator(found) + honesty.build(found)),
            _section("Responses", _examples(shown, selection)),
            _section("Wall time", _times(found)),
            _commands(found),
        )
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{name}</title><style>{style.STYLE}</style></head><body><main>{body}</main>"
        "</body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def _lead(found: results.Results) -> str:
    text = (
        "Base model, supervised fine-tuning (sft), alignment with a teacher against a "
        "discriminator (align), reinforcement learning with verifiable rewards (rlvr)."
    )
    counts = {
        (one.num_prompts, one.num_responses, one.draw)
        for one in found.evaluations.values()
        if one is not None
    }
    if len(counts) == 1:
        prompts, responses, draw = counts.pop()
        how = "one greedy response" if draw == "greedy" else f"{responses} sampled responses"
        text += f" Tested on {prompts} held-out prompts, {how} to each."
    return f'<p class="note">{text}</p>'


def _tiles(found: results.Results) -> str:
    tiles = []
    for stage, one in found.evaluations.items():
        if one is None:
            told = '<b class="absent-value">–</b><span class="note">not run</span>'
        else:
            told = (
                f"<b>{parts.percent(one.accuracy.mean)}</b>"
                f'<span class="note">right, {_interval(one.accuracy)}</span>'
                f'<span class="note">{parts.percent(one.format_valid.mean)} valid format</span>'
            )
        tiles.append(f'<div class="card tile"><span class="name">{stage}</span>{told}</div>')
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _rate_plots(found: results.Results) -> str:
    def bars(name: str, colour: str) -> list[plots.Bar]:
        return [
            plots.Bar(
                name=stage,
                rate=None if one is None else {"a": one.accuracy, "c": one.format_valid}[colour],
                colour=colour,
            )
            for stage, one in found.evaluations.items()
        ]

    accuracy, form = "Accuracy by stage", "Responses in a valid format, by stage"
    return parts.row(
        parts.figure(accuracy, "Share of right answers, with intervals of 95\u00a0%", plots.rates(
            bars("accuracy", "a"), title=accuracy)),
        parts.figure(form, "Caption, thoughts and answer in their tags", plots.rates(
            bars("format", "c"), title=form)),
    )  # fmt: skip


def _curve_plots(found: results.Results) -> str:
    gap = [
        plots.Line(
            name=_LINES[segment][0],
            curve=found.curve("align", f"discriminator/{segment}_gap"),
            colour=_LINES[segment][1],
        )
        for segment in results.segments(found)
    ]
    reward = [
        plots.Line(name=name, curve=found.curve("rlvr", f"reward/{name}_mean"), colour=colour)
        for name, colour in (("total", "a"), ("accuracy", "b"), ("format", "c"))
    ]
    loss = [
        plots.Line(name="training", curve=found.curve("sft", "loss/nll"), colour="a"),
        plots.Line(name="held out", curve=found.curve("sft", "eval/nll"), colour="b"),
    ]
    return parts.row(
        parts.lines(
            "Loss of SFT",
            "Negative log-likelihood a token",
            loss,
            unit="nats",
            has_zero=False,
            absent=found.absent("sft"),
        ),
        parts.lines(
            "Gap in alignment",
            "Discriminator's score of the teacher's segment minus that of the policy's",
            gap,
            unit="score",
            has_zero=True,
            absent=found.absent("align"),
        ),
        parts.lines(
            "Reward in RLVR",
            "Mean over the responses of a step; the total weighs accuracy and format",
            reward,
            unit="reward",
            has_zero=True,
            absent=found.absent("rlvr"),
        ),
    )


def _stages_table(found: results.Results) -> str:
    rows = []
    for stage, one in found.evaluations.items():
        if one is None:
            rows.append((stage, *[_NOT_RUN] * 4))
            continue
        rows.append(
            (
                stage,
                _rate(one.accuracy),
                _rate(one.format_valid),
                f"{one.response_tokens:.0f}",
                parts.percent(one.cut),
            )
        )
    return parts.table(("stage", "accuracy", "valid format", "mean tokens", "cut off"), rows)


def _types_table(found: results.Results) -> str:
    """Return accuracies by type of question, folded."""
    run = {stage: one for stage, one in found.evaluations.items() if one is not None}
    types = sorted({name for one in run.values() for name in one.by_type})
    if not types:
        return ""
    rows = []
    for name in types:
        cells = [
            _rate(one.by_type[name].accuracy) if one is not None and name in one.by_type
            else _NOT_RUN
            for one in found.evaluations.values()
        ]  # fmt: skip
        count = max(one.by_type[name].num_prompts for one in run.values() if name in one.by_type)
        rows.append((f"{examples.clean(name)} <small>{count} prompts</small>", *cells))
    table = parts.table(("type of question", *found.evaluations), rows)
    return f"<details><summary>Accuracy by type of question</summary>{table}</details>"


def _discriminator(found: results.Results) -> str:
    told = results.pair_accuracy(found)
    rows = [
        (
            _NAMES[name],
            *(
                f'<span class="absent-value">{found.absent(step)}</span>'
                if told[when][name] is None
                else parts.percent(told[when][name])
                for when, step in _WHEN.items()
            ),
        )
        for name in results.segments(found)
    ]
    window = told["steps_averaged"]
    steps = "" if window is None else f" ({window} steps each)"
    note = (
        "<p class=\"note\">How often it scores the teacher's segment above the policy's: on "
        "held-out pairs after its warm-up, and on the policy's own responses at the beginning and "
        f"at the end of alignment{steps}. 50 % is a coin's.</p>"
    )
    head = ("segment", "after warm-up", "alignment begins", "alignment ends")
    return note + parts.table(head, rows)


def _examples(shown: Sequence[examples.Example], selection: str) -> str:
    if not shown:
        return f"<p>{_NOT_RUN}</p>"
    key = (
        '<span class="caption">caption</span> <span class="think">think</span> '
        '<span class="answer">answer</span>'
    )
    note = f'<p class="note key">{examples.clean(selection)} Segments: {key}</p>'
    return note + "".join(map(examples.draw, shown))


def _times(found: results.Results) -> str:
    if not found.steps:
        return f"<p>{_NOT_RUN}</p>"
    longest = max(step.seconds for step in found.steps) or 1.0
    rows = []
    for step in found.steps:
        width = max(100 * step.seconds / longest, 0.5)
        bar = f'<span class="length" style="width:{width:.1f}%"></span>'
        name = examples.clean(step.name)
        if not step.is_finished:
            name += " <small>not finished</small>"
        elif step.num_starts > 1:
            name += f" <small>{step.num_starts} starts</small>"
        rows.append((name, progress.duration(step.seconds), bar))
    total = progress.duration(sum(step.seconds for step in found.steps))
    body = "".join(
        f'<tr><td>{name}</td><td>{told}</td><td class="wide">{bar}</td></tr>'
        for name, told, bar in rows
    )
    return (
        f'<p class="note">{total} in all, starts that were interrupted included.</p>'
        f'<div class="card scroll"><table><tbody>{body}</tbody></table></div>'
    )


def _commands(found: results.Results) -> str:
    if not found.steps:
        return ""
    lines = "\n".join(examples.clean(step.command) for step in found.steps)
    return (
        "<section><h2>Commands</h2><details><summary>What ran, in this order; $WORKDIR is the "
        f'folder of the chain</summary><div class="card"><pre>{lines}</pre></div></details>'
        "</section>"
    )


def _rate(one: intervals.Rate) -> str:
    return f"{parts.percent(one.mean)}<small>{_interval(one)}</small>"


def _interval(one: intervals.Rate) -> str:
    return f"{100 * one.low:.1f} to {100 * one.high:.1f}"
