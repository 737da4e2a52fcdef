"""The report as an HTML file without scripts or other files; missing numbers are "not run"."""

from collections.abc import Sequence

from prism_jax import intervals, progress
from prism_jax.report import examples, honesty, parts, plots, results

_NAMES = {
    "caption": "caption (perception)",
    "cot": "think and answer (reasoning)",
    "response": "whole response",
}
_LINES = {"caption": ("perception", "a"), "cot": ("reasoning", "b"), "response": ("response", "c")}
_NOT_RUN = '<span class="absent-value">not run</span>'
_WHEN = {"warmup_held_out": "warmup", "before": "align", "after": "align"}


def build(
    chain: results.Results, shown: Sequence[examples.Example], *, title: str, selection: str
) -> str:
    """Return the page.

    Args:
      chain: the numbers of the page.
      shown: the examples.
      title: of the page, as plain text.
      selection: a sentence on how the examples were chosen.
    """
    name = examples.clean(title)
    body = "".join(
        (
            f"<header><h1>{name}</h1>{_lead(chain)}</header>",
            _tiles(chain),
            parts.section("Accuracy and format", _rate_plots(chain)),
            parts.section("Training", _curve_plots(chain)),
            parts.section("Stages", _stages_table(chain) + _types_table(chain)),
            parts.section("Discriminator", _discriminator(chain) + honesty.build(chain)),
            parts.section("Responses", _examples(shown, selection)),
            parts.section("Wall time", _times(chain)),
            _commands(chain),
        )
    )
    return parts.document(name, body)


def _lead(chain: results.Results) -> str:
    text = (
        "Base model, supervised fine-tuning (sft), alignment with a teacher against a "
        "discriminator (align), reinforcement learning with verifiable rewards (rlvr)."
    )
    counts = {
        (evaluation.num_prompts, evaluation.num_responses, evaluation.draw)
        for evaluation in chain.evaluations.values()
        if evaluation is not None
    }
    if len(counts) == 1:
        prompts, responses, draw = counts.pop()
        how = "one greedy response" if draw == "greedy" else f"{responses} sampled responses"
        text += f" Tested on {prompts} held-out prompts, {how} to each."
    return f'<p class="note">{text}</p>'


def _tiles(chain: results.Results) -> str:
    tiles = []
    for stage, evaluation in chain.evaluations.items():
        if evaluation is None:
            numbers = '<b class="absent-value">–</b><span class="note">not run</span>'
        else:
            valid = parts.percent(evaluation.format_valid.mean)
            numbers = (
                f"<b>{parts.percent(evaluation.accuracy.mean)}</b>"
                f'<span class="note">right, {_interval(evaluation.accuracy)}</span>'
                f'<span class="note">{valid} valid format</span>'
            )
        tiles.append(f'<div class="card tile"><span class="name">{stage}</span>{numbers}</div>')
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _rate_plots(chain: results.Results) -> str:
    def bars(colour: str) -> list[plots.Bar]:
        return [
            plots.Bar(
                name=stage,
                rate=None
                if evaluation is None
                else {"a": evaluation.accuracy, "c": evaluation.format_valid}[colour],
                colour=colour,
            )
            for stage, evaluation in chain.evaluations.items()
        ]

    accuracy, form = "Accuracy by stage", "Responses in a valid format, by stage"
    accuracy_plot = plots.rates(bars("a"), title=accuracy)
    form_plot = plots.rates(bars("c"), title=form)
    return parts.row(
        parts.figure(
            accuracy, "Share of right answers, with intervals of 95\u00a0%", accuracy_plot
        ),
        parts.figure(form, "Caption, thoughts and answer in their tags", form_plot),
    )


def _curve_plots(chain: results.Results) -> str:
    gap = [
        plots.Line(
            name=_LINES[segment][0],
            curve=chain.curve("align", f"discriminator/{segment}_gap"),
            colour=_LINES[segment][1],
        )
        for segment in results.segments(chain)
    ]
    reward = [
        plots.Line(name=name, curve=chain.curve("rlvr", f"reward/{name}_mean"), colour=colour)
        for name, colour in (("total", "a"), ("accuracy", "b"), ("format", "c"))
    ]
    loss = [
        plots.Line(name="training", curve=chain.curve("sft", "loss/nll"), colour="a"),
        plots.Line(name="held out", curve=chain.curve("sft", "eval/nll"), colour="b"),
    ]
    held_out = [
        plots.Line(name=stage, curve=chain.curve(stage, "eval/accuracy"), colour=colour)
        for stage, colour in (("align", "a"), ("rlvr", "b"))
    ]
    measured = [line for line in held_out if line.curve.steps]
    best = ", ".join(
        f"{line.name} {max(line.curve.values):.3g} after step "
        f"{line.curve.steps[line.curve.values.index(max(line.curve.values))]}"
        for line in measured
    )
    return _held_out(measured, best) + parts.row(
        parts.lines(
            "Loss of SFT",
            "Negative log-likelihood a token",
            loss,
            unit="nats",
            has_zero=False,
            absent=chain.absent("sft"),
        ),
        parts.lines(
            "Gap in alignment",
            "Discriminator's score of the teacher's segment minus that of the policy's",
            gap,
            unit="score",
            has_zero=True,
            absent=chain.absent("align"),
        ),
        parts.lines(
            "Reward in RLVR",
            "Mean over the responses of a step; the total weighs accuracy and format",
            reward,
            unit="reward",
            has_zero=True,
            absent=chain.absent("rlvr"),
        ),
    )


