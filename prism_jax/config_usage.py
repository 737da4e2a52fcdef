"""What a user is told about a command that reads a configuration: `--help`."""

import pathlib
from collections.abc import Sequence

_FIELDS = """\
--config.FIELD=VALUE, after --config, overrides a field of the file, --config.GROUP.FIELD=VALUE one
of a group. Given again it adds to a tuple; None empties a field.
"""


def is_asked(argv: Sequence[str]) -> bool:
    """Tell whether the arguments ask for help."""
    return not {"-h", "--help"}.isdisjoint(argv)


def of(command: str) -> str:
    """Return what `--help` prints: the head of the command's own file, and how fields are given.

    The file is looked for as one given with `--config=configs/COMMAND.py` is, from the working
    directory; a package that is installed elsewhere brings no `configs/`, and the text says so.
    """
    path = pathlib.Path("configs") / f"{command}.py"
    if path.is_file():
        # The source, not `__doc__`: there a line that ends in a backslash is joined with the next.
        head = path.read_text(encoding="utf-8").partition('"""')[2].partition('"""')[0].strip()
    else:
        head = (
            f"Its sizes and options stand at the head of {path}, which is not in "
            f"{pathlib.Path.cwd()}: ask again in the repository's root, or give your own file."
        )
    usage = f"usage: python -m prism_jax {command} --config=FILE.py:SIZE,OPTION,… --workdir=DIR …"
    return f"{usage}\n\n{head}\n\n{_FIELDS}"
