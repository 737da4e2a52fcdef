"""The page of messages quotes messages that the program and the launchers still have."""

import ast
import pathlib
import re

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_FIELD = "\0"


def _templates():
    """Return every string of the sources, with a mark where a value is filled in."""
    texts = []
    for path in (_ROOT / "prism_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [n.value if isinstance(n, ast.Constant) else _FIELD for n in node.values]
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    for path in (_ROOT / "launch").glob("*.sh"):
        texts.append(re.sub(r"\$\{[^}]*\}|\$\([^)]*\)|\$\w+", _FIELD, path.read_text()))
    return "\n".join(texts)


@pytest.fixture(scope="module")
def templates():
    return _templates()


def _quoted():
    page = (_ROOT / "docs/troubleshooting.md").read_text()
    page = page.split("## Messages of JAX")[0]
    return [
        message
        for line in page.splitlines()
        if line.startswith("| `")
        for message in re.findall(r"`([^`]+)`", line.split(" | ")[0])
    ]


@pytest.mark.parametrize("message", _quoted())
def test_every_quoted_message_is_one_that_can_be_seen(templates, message):
    # What stands for a value on the page: dots, a word in capitals, a number, a path of the user.
    pieces = re.split(r"…|'[^']*'|~?/\S*|\b[A-Z_]{1,}\b|\b\d+\b", message)
    pieces = [piece.strip(" :,;'()") for piece in pieces]
    long = [piece for piece in pieces if len(piece) >= 8]
    assert long, f"nothing of {message!r} can be looked up"
    missing = [piece for piece in long if piece not in templates]
    assert not missing, f"{message!r}: no source says {missing}"
