"""Help and errors about configurations: `--help`, unreadable files and misspelt fields."""

import difflib
import pathlib
import re
from collections.abc import Sequence

import ml_collections
from absl import flags
from ml_collections import config_flags

from prism_jax import errors

# Renamed fields: the old name and the new one.
RENAMED = {"verifier": "judge", "num_microbatches": "step_rows"}
_OVERRIDE = re.compile(r"(--?(?:no)?config)\.([^=]*)(?:=.*)?", re.DOTALL)
_FILE = re.compile(r"--?config(?:=(.*))?", re.DOTALL)

# The beginnings of the errors in which ml_collections wraps those of a file.
_WRAPPED = ("Configuration is not available", "Error whilst parsing config file")

_FIELDS = """\
--config.FIELD=VALUE, after --config, overrides a field of the file, --config.GROUP.FIELD=VALUE one
of a group. Given again it adds to a tuple; None empties a field. A field that
does not exist is refused, with those that do.
"""


def is_help(argv: Sequence[str]) -> bool:
    """Return whether the arguments ask for help."""
    return not {"-h", "--help"}.isdisjoint(argv)


def of(command: str) -> str:
    """Return the text of `--help`: the head of the command's file, and the syntax of fields.

    The file is looked up in the working directory, like the one of `--config=configs/COMMAND.py`.
    An installed package brings no `configs/`; the text says so.
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
    """Return a line for each override of a field that the configuration does not have.

    Reads the file without the overrides; without `--config` there are no such lines.

    Raises:
      InputError: the file is not there, raises, or gives no configuration.
    """
    given = _given(argv)
    if not given:
        return []
    place = f"{command}: --config={given}"
    overrides = [match for match in map(_OVERRIDE.fullmatch, argv) if match]
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
            config.to_dict()  # raises the OSError of the file, if there was one
    # The file is a user's program: it may raise anything.
    except Exception as error:
        raised = _raised(error)
        kind = type(raised).__name__
        raise errors.InputError(f"{place}: {kind}: {raised}") from error
    if config is None:
        raise errors.InputError(f"{place}: get_config returns None, not a ConfigDict")
    lines = (_unknown(config, match[1], match[2]) for match in overrides)
    return [line for line in lines if line is not None]


def _given(argv: Sequence[str]) -> str | None:
    """Return the value of the last `--config`; None without one."""
    given = None
    for argument, following in zip(argv, [*argv[1:], None], strict=True):
        match = _FILE.fullmatch(argument)
        if match:
            given = following if match[1] is None else match[1]
    return given


def _raised(error: BaseException) -> BaseException:
    """Return the error of the file itself, unwrapped from those of ml_collections and absl."""
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
            problem = "is None" if node is None else "is no group"
            return f"{flag}.{path}: {place} {problem}, it has no field {name!r}"
        if name not in node and name in RENAMED:
            return f"{flag}.{path}: {place}.{name} is {place}.{RENAMED[name]} now"
        if name not in node:
            near = difflib.get_close_matches(name, node, n=1)
            meant = f", perhaps {near[0]} is meant" if near else ""
            return f"{flag}.{path}: {place} has no field {name!r}{meant}; it has {', '.join(node)}"
        node, place = node[name], f"{place}.{name}"
    return None
