"""Functions of the user's, named as FILE.py:FUNCTION in the configuration.

Such a file is a part of the user's program, like the file of `--config`: it is executed, in a
separate process. Data and weights name no code, and nothing is executed for what they hold.
"""

import ast
import dataclasses
import hashlib
import importlib.util
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from prism_jax import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserFunction:
    """A function in a file that was read and not executed."""

    path: str  # absolute
    name: str
    digest: str  # 16 hex digits of the SHA-256 of the file; of what it imports nothing counts

    def __str__(self) -> str:
        return f"{self.path}:{self.name}"


def find(text: str, *, field: str) -> UserFunction:
    """Return the function that a field names; nothing of its file is executed.

    Raises:
      InputError: the text has another form, the file cannot be read or is no Python, or defines no
        such name.
    """
    place = f"{field} = {text}"
    path, _, name = text.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise errors.InputError(f"{place}: must be FILE.py:FUNCTION")
    try:
        source = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise errors.InputError(f"{place}: {error.strerror or error}") from error
    try:
        body = ast.parse(source, filename=path).body
    except (SyntaxError, ValueError) as error:
        raise errors.InputError(f"{place}: not Python: {error}") from error
    if name not in _defined(body):
        raise errors.InputError(f"{place}: the file defines no {name} at its top level")
    return UserFunction(
        path=str(pathlib.Path(path).absolute()),
        name=name,
        digest=hashlib.sha256(source).hexdigest()[:16],
    )


def _defined(body: list[ast.stmt]) -> set[str]:
    """Return the names of functions, assignments and imports."""
    names = set()
    for node in body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def load(path: str, name: str) -> Callable[..., Any]:
    """Execute the file and return its function; errors of the file pass through.

    Modules beside the file can be imported by it.
    """
    sys.path.append(str(pathlib.Path(path).parent))
    spec = importlib.util.spec_from_file_location("user_functions_file", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function = vars(module)[name]
    if not callable(function):
        raise TypeError(f"{name} must be a function, got {type(function).__name__}")
    return function


def describe(error: BaseException, path: str) -> str:
    """Return an error of the user's file in one line, with the line where it was raised."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    where = "" if line is None else f"line {line}: "
    message = " ".join(str(error).split())
    return f"{where}{type(error).__name__}" + (f": {message[:500]}" if message else "")
