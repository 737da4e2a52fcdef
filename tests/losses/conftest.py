"""Shared by the loss tests: the recorded cases of the released code, and the train step's sum."""

import json
import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

ORACLES = pathlib.Path(__file__).parents[1] / "oracles"


@pytest.fixture
def oracle() -> Callable[[str], list[dict]]:
    """Read every case of one file of the folder PRISM_ORACLES; no file or no case fails."""

    def read(name: str) -> list[dict]:
        path = pathlib.Path(os.environ.get("PRISM_ORACLES", ORACLES)) / name
        cases = json.loads(path.read_text(encoding="utf-8"))
        assert cases, f"{path} holds no case"
        return cases

    return read


@pytest.fixture
def share() -> Callable[[dict, dict], jax.Array]:
    """Return one microbatch's share of the objective, as the train step defines it."""

    def total(terms, whole_weights):
        assert terms.keys() == whole_weights.keys()
        parts = [
            jnp.where(whole_weights[k] > 0, t.total / jnp.maximum(whole_weights[k], 1e-9), 0.0)
            for k, t in terms.items()
        ]
        return sum(parts, start=jnp.zeros(()))

    return total
