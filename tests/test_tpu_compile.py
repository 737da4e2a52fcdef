"""Compile small models for TPU topologies, in processes of their own that load libtpu."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from benchmarks import tpu_bytes, tpu_compile, tpu_programs
from models import qwen3_vl
from prism_jax import mesh as mesh_lib
from prism_jax.rollout import serving

_ROOT = pathlib.Path(tpu_compile.__file__).parents[1]
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def _compile(
    topology: str, program: str, *models: str, length: int, mesh: str = "fsdp=-1"
) -> list[dict]:
    """Return what the benchmark prints for each model, with one packed row a chip."""
    command = [sys.executable, "-m", "benchmarks.tpu_compile", "--model", *models]
    command += ["--topology", topology, "--program", program, "--mesh", mesh]
    command += ["--row_tokens", str(length), "--row_patches", str(length)]
    # Eight pretended CPU devices of the other tests would only slow this down.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        command,
        cwd=_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.tpu
@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x4"])
def test_gradients_compile_with_splash_heads_128_64_72_and_gather_weights_alone(topology):
    length = 256
    results = _compile(topology, "gradient", "small_64", "small_72", length=length)
    assert [result["model"] for result in results] == ["small_64", "small_72"]
    for result, vision_width in zip(results, (128, 144), strict=True):
        assert result["verdict"] == "fits"
        assert result["pallas_kernels"] >= 4  # text and vision, forward and backward
        # The merger's square, bfloat16; the hidden states of 16 chips would be 2 MiB.
        largest_weight = (4 * vision_width) ** 2 * 2
        gathered = [c for c in result["largest_collectives"] if c["kind"] == "all-gather"]
        assert gathered, "weights are sharded, so some must be gathered"
        assert gathered[0]["bytes"] <= largest_weight


@pytest.mark.tpu
@pytest.mark.slow
@needs_libtpu
def test_a_mesh_that_splits_an_axis_of_the_torus_compiles():
    # 16 chips lie as 4 x 4; two of them share each weight's heads.
    (result,) = _compile("v5e:4x4", "forward", "small_64", length=256, mesh="fsdp=-1,tensor=2")
    assert result["verdict"] == "fits"
    assert result["pallas_kernels"] >= 2


@pytest.mark.tpu
@pytest.mark.slow
@needs_libtpu
def test_a_step_of_decoding_compiles_with_its_kernel_for_prompts_and_for_responses():
    (result,) = _compile("v6e:2x4", "decode", "small_64", length=256, mesh="data=-1,tensor=2")
    assert result["verdict"] == "fits"
    assert result["pallas_kernels"] == 2 * 2  # in each layer


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_decoding_is_compiled_of_the_parameters_that_the_sampler_reads(tensor):
    case = tpu_programs.Case(
        model="small_64",
        topology="",
        program="decode",
        mesh="",
        row_tokens=8,
        row_patches=8,
        rows=1,
        chunk_tokens=4,
        moe_implementation=None,
    )
    mesh = mesh_lib.make({"data": 1, "fsdp": 8 // tensor, "tensor": tensor, "expert": 1})
    rules = mesh_lib.rules(mesh_lib.DEFAULT_RULES)
    _, (params, _, _) = tpu_programs.program(case, mesh)
    compiled = dict(nnx.to_flat_state(params))

    model = qwen3_vl.Qwen3VL(
        tpu_programs.MODELS["small_64"],
        has_head=True,
        moe_implementation=None,
        rules=rules,
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
        rngs=nnx.Rngs(0),
    )
    graphdef, params = nnx.split(model)
    spread = jax.device_put(params, mesh_lib.param_shardings(params, mesh, rules))
    read = serving.prepare(
        graphdef,
        spread,
        dtype=jnp.bfloat16,
        donate=False,
        mesh=mesh,
        rules=rules,
        join=False,
    )[1]
    found = {path: leaf.get_value() for path, leaf in nnx.to_flat_state(read)}

    assert set(compiled) == set(found)
    for path, leaf in found.items():
        shape = compiled[path].get_value()
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype), path
        assert shape.sharding.is_equivalent_to(leaf.sharding, leaf.ndim), path


def test_bytes_moved_are_counted_without_fast_memory_and_tables():
    hlo = """
%other (p: f32[4]) -> f32[4] {
  %x = f32[1000]{0} add(%p, %p)
}
%body (p: (bf16[8,128], f32[100,4])) -> f32[4] {
  %w = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=0
  %table = f32[100,4]{1,0} get-tuple-element(%p), index=1
  %start = (bf16[8,128]{1,0:T(8,128)S(1)}, bf16[8,128]{1,0}, u32[]{:S(2)}) copy-start(%w)
  %done = bf16[8,128]{1,0:T(8,128)S(1)} copy-done(%start)
  %slice = ((bf16[8,128]{1,0}), bf16[2,128]{1,0:T(8,128)S(1)}, s32[]) slice-start(%w)
  %rows = s32[2]{0:T(128)S(1)} fusion(%done), kind=kLoop
  %gather_fusion = f32[2,4]{1,0} fusion(%table, %rows), kind=kCustom
  %scatter_fusion = f32[100,4]{1,0} fusion(%table, %rows, %gather_fusion), kind=kCustom
  %out = f32[6]{0} custom-call(%scatter_fusion, %done), custom_call_target="tpu_custom_call"
}
"""
    # The weight once and a quarter of it, the gathered rows read and written, the same scattered,
    # the kernel's table.
    expected = 2048 + 512 + 2 * 32 + 2 * 32 + (1600 + 24)
    assert tpu_bytes.moved_bytes(tpu_bytes.body(hlo)) == expected


def test_collectives_are_read_from_the_compiled_text():
    hlo = """
      %all-gather.1 = bf16[1,4,8]{2,1,0:T(8,128)S(1)} all-gather(%x), metadata={op_name="a/dot"}
      %all-gather.2 = bf16[1,4,8]{2,1,0:T(8,128)(2,1)} all-gather(%y), metadata={op_name="a/dot"}
      %start = (f32[2,3]{1,0}, f32[16,3]{1,0}, u32[]) all-gather-start(%z), dimensions={0}
      %sum = pred[5]{0} all-reduce(%w), metadata={op_name="b"}
%all-reduce-scatter.1 (input: f32[8,4]) -> f32[8,1] {
      %inner = f32[8,4]{1,0} all-reduce(%input)
}
%main (x: f32[4]) -> f32[4] {
      %fusion = f32[100]{0} fusion(%all-gather.1), calls=%all-reduce-like
    """
    expected = [
        (192, "f32[16,3]", "all-gather", "", 1),
        (128, "f32[8,4]", "reduce-scatter", "", 1),
        (64, "bf16[1,4,8]", "all-gather", "a/dot", 2),
        (5, "pred[5]", "all-reduce", "b", 1),
    ]
    assert [tuple(found.values()) for found in tpu_compile.collectives(hlo)] == expected


def test_a_result_replaces_the_older_one_of_the_same_case(tmp_path):
    case = {
        "model": "4b",
        "topology": "v5e:4x4",
        "program": "forward",
        "mesh": "fsdp=-1",
        "row_tokens": 8,
        "row_patches": 8,
        "rows": 1,
        "chunk_tokens": 4,
        "moe_implementation": None,
    }
    path = tmp_path / "table.json"
    tpu_compile.store(path, case | {"verdict": "old"})
    tpu_compile.store(path, case | {"verdict": "new"})
    tpu_compile.store(path, case | {"program": "gradient", "verdict": "other"})
    assert [row["verdict"] for row in json.loads(path.read_text())] == ["new", "other"]
