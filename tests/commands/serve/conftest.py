"""One server for all tests of the folder; the last file of it stops the server."""

import pytest

from tests.commands.serve import running


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    yield from running.servers(tmp_path_factory.mktemp("serve"))
