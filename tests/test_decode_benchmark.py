"""The benchmark of decoding runs at the tiny size and counts what a step must read."""

import json
import subprocess
import sys

import pytest

from benchmarks import decode as benchmark
from benchmarks import kernel_times, sizes


def test_it_measures_what_was_asked_for_and_profiles(tmp_path, capsys):
    out = tmp_path / "result.json"
    asked = ["--size=tiny", "--rows", "2", "3", "--prompt_tokens=5", "--response_tokens=16"]
    asked += ["--chunk_tokens=8", "--programs", "apart", "draw", "--profile", f"--out={out}"]
    benchmark.main(asked)
    result = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == result
    found = [(r["program"], r["rows"]) for r in result["results"]]
    assert found == [("engine", 2), ("engine", 3), ("apart", 2), ("draw", 2)]
    assert len(result["results"][0]["milliseconds_a_step_by_chunk"]) == 1
    assert result["results"][0]["mean_tokens"] == 5 + 8 + 4 + 0.5
    assert result["profile"]["steps"] == 1
    assert result["profile"]["kernels"]


def test_a_step_reads_every_weight_once_and_the_tokens_so_far():
    config = sizes.SIZES["tiny"]
    text = config.text
    _, params = benchmark.random_model(config)
    case = benchmark.Case(
        graphdef=None,
        params=params,
        config=config,
        rows=3,
        prompt_tokens=7,
        chunk_tokens=1,
        implementation="xla",
        sampling=None,
    )
    d, f, n, k = text.hidden_size, text.intermediate_size, text.num_heads, text.num_kv_heads
    layer = d * text.head_dim * (2 * n + 2 * k) + 3 * d * f + 2 * d + 2 * text.head_dim
    weights = text.num_layers * layer + d + text.vocab_size * d  # the table is read as the head
    cache = 3 * 10 * text.num_layers * 2 * k * text.head_dim
    assert benchmark.needed_bytes("engine", case, 10) == 2 * (weights + cache)
    parts = [benchmark.needed_bytes(program, case, 10) for program in ("layers", "head")]
    assert sum(parts) == 2 * (weights + cache)


def test_kernels_are_added_up_by_name_and_group():
    events = [
        ("fusion_12", 2.0),
        ("fusion_7", 3.0),
        ("sm90_gemm_bf16", 4.0),
        ("input_scatter", 1.0),
    ]
    groups = (("matmul", "gemm"), ("cache write", "scatter"), ("elementwise", "fusion"))
    told = kernel_times.summarize(events, 2, groups=groups, num_kernels=2)
    assert len(told["kernels"]) == 2
    assert told["kernels"][0] == {"name": "fusion", "total_microseconds": 5.0, "count": 2}
    assert told["groups_microseconds_a_step"] == {
        "elementwise": 2.5,
        "matmul": 2.0,
        "cache write": 0.5,
    }
    assert (told["busy_microseconds_a_step"], told["kernels_a_step"]) == (5.0, 2.0)


def test_a_response_shorter_than_two_chunks_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.parse(["--response_tokens=64", "--chunk_tokens=64"])
    assert "two chunks" in capsys.readouterr().err


def test_it_imports_nothing_but_jax_flax_numpy_and_jaxtyping():
    blocked = ["grain", "ml_collections", "transformers", "torch", "tensorflow_datasets", "pyarrow"]
    blocked += ["array_record", "safetensors", "sklearn", "tensorboardX", "tokenizers", "PIL"]
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\nimport benchmarks.decode"
    subprocess.run([sys.executable, "-c", code], check=True)
