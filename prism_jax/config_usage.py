"""What a user is told about a command that reads a configuration.

`--help`, files that cannot be read, and misspelt fields.
"""

import difflib
import pathlib
import re
from collections.abc import Sequence

import ml_collections
from absl import flags
from ml_collections import config_flags

from prism_jax import errors

# Fields that have another name than they had, with the present one.
RENAMED = {"verifier": "judge", "num_microbatches": "step_rows"}
_OVERRIDE = re.compile(r"(--?(?:no)?config)\.([^=]*)(?:=.*)?", re.DOTALL)
_FILE = re.compile(r"--?config(?:=(.*))?", re.DOTALL)

# How ml_collections begins the errors in which it hands on those of a file.
_WRAPPED = ("Configuration is not available", "Error whilst parsing config file")

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


def unknown_fields(argv: Sequence[str], *, command: str) -> list[str]:
    """Return a line for each override of a field that the configuration has not.

    The file is read for this without overrides; where none is given there are no such lines.

    Raises:
      InputError: the file is not there, raises, or gives no configuration.
    """
    given = _given(argv)
    if not given:
        return []
    place = f"{command}: --config={given}"
    overrides = [found for found in map(_OVERRIDE.fullmatch, argv) if found]
    arguments = ["", *(a for a in argv if not _OVERRIDE.fullmatch(a))]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    path = pathlib.Path(given.partition(":")[0])
    if not path.exists():
        where = "" if path.is_absolute() else f" in {pathlib.Path.cwd()}"
        raise errors.InputError(f"{place}: there is no file {path}{where}")
    try:
        values(arguments, known_only=True)
        config = values["config"].value
        if config is not None:
            config.to_dict()  # what stands for a file that raised an OSError raises it here
    # The file is a user's program: it may raise anything.
    except Exception as error:
        raised = _raised(error)
        kind = type(raised).__name__
        raise errors.InputError(f"{place}: {kind}: {raised}") from error
    if config is None:
        raise errors.InputError(f"{place}: get_config returns None, not a ConfigDict")
    told = (_unknown(config, found[1], found[2]) for found in overrides)
    return [line for line in told if line is not None]


def _given(argv: Sequence[str]) -> str | None:
    """Return what `--config` is given, the last time; None without it."""
    given = None
    for argument, following in zip(argv, [*argv[1:], None], strict=True):
        found = _FILE.fullmatch(argument)
        if found:
            given = following if found[1] is None else found[1]
    return given


def _raised(error: BaseException) -> BaseException:
    """Return what the file itself raised, out of what ml_collections and absl make of it."""
    while isinstance(error, flags.Error) or str(error).startswith(_WRAPPED):
        inner = error.__cause__ or error.__context__
        if inner is None:
            break
        error = inner
    return error


def _unknown(config: ml_collections.ConfigDict, flag: str, path: str) -> str | None:
    node, place = config, "config"
    for name in path.split("."):
        if not isinstance(node, ml_collections.ConfigDict):
            what = "is None" if node is None else "is no group"
            return f"{flag}.{path}: {place} {what}, it has no field {name!r}"
        if name not in node and name in RENAMED:
            return f"{flag}.{path}: {place}.{name} is {place}.{RENAMED[name]} now"
        if name not in node:
            near = difflib.get_close_matches(name, node, n=1)
            meant = f", perhaps {near[0]} is meant" if near else ""
            return f"{flag}.{path}: {place} has no field {name!r}{meant}; it has {', '.join(node)}"
        node, place = node[name], f"{place}.{name}"
    return None
