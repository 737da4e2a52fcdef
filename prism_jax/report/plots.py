"""Plots as inline SVG, in the page's colours and readable at a width of 360 pixels.

The `aria-label` of a plot describes it with its numbers.
"""

import dataclasses
import html
import math
from collections.abc import Sequence

from prism_jax import intervals
from prism_jax.report import results

# A unit is a pixel on a phone; a wider page scales the plot up.
_WIDTH, _HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 14, 16, 34
_INNER_WIDTH = _WIDTH - _LEFT - _RIGHT
# Curves with more points are drawn faintly, under a moving mean.
_MAX_BARE_POINTS = 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A curve of a plot."""

    name: str
    curve: results.Curve
    colour: str  # "a", "b" or "c"; each has different dashes too


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar: a rate with its interval, or None for a stage that was not run."""

    name: str
    rate: intervals.Rate | None
    colour: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Axis:
    """An axis that maps values to pixels."""

    low: float
    high: float
    start: float  # pixels
    end: float
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def rates(bars: Sequence[Bar], *, title: str) -> str:
    """Draw rates in percent as bars with their 95 % intervals."""
    y = _Axis(low=0, high=1, start=_HEIGHT - _BOTTOM, end=_TOP + 6, ticks=(0, 0.25, 0.5, 0.75, 1))
    parts = _grid(y, "%", scale=100)
    slot = _INNER_WIDTH / len(bars)
    for number, bar in enumerate(bars):
        middle = _LEFT + slot * (number + 0.5)
        parts.append(_text(middle, _HEIGHT - _BOTTOM + 18, bar.name, "tick middle strong"))
        parts += _bar(bar, middle, y, half=min(24, slot * 0.3))
    description = "; ".join(
        f"{bar.name} " + ("not run" if bar.rate is None else f"{bar.rate} (95 % interval)")
        for bar in bars
    )
    return _svg(parts, label=f"{title}: {description}.")


def lines(curves: Sequence[Line], *, title: str, unit: str, has_zero: bool, absent: str) -> str:
    """Draw curves over steps; those that were never measured are left out.

    Args:
      unit: the label above the vertical axis.
      has_zero: the vertical axis includes 0, with a line.
      absent: the text that replaces a plot without curves.
    """
    curves = [line for line in curves if line.curve.steps]
    if not curves:
        return _empty(title, absent)
    values = [value for line in curves for value in line.curve.values]
    steps = [step for line in curves for step in line.curve.steps]
    if has_zero:
        values.append(0.0)
    y = _axis(min(values), max(values), start=_HEIGHT - _BOTTOM, end=_TOP + 6, num_ticks=4)
    x = _axis(min(steps), max(steps), start=_LEFT, end=_WIDTH - _RIGHT, num_ticks=5, is_tight=True)
    parts = _grid(y, unit, scale=1)
    for tick in x.ticks:
        parts.append(_text(x(tick), _HEIGHT - _BOTTOM + 16, f"{tick:g}", "tick middle"))
    parts.append(_text(_WIDTH - _RIGHT, _HEIGHT - 3, "step", "tick end"))
    if has_zero:
        parts.append(f'<path class="zero" d="M{_LEFT} {y(0):.1f}H{_WIDTH - _RIGHT}"/>')
    for line in curves:
        parts += _curve(line, x, y)
    description = "; ".join(
        f"{line.name} from {line.curve.values[0]:.3g} at step {line.curve.steps[0]} "
        f"to {line.curve.values[-1]:.3g} at step {line.curve.steps[-1]}"
        for line in curves
    )
    return _svg(parts, label=f"{title}: {description}.")


def histogram(values: Sequence[float], *, title: str, unit: str) -> str:
    """Draw how many of the values lie in each of about 24 intervals.

    Args:
      unit: the label of the horizontal axis.
    """
    if not values:
        return _empty(title, "no values")
    x = _axis(min(values), max(values), start=_LEFT, end=_WIDTH - _RIGHT, num_ticks=4)
    num_bins = 6 * (len(x.ticks) - 1)
    counts = [0] * num_bins
    for value in values:
        share = (value - x.low) / (x.high - x.low)
        counts[min(int(share * num_bins), num_bins - 1)] += 1
    y = _axis(0, max(counts), start=_HEIGHT - _BOTTOM, end=_TOP + 6, num_ticks=4)
    parts = _grid(y, "rows", scale=1)
    for tick in x.ticks:
        kind = "tick end" if tick == x.ticks[-1] else "tick middle"
        parts.append(_text(x(tick), _HEIGHT - _BOTTOM + 16, f"{tick:,.10g}", kind))
    parts.append(_text(_WIDTH - _RIGHT, _HEIGHT - 3, unit, "tick end"))
    wide = (x.high - x.low) / num_bins
    for number, count in enumerate(counts):
        if count:
            low, high = x.low + wide * number, x.low + wide * (number + 1)
            parts.append(
                f"<g><title>{low:,.10g} to {high:,.10g}: {count:,}</title>"
                f'<rect class="bar a" x="{x(low) + 0.5:.1f}" y="{y(count):.1f}" '
                f'width="{x(high) - x(low) - 1:.1f}" height="{max(y(0) - y(count), 1):.1f}"/></g>'
            )
    label = f"{title}: {len(values):,} from {min(values):,.10g} to {max(values):,.10g} {unit}."
    return _svg(parts, label=label)


