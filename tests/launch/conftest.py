"""A fake cloud for each test."""

import pytest

from tests.launch import scripts


@pytest.fixture
def cloud(tmp_path):
    return scripts.Cloud(tmp_path)
