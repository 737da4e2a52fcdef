"""The sampler in a run of several processes, here two on this machine."""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import config as config_lib
from models import inputs, qwen3_vl
from prism_jax import mesh as mesh_lib
from prism_jax.rollout import engine, layout, serving
from prism_jax.rollout.sampling import Sampling
from tests.models import cases

_PROCESS = """
import json, sys
import jax
from tests.rollout import test_processes
number, port = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, number)
assert len(jax.local_devices()) == 2
print("RESPONSES", json.dumps(test_processes.draw(jax.devices())))
"""


def draw(devices: list[jax.Device]) -> list[list[int]]:
    """Return the responses of a text model of one layer, trained over all devices."""
    config = config_lib.from_hf(cases.CONFIGS["dense_tied_2_levels_head64"])
    text = dataclasses.replace(config.text, vocab_size=32, hidden_size=16, num_layers=1)
    config = dataclasses.replace(config, text=text, vision=None, initializer_range=0.5)
    rules = mesh_lib.rules(mesh_lib.DEFAULT_RULES)
    sizes = {"data": 1, "fsdp": len(devices), "tensor": 1, "expert": 1}
    trained = mesh_lib.make(sizes, devices)

    def make() -> nnx.Module:
        return qwen3_vl.Qwen3VL(
            config,
            has_head=True,
            moe_implementation=None,
            rules=rules,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            rngs=nnx.Rngs(0),
        )

    graphdef, abstract = qwen3_vl.abstract(make)
    where = mesh_lib.param_shardings(abstract, trained, rules)
    with jax.set_mesh(trained):
        params = jax.jit(lambda: nnx.state(make()), out_shardings=where)()
    mesh = layout.mesh(trained, tensor=1)
    graphdef, params = serving.prepare(
        graphdef, params, dtype=jnp.float32, donate=True, mesh=mesh, rules=rules
    )
    built = engine.Engine(
        graphdef=graphdef,
        config=config,
        shapes=engine.Shapes(prompt_tokens=8, prompt_patches=1, prompt_images=1),
        prefill_implementation="xla",
        decode_implementation="xla",
        chunk_tokens=4,
        num_slots=4,
        mesh=mesh,
        rules=rules,
        say=lambda line: None,
    )
    prompts = [
        inputs.Example(
            tokens=np.arange(1, 2 + n, dtype=np.int32),
            token_types=np.zeros(1 + n, np.int32),
            grids=[],
            pixels=[],
        )
        for n in range(5)
    ]
    sampling = Sampling(temperature=1.0, top_k=None, top_p=None, max_tokens=9, end_token_ids=(1, 2))
    rollout = built.generate(params, prompts, sampling, jax.random.key(0), num_responses=3)
    return [
        row[:length].tolist() for row, length in zip(rollout.tokens, rollout.lengths, strict=True)
    ]


def test_two_processes_draw_the_responses_of_one_device():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, str(number), str(port)],
            cwd=pathlib.Path(__file__).parents[2],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        told = [process.communicate(timeout=400) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], told
    drawn = [
        json.loads(line.split("RESPONSES ")[1])
        for out, _ in told
        for line in out.splitlines()
        if "RESPONSES " in line
    ]
    expected = draw(jax.devices()[:1])
    assert len(set(map(tuple, expected))) > 10
    assert drawn == [expected, expected]
