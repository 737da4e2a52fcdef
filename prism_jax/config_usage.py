"""What a user is told about a command that reads a configuration: `--help` and misspelt fields."""

import difflib
import pathlib
import re
from collections.abc import Sequence

import ml_collections
from absl import flags
from ml_collections import config_flags

_OVERRIDE = re.compile(r"(--?(?:no)?config)\.([^=]*)(?:=.*)?", re.DOTALL)

_FIELDS = """\
--config.FIELD=VALUE, after --config, overrides a field of the file, --config.GROUP.FIELD=VALUE one
of a group. Given again it adds to a tuple; None empties a field. A field that
does not exist is refused, with those that do.
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


def unknown_fields(argv: Sequence[str]) -> list[str]:
    """Return a line for each override of a field that the configuration has not.

    The file is read for this without overrides. A file that cannot be read has no such lines.
    """
    overrides = [found for found in map(_OVERRIDE.fullmatch, argv) if found]
    arguments = ["", *(a for a in argv if not _OVERRIDE.fullmatch(a))]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    values(arguments, known_only=True)
    config = values["config"].value
    if not isinstance(config, ml_collections.ConfigDict):
        return []  # no file is given, or it could not be read
    told = (_unknown(config, found[1], found[2]) for found in overrides)
    return [line for line in told if line is not None]


def _unknown(config: ml_collections.ConfigDict, flag: str, path: str) -> str | None:
    node, place = config, "config"
    for name in path.split("."):
        if not isinstance(node, ml_collections.ConfigDict):
            what = "is None" if node is None else "is no group"
            return f"{flag}.{path}: {place} {what}, it has no field {name!r}"
        if name not in node:
            near = difflib.get_close_matches(name, node, n=1)
            meant = f", perhaps {near[0]} is meant" if near else ""
            return f"{flag}.{path}: {place} has no field {name!r}{meant}; it has {', '.join(node)}"
        node, place = node[name], f"{place}.{name}"
    return None
