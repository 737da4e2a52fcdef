"""A fake cloud for each test."""

import contextlib
import os
import signal

import pytest

from tests.launch import scripts


@pytest.fixture
def cloud(tmp_path):
    yield (made := scripts.Cloud(tmp_path))
    # Supervisors, and what they started, of a test that failed half-way.
    for path in made.folder.glob("*/.prism_jax/*/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(path.read_text()), signal.SIGKILL)