def _empty(title: str, absent: str) -> str:
    """Draw an empty frame with a text in place of a plot."""
    frame = f'<rect class="absent" x="1" y="1" width="{_WIDTH - 2}" height="{_HEIGHT - 2}" rx="6"/>'
    text = _text(_WIDTH / 2, _HEIGHT / 2 + 4, absent, "absent-text middle")
    return _svg([frame, text], label=f"{title}: {absent}.")


def smooth_steps(curve: results.Curve) -> int:
    """Return the points that a curve's bold line averages over; 1: there is no faint line."""
    count = len(curve.values)
    return 1 if count <= _MAX_BARE_POINTS else 2 * (count // 40) + 3


def _bar(bar: Bar, middle: float, y: _Axis, *, half: float) -> list[str]:
    bottom = y(0)
    if bar.rate is None:
        top = y(0.2)
        return [
            f'<rect class="absent" x="{middle - half:.1f}" y="{top:.1f}" width="{2 * half:.1f}" '
            f'height="{bottom - top:.1f}" rx="3"/>',
            _text(middle, top - 6, "not run", "absent-text middle"),
        ]
    mean, low, high = (y(value) for value in dataclasses.astuple(bar.rate))
    cap = half * 0.35
    whisker = (
        f"M{middle:.1f} {low:.1f}V{high:.1f}"
        f"M{middle - cap:.1f} {low:.1f}h{2 * cap:.1f}M{middle - cap:.1f} {high:.1f}h{2 * cap:.1f}"
    )
    return [
        f"<g><title>{html.escape(f'{bar.name}: {bar.rate}')}</title>"
        f'<rect class="bar {bar.colour}" x="{middle - half:.1f}" y="{mean:.1f}" '
        f'width="{2 * half:.1f}" height="{max(bottom - mean, 1):.1f}" rx="3"/>'
        f'<path class="whisker" d="{whisker}"/></g>',
        _text(middle, high - 6, f"{100 * bar.rate.mean:.1f}", "value middle"),
    ]


def _curve(line: Line, x: _Axis, y: _Axis) -> list[str]:
    points = list(zip(line.curve.steps, line.curve.values, strict=True))
    parts = []
    window = smooth_steps(line.curve)
    if window > 1:
        parts.append(f'<path class="raw {line.colour}" d="{_path(points, x, y)}"/>')
        points = _means(points, window)
    parts.append(f'<path class="line {line.colour}" d="{_path(points, x, y)}"/>')
    if len(points) <= _MAX_BARE_POINTS:
        parts += [
            f'<circle class="dot {line.colour}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.5">'
            f"<title>{html.escape(line.name)}, step {step}: {value:.4g}</title></circle>"
            for step, value in points
        ]
    return parts


def _means(points: Sequence[tuple[int, float]], window: int) -> list[tuple[int, float]]:
    """Return each point with the mean of the `window` points around it, fewer at the ends."""
    half = window // 2
    means = []
    for number, (step, _) in enumerate(points):
        near = [value for _, value in points[max(0, number - half) : number + half + 1]]
        means.append((step, math.fsum(near) / len(near)))
    return means


def _path(points: Sequence[tuple[int, float]], x: _Axis, y: _Axis) -> str:
    return "M" + "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in points)


def _grid(y: _Axis, unit: str, *, scale: float) -> list[str]:
    """Return the horizontal lines with their numbers, and the unit above them."""
    parts = [_text(2, 10, unit, "tick")]
    for tick in y.ticks:
        parts.append(f'<path class="grid" d="M{_LEFT} {y(tick):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 6, y(tick) + 4, f"{tick * scale:.10g}", "tick end"))
    return parts


def _axis(
    low: float, high: float, *, start: float, end: float, num_ticks: int, is_tight: bool = False
) -> _Axis:
    """Return an axis with round ticks; a tight one ends at its values, not at ticks."""
    if low == high:
        # Put a single value in the middle.
        low, high = low - max(abs(low), 1) / 2, high + max(abs(high), 1) / 2
    raw = (high - low) / num_ticks
    power = 10.0 ** math.floor(math.log10(raw))
    apart = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    if is_tight:
        apart = max(1.0, math.ceil(apart))
        first, last = math.ceil(low / apart), math.floor(high / apart)
    else:
        first, last = math.floor(low / apart + 1e-9), math.ceil(high / apart - 1e-9)
        low, high = first * apart, last * apart
    ticks = tuple(round(number * apart, 12) for number in range(first, last + 1))
    return _Axis(low=low, high=high, start=start, end=end, ticks=ticks)


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{html.escape(text)}</text>'


def _svg(parts: Sequence[str], *, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )
