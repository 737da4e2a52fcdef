"""Parts of a page: the whole file, sections, figures, curves and tables as HTML."""

from collections.abc import Sequence

from prism_jax.report import plots, style

# The texts of a page are untrusted: allow only what the file contains.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def document(title: str, body: str) -> str:
    """Return the file of a page, which loads no other; title and body are HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{title}</title><style>{style.STYLE}</style></head><body><main>{body}</main>"
        "</body></html>\n"
    )


def section(title: str, body: str) -> str:
    """Return a part of a page with its heading; both are HTML."""
    return f"<section><h2>{title}</h2>{body}</section>"


def lines(
    title: str,
    subtitle: str,
    curves: Sequence[plots.Line],
    *,
    unit: str,
    has_zero: bool,
    absent: str,
) -> str:
    """Return a plot of curves with its legend and notes."""
    measured = [line for line in curves if line.curve.steps]
    keys = "".join(
        f'<span><svg viewBox="0 0 26 10" aria-hidden="true">'
        f'<path class="line {line.colour}" d="M1 5H25"/></svg>{line.name}</span>'
        for line in measured
    )
    legend = f'<div class="legend">{keys}</div>' if measured else ""
    notes = []
    windows = {plots.smooth_steps(line.curve) for line in measured} - {1}
    if windows:
        notes.append(f"Bold: mean over {' or '.join(map(str, sorted(windows)))} steps.")
    missing = sum(line.curve.num_not_finite for line in curves)
    if missing:
        notes.append(f"{missing} values that are not finite are left out.")
    after = f'<p class="note">{" ".join(notes)}</p>' if notes else ""
    plot = plots.lines(curves, title=title, unit=unit, has_zero=has_zero, absent=absent)
    return figure(title, subtitle, legend + plot + after)


def row(*figures: str) -> str:
    """Return figures side by side where there is room."""
    return f'<div class="plots">{"".join(figures)}</div>'


def figure(title: str, subtitle: str, body: str) -> str:
    """Return a figure; title, subtitle and body are HTML."""
    return (
        f'<figure class="card"><figcaption><h3>{title}</h3>'
        f'<span class="note">{subtitle}</span></figcaption>{body}</figure>'
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; the cells are HTML."""
    top = "".join(f'<th scope="col">{name}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return (
        f'<div class="card scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody>'
        "</table></div>"
    )


def percent(value: float) -> str:
    """Return a share in percent."""
    return f"{100 * value:.1f}\u00a0%"
