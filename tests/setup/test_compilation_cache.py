"""Programs are kept in the user's cache, unless the user names another place."""

import os
import subprocess
import sys

import pytest

from prism_jax.setup import compilation_cache


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        ({"XDG_CACHE_HOME": "/cache"}, "/cache/prism_jax/compiled_"),
        ({"XDG_CACHE_HOME": ""}, os.path.expanduser("~/.cache/prism_jax/compiled_")),
        ({compilation_cache.VARIABLE: "/mine"}, "/mine"),
        ({compilation_cache.VARIABLE: ""}, ""),
        ({"XDG_CACHE_HOME": "relative"}, None),
    ],
)
def test_the_users_folder_counts_before_the_default(given, folder):
    compilation_cache.set_default(given)
    found = given.get(compilation_cache.VARIABLE)
    assert compilation_cache.is_default(given) == (folder is not None and folder.endswith("_"))
    assert found == folder or (folder.endswith("_") and found.startswith(folder))


def test_the_program_keeps_what_it_compiles(tmp_path):
    # The program as it is started, with a command that compiles nothing and prints where it would.
    script = (
        "import runpy, sys\n"
        "from prism_jax import main\n"
        "main.main = lambda argv: print(__import__('jax').config.jax_compilation_cache_dir)\n"
        "sys.argv = ['prism_jax']\n"
        "runpy.run_module('prism_jax', run_name='__main__')\n"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    environment.pop(compilation_cache.VARIABLE, None)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith(f"{tmp_path}/prism_jax/compiled_"), done.stderr
