"""Our model against what Hugging Face's classes computed, without torch."""

import pathlib

import numpy as np
import pytest

from tests.models import cases, ours

_PATH = pathlib.Path(__file__).parent / "golden" / "parity.npz"
_KEYS = sorted({"/".join(key.split("/")[:2]) for key in np.load(_PATH) if "/" in key})


@pytest.mark.parametrize("key", _KEYS)
def test_outputs_and_gradients_equal_the_recorded_ones(key):
    golden = np.load(_PATH)
    config, rows = key.split("/")
    found = ours.forward(config, cases.ROWS[rows], rows)
    for number, row in enumerate(cases.ROWS[rows]):
        used = len(row.tokens)
        for what in ("hidden", "logits"):
            theirs = golden[f"{key}/{what}"][number, :used]
            np.testing.assert_allclose(
                found[what][number, :used], theirs, atol=1e-4 * np.abs(theirs).max()
            )
    if "moe" in config:
        np.testing.assert_allclose(found["load_balance"], golden[f"{key}/load_balance"], rtol=1e-4)
    recorded = [name for name in golden if name.startswith(f"{key}/gradient/")]
    assert len(recorded) == len(found["gradients"])
    for name in recorded:
        norm, product = golden[name]
        own = name.removeprefix(f"{key}/gradient/")
        gradient = found["gradients"][own].astype(np.float64)
        np.testing.assert_allclose(np.linalg.norm(gradient), norm, rtol=1e-4, err_msg=own)
        found_product = (gradient * cases.cotangent(own, gradient.shape)).sum()
        np.testing.assert_allclose(found_product, product, atol=1e-4 * norm + 1e-9, err_msg=own)