def _held_out(lines: Sequence[plots.Line], best: str) -> str:
    """Return the accuracy on held-out prompts during training; nothing where none was measured."""
    if not lines:
        return ""
    return parts.row(
        parts.lines(
            "Held-out prompts while training",
            f"Share of right answers; the best: {best}",
            lines,
            unit="share",
            has_zero=True,
            absent="not measured",
        )
    )


def _stages_table(chain: results.Results) -> str:
    rows = []
    for stage, evaluation in chain.evaluations.items():
        if evaluation is None:
            rows.append((stage, *[_NOT_RUN] * 4))
            continue
        rows.append(
            (
                stage,
                _rate(evaluation.accuracy),
                _rate(evaluation.format_valid),
                f"{evaluation.response_tokens:.0f}",
                parts.percent(evaluation.cut),
            )
        )
    return parts.table(("stage", "accuracy", "valid format", "mean tokens", "cut off"), rows)


def _types_table(chain: results.Results) -> str:
    """Return the accuracies by type of question, collapsed."""
    run = {
        stage: evaluation
        for stage, evaluation in chain.evaluations.items()
        if evaluation is not None
    }
    types = sorted({name for evaluation in run.values() for name in evaluation.by_type})
    if not types:
        return ""
    rows = []
    for name in types:
        by_stage = {
            stage: evaluation.by_type[name]
            for stage, evaluation in run.items()
            if name in evaluation.by_type
        }
        cells = [
            _rate(by_stage[stage].accuracy) if stage in by_stage else _NOT_RUN
            for stage in chain.evaluations
        ]
        count = max(rates.num_prompts for rates in by_stage.values())
        rows.append((f"{examples.clean(name)} <small>{count} prompts</small>", *cells))
    table = parts.table(("type of question", *chain.evaluations), rows)
    return f"<details><summary>Accuracy by type of question</summary>{table}</details>"


def _discriminator(chain: results.Results) -> str:
    accuracies = results.pair_accuracy(chain)
    rows = [
        (
            _NAMES[name],
            *(
                f'<span class="absent-value">{chain.absent(step)}</span>'
                if accuracies[when][name] is None
                else parts.percent(accuracies[when][name])
                for when, step in _WHEN.items()
            ),
        )
        for name in results.segments(chain)
    ]
    window = accuracies["steps_averaged"]
    steps = "" if window is None else f" ({window} steps each)"
    note = (
        "<p class=\"note\">How often it scores the teacher's segment above the policy's: on "
        "held-out pairs after its warm-up, and on the policy's responses at the beginning and "
        f"at the end of alignment{steps}. 50 % is chance.</p>"
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


def _times(chain: results.Results) -> str:
    if not chain.steps:
        return f"<p>{_NOT_RUN}</p>"
    longest = max(step.seconds for step in chain.steps) or 1.0
    rows = []
    for step in chain.steps:
        width = max(100 * step.seconds / longest, 0.5)
        bar = f'<span class="length" style="width:{width:.1f}%"></span>'
        name = examples.clean(step.name)
        if not step.is_finished:
            name += " <small>not finished</small>"
        elif step.num_starts > 1:
            name += f" <small>{step.num_starts} starts</small>"
        rows.append((name, progress.duration(step.seconds), bar))
    total = progress.duration(sum(step.seconds for step in chain.steps))
    body = "".join(
        f'<tr><td>{name}</td><td>{duration}</td><td class="wide">{bar}</td></tr>'
        for name, duration, bar in rows
    )
    return (
        f'<p class="note">{total} in all, starts that were interrupted included.</p>'
        f'<div class="card scroll"><table><tbody>{body}</tbody></table></div>'
    )


def _commands(chain: results.Results) -> str:
    if not chain.steps:
        return ""
    lines = "\n".join(examples.clean(step.command) for step in chain.steps)
    return (
        "<section><h2>Commands</h2><details><summary>What ran, in this order; $WORKDIR is the "
        f'folder of the chain</summary><div class="card"><pre>{lines}</pre></div></details>'
        "</section>"
    )


def _rate(rate: intervals.Rate) -> str:
    return f"{parts.percent(rate.mean)}<small>{_interval(rate)}</small>"


def _interval(rate: intervals.Rate) -> str:
    return f"{100 * rate.low:.1f} to {100 * rate.high:.1f}"
