"""libtpu takes every flag, and a mesh of several slices has the slow axis outermost."""

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.launch import scripts

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
]

_PROGRAM = """
import sys
from jax.experimental import topologies
from prism_jax import errors, mesh
devices = topologies.get_topology_desc(sys.argv[1], platform="tpu", num_slices=2).devices
for data, tensor in ((2, 1), (4, 2)):
    made = mesh.make({"data": data, "fsdp": -1, "tensor": tensor, "expert": 1}, devices)
    print([sorted({device.slice_index for device in part.flat}) for part in made.devices])
try:
    mesh.make({"data": 1, "fsdp": -1, "tensor": 1, "expert": 1}, devices)
except errors.InputError as error:
    print(error)
"""


def _describe(topology, flags):
    environment = os.environ | {
        "LIBTPU_INIT_ARGS": flags,
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM, topology],
        cwd=scripts.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("generation", "topology"),
    [("v5e", "v5e:2x2"), ("v5p", "v5p:2x2x1"), ("v6e", "v6e:2x2"), ("tpu7x", "tpu7x:2x2x1")],
)
def test_libtpu_takes_every_flag_and_two_slices_are_the_outermost_axis(generation, topology):
    script = ["bash", "launch/libtpu_flags.sh", generation]
    done = subprocess.run(
        script,
        cwd=scripts.ROOT,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
        capture_output=True,
        text=True,
        check=True,
    )
    seen = _describe(topology, done.stdout.replace("\n", " "))
    assert seen.returncode == 0, seen.stderr[-2000:]
    whole, halves, refused = seen.stdout.splitlines()
    assert whole == "[[0], [1]]"
    assert halves == "[[0], [0], [1], [1]]"
    assert refused == "mesh.axes.data = 1 must be a multiple of 2, the number of slices"


def test_libtpu_refuses_a_flag_that_it_does_not_know():
    done = _describe("v5e:2x2", "--xla_tpu_no_such_flag=true")
    assert done.returncode != 0
    assert "Unknown command line flag 'xla_tpu_no_such_flag'" in done.stderr
