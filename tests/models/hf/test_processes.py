"""Loading and saving in a run of several processes, here two on this machine."""

import os
import pathlib
import socket
import subprocess
import sys

from tests import hf_checkpoints

_PROCESS = """
import pathlib, sys
import jax, numpy as np
from jax.sharding import Mesh
from models import sharding
from models.hf import checkpoint as hf_checkpoint
from models.hf import stream as hf_stream
from prism_jax import mesh as mesh_lib
from tests.models import hf_models

number, port, folder = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, number)
hf_stream.GROUP_BYTES = 5000
axes = dict.fromkeys(sharding.PARAM_AXES) | {"embed": "a", "mlp": "b", "vision_heads": "b"}
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
abstract = hf_models.abstract(folder / "it")
shardings = mesh_lib.param_shardings(abstract, mesh, sharding.Rules(tuple(axes.items())))
state = hf_checkpoint.load(folder / "it", abstract, shardings=shardings, dtype=None)
local = [d for d in jax.tree.leaves(state)[0].sharding.device_set if d.process_index == number]
assert len(local) == 2, local
config = hf_checkpoint.read_config(folder / "it")
options = {"layout": "4.57", "max_shard_bytes": 30_000, "copy_from": folder / "it"}
hf_checkpoint.save(folder / "back", state, config, **options)
assert (folder / "back" / "config.json").exists()
try:
    hf_checkpoint.save(folder / "back", state, config, **options)
except ValueError as error:
    print("refused:", error)
"""


def test_two_processes_load_their_shards_and_write_one_folder(tmp_path):
    stored = hf_checkpoints.write(tmp_path / "it", "moe")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = "--xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, str(number), str(port), str(tmp_path)],
            cwd=pathlib.Path(__file__).parents[3],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        told = [process.communicate(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], told
    assert "is not empty; nothing is overwritten" in told[0][0]
    assert "cannot be written to by process 0" in told[1][0]
    found = hf_checkpoints.read(tmp_path / "back")
    assert found.keys() == stored.keys()
    assert all(found[name].tobytes() == value.tobytes() for name, value in stored.items())
