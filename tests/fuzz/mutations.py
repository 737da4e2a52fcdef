"""Damage JSON trees, bytes and texts; every choice comes from the generator that is given."""

import copy
import json
import math
import random
from collections.abc import Sequence
from typing import Any

Json = Any

# Values that programs trip over: limits of types, other alphabets, halves of pairs, paths, marks.
ODD_VALUES: tuple[Json, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, -(10**30), 0.0, -0.5, 1e308, math.inf,
    -math.inf, math.nan, "", " ", "\0", "a\0b", "\ud800", "x\udfffy", "é" * 50, "1", "<image>",
    "<video>", "<|image_pad|>", "<|im_end|>", "../../etc/passwd", "/etc/passwd", "file:///etc/x",
    "http://localhost/", "gs://x/y", "data:image/png;base64,AAAA", "A" * 3000, [], {}, [[]],
    [None], {"": ""}, {"a": None}, ["x"], [1, 2], {"role": "user"}, {"bytes": "x"}, "null", "NaN",
    "__EMPTY__", "\u2028", "\x85", "\ufeff", "٣", "²", "½", "𝟛", "1e400", "9" * 400, "[]", "{}",
    '[{"role": "user", "content": "q"}]', {"type": "image", "image": "1.png"},
    {"type": "text", "text": "q"}, {"min_pixels": 1024}, {"path": "1.png", "bytes": None},
)  # fmt: skip
_DEPTHS = (30, 150)
# Deeper than any parser recurses; bytes alone, since Python's own copies recurse too.
_NESTS = (b"[", b'{"a":')


def tree(rng: random.Random, value: Json, *, times: int) -> Json:
    """Return a JSON value with some places replaced, removed, doubled, added or nested."""
    value = copy.deepcopy(value)
    for _ in range(times):
        path: list[tuple[Any, Any]] = []
        node = value
        while isinstance(node, dict | list) and node and (not path or rng.random() < 0.75):
            key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
            path.append((node, key))
            node = node[key]
        if not path:
            return odd(rng)
        parent, key = path[-1]
        match rng.randrange(8):
            case 0 | 1 | 2:
                parent[key] = odd(rng)
            case 3:
                del parent[key]
            case 4:
                parent[key] = [parent[key]]
            case 5 if isinstance(parent, dict):
                parent[str(odd(rng))[:40]] = odd(rng)
            case 6 if isinstance(parent, list):
                parent.insert(key, copy.deepcopy(parent[key]))
            case 7 if rng.random() < 0.05:
                parent[key] = _nested(rng)
    return value


def odd(rng: random.Random) -> Json:
    """Return one of the odd values, for the caller to keep."""
    return copy.deepcopy(rng.choice(ODD_VALUES))


def _nested(rng: random.Random) -> Json:
    value: Json = 1
    for _ in range(rng.choice(_DEPTHS)):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def damaged(
    rng: random.Random, data: bytes, *, words: Sequence[bytes] = (), times: int | None = None
) -> bytes:
    """Return bytes with flips, cuts, insertions and repetitions; `words` may be inserted."""
    content = bytearray(data)
    for _ in range(times or rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(content) + 1)
        match rng.randrange(8):
            case 0 if content:
                content[at % len(content)] ^= 1 << rng.randrange(8)
            case 1 if content:
                content[at % len(content)] = rng.randrange(256)
            case 2:
                del content[at : at + rng.choice((1, 2, 8, 100))]
            case 3:
                content[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 4, 20))))
            case 4:
                del content[at:]
            case 5:
                content[at:at] = content[at : at + rng.choice((1, 10, 200))] * rng.choice((1, 3))
            case 6 if words:
                content[at:at] = rng.choice(words)
            case 7 if len(content) > 8:
                width = rng.choice((2, 4, 8))
                number = rng.choice((0, 1, 255, 2**31 - 1, 2**32 - 1, 2**63 - 1))
                order = rng.choice(("little", "big"))
                content[at : at + width] = (number % 256**width).to_bytes(width, order)
    return bytes(content)


def json_file(rng: random.Random, value: Json, *, times: Sequence[int] = (1, 1, 2, 3)) -> bytes:
    """Return a file's bytes: a damaged tree as JSON, now and then damaged as bytes too."""
    data = json.dumps(tree(rng, value, times=rng.choice(times))).encode()
    if rng.random() < 0.002:
        at = rng.randrange(len(data) + 1)
        return data[:at] + rng.choice(_NESTS) * rng.choice((500, 1500, 50000)) + data[at:]
    return damaged(rng, data) if rng.random() < 0.2 else data


def text(rng: random.Random, given: str, pieces: Sequence[str]) -> str:
    """Return a text in which pieces were put in place of some characters."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(given) + 1)
        given = given[:at] + rng.choice(pieces) + given[at + rng.choice((0, 0, 1, 2, 30)) :]
    return given
