"""The benchmarks of rollouts run at the tiny size and count what a step must read."""

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import kernel_times, rollout, rollout_cases
from prism_jax.rollout.session import Look


@pytest.mark.parametrize("name", ["rollout_ragged", "rollout_scaling"])
def test_a_record_says_what_was_measured_and_how(name, tmp_path, capsys, monkeypatch):
    out = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["x", f"--record={name}", "--size=tiny", f"--out={out}"])
    rollout.main()
    record = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == record
    assert (
        record["command"] == f"python -m benchmarks.rollout --record={name} --size=tiny --out={out}"
    )
    fields = {"claim", "ratio", "target", "is_met", "limit", "device", "versions", "date", "raw"}
    assert fields <= set(record)
    assert all(value > 0 for value in record["ratio"].values())
    if name == "rollout_scaling":
        assert set(record["raw"]["tokens_per_second_a_device"]) == {"1", "2", "4"}
        assert set(record["target"]) == {"2 devices", "4 devices"}


def test_a_step_reads_every_weight_once_a_prompt_once_and_the_tokens_so_far():
    config = rollout.sizes.SIZES["tiny"]
    sampler = rollout_cases.random_sampler(
        config, rollout.jax.devices()[:2], chunk_tokens=4, tensor=1
    )
    text = config.text
    # Slot 0 reads 3, 4 and 5 places of its own in three steps, slot 1 the first and the second.
    look = Look(
        num_steps=3,
        tokens=np.array([5, 2, 0]),
        new_tokens=np.array([3, 2, 0]),
        prompt_tokens=7,
        reader_tokens=14,
        prefill_tokens=0,
        num_finished=0,
        num_left=2,
    )
    d, f, n, k = text.hidden_size, text.intermediate_size, text.num_heads, text.num_kv_heads
    layer = d * text.head_dim * (2 * n + 2 * k) + 3 * d * f + 2 * d + (n // k + 1) * text.head_dim
    weights = text.num_layers * layer + d + text.vocab_size * d  # the table is read as the head
    place = text.num_layers * 2 * k * text.head_dim
    places = 3 + 4 + 5 + 1 + 2 + 3 * 7
    expected = 2 * (3 * 2 * weights + place * places)  # two copies of the weights
    assert rollout_cases.needed_bytes(sampler, look) == expected


def test_the_ragged_lengths_have_their_mean_and_their_tail():
    lengths = rollout_cases.lengths(20_000, mean=1550, most=8192)
    assert abs(lengths.mean() / 1550 - 1) < 0.02
    assert lengths.max() == 8192
    assert 0.04 < (lengths > 2.5 * 1550).mean() < 0.06


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


def test_it_imports_what_jax_and_flax_need_alone():
    blocked = ["grain", "ml_collections", "transformers", "torch", "tensorflow_datasets", "pyarrow"]
    blocked += [
        "array_record",
        "safetensors",
        "tensorboardX",
        "tokenizers",
        "PIL",
    ]
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
    code += "import benchmarks.rollout_against"
    subprocess.run([sys.executable, "-c", code], check=True)
