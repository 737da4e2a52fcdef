"""A fake cloud for each test."""

import contextlib
import os
import signal

import pytest

from tests.launch import scripts


@pytest.fixture
def cloud(tmp_path):
    yield (made := scripts.Cloud(tmp_path))
    # Of a test that failed half-way: launchers, supervisors, and what they started.
    for process in made.started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    for path in made.folder.glob("*/.prism_jax/*/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(path.read_text()), signal.SIGKILL)
