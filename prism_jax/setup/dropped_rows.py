"""The rows that were left out of a data set, on standard error and in a file of a workdir."""

import contextlib
import pathlib
import sys
from collections.abc import Iterator

from prism_jax.data import validate

# More rows than a user reads on a screen stand only in the file, where there is a file.
_SHOWN_ROWS = 100


@contextlib.contextmanager
def named(path: pathlib.Path | None, *, earlier: str = "") -> Iterator[None]:
    """Print and list all rows when a data set is refused in this context, and raise again.

    Args:
      path: JSON lines to write, one for each row; None: standard error gets all of them.
      earlier: lines of data sets before this one, which stay in the file.
    """
    try:
        yield
    except validate.WrongRows as error:
        if path is not None:
            path.write_text(earlier + error.report.lines(), encoding="utf-8")
        print_rows(error.report, path)
        raise


def print_rows(report: validate.Report, path: pathlib.Path | None) -> None:
    """Write the rows to standard error, one a line; where there are very many, only the first."""
    rows = report.dropped
    shown = rows if path is None else rows[:_SHOWN_ROWS]
    # A row's name and message may quote a file that breaks lines.
    lines = [f"left out: {' '.join(str(row).split())}\n" for row in shown]
    if len(shown) < len(rows):
        lines.append(f"left out: {len(rows) - len(shown)} more; {path} names all\n")
    sys.stderr.write("".join(lines))
    sys.stderr.flush()
