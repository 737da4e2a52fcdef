"""Read a recorded file; a missing one is a failure, never a skip."""

import json
import os
import pathlib

_HERE = pathlib.Path(__file__).parent.parent / "oracles"


def read(name: str) -> list[dict]:
    folder = pathlib.Path(os.environ.get("PRISM_ORACLES", _HERE))
    cases = json.loads((folder / name).read_text())
    assert cases, f"{folder / name} holds no case"
    return cases
