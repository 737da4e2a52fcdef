"""The benchmark of the SFT update runs at the tiny size and counts what a step must multiply."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import kernel_times, make_tables, records, train, train_cases, train_variants
from benchmarks import train_step as benchmark
from prism_jax.stages.sft import step as sft_step


def test_it_measures_what_was_asked_for_and_profiles(tmp_path, capsys):
    out, hlo = tmp_path / "result.json", tmp_path / "program.txt"
    asked = ["--size=tiny", "--layers=1", "--variants", "forward", "--limit_seconds=900"]
    benchmark.main([*asked, "--profile", f"--out={out}", f"--hlo={hlo}"])
    result = json.loads(out.read_text())
    told = capsys.readouterr()
    assert json.loads(told.out) == result
    found = [(r["variant"], r["program"]) for r in result["results"]]
    assert found == [("profile", "update"), ("forward", "loss")]
    assert [f'"variant": "{name}"' in told.err for name, _ in found] == [True] * 2
    assert result["text_layers"] == 1
    assert all(r["milliseconds_a_step"] > 0 for r in result["results"])
    assert result["results"][0]["profile"]["steps"] == 2
    assert any(kernel["origin"] for kernel in result["results"][0]["profile"]["kernels"])
    assert "HloModule" in hlo.read_text()


def test_nothing_is_begun_after_the_limit(capsys):
    benchmark.main(["--size=tiny", "--variants", "default", "forward", "--limit_seconds=0"])
    told = capsys.readouterr()
    assert json.loads(told.out)["results"] == []
    assert "forward: not begun" in told.err
    assert "default: not begun" in told.err


def test_the_loss_is_that_of_the_stage():
    size = train_cases.SIZES["tiny"]
    case = train_variants.case_of("default", size, ablate="default", dtype=np.dtype("float32"))
    params = train_variants.make_model(size, case.dtype, train_variants.nnx.Rngs(0))
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), train_cases.make_batch(size))

    def of(**changes):
        changed = dataclasses.replace(case, **changes)
        return train_variants.loss_fn(changed, params, batch, jax.random.key(0))[0]["nll"]

    class Options:
        class model:
            remat = "none"

        class train:
            head_chunk_tokens, head = size.chunk_tokens, "fused"

    class Devices:
        attention = "xla"

        def token_parts(self):
            return 1

    stage = sft_step.make_loss(Options, Devices())(params, batch, jax.random.key(0))[0]["nll"]
    np.testing.assert_allclose(of().total, stage.total, rtol=1e-6)
    np.testing.assert_array_equal(of().weight, stage.weight)
    assert abs(of(has_deepstack=False).total - stage.total) > 1e-6


def test_the_operations_of_a_forward_pass_are_counted_by_hand():
    size = train_cases.SIZES["tiny"]
    batch = train_cases.make_batch(size)
    # 2 rows of 64 tokens, 2 pictures of 4 x 4 patches a row; each row has 57 tokens in two segments
    # of 14 and 43 (a quarter and three quarters of 57.6); padding is none.
    assert batch.text.segments.lengths[0, 0].tolist() == [14, 43, -1, -1]
    assert train_cases.num_tokens(batch) == 2 * 57
    found = train_cases.forward_flops(size, batch)
    maps = 64 * 16 * (2 * 4 + 2 * 2) + 3 * 64 * 128
    assert found["text"] == 2 * 128 * 4 * maps
    assert found["text attention"] == 2 * 4 * 4 * 64 * (14**2 + 43**2) / 2
    assert found["head"] == 2 * 128 * 64 * 512
    block, merger = 4 * 64 * 64 + 2 * 64 * 128, 256 * 256 + 256 * 64
    assert found["vision"] == 2 * 64 * (4 * block + 1536 * 64) + 2 * 16 * 4 * merger
    assert found["vision attention"] == 4 * 4 * 64 * 4 * 16**2
    trained = train_cases.flops(size, batch, has_backward=True)
    assert trained["all"] == 3 * sum(found.values())
    frozen = dataclasses.replace(size, frozen=("vision/.*",))
    assert train_cases.flops(frozen, batch, has_backward=True)["vision"] == found["vision"]


def test_the_sizes_of_the_small_model_are_those_of_the_configuration():
    params = train_variants.train_state.abstract_params(
        lambda rngs: train_variants.make_model(train_cases.SIZES["small"], np.float32, rngs),
        param_dtype=None,
    )[1]
    num = train_variants.qwen3_vl.num_parameters(params)
    assert 104e6 < num < 107e6


def test_kernels_are_told_with_where_they_come_from():
    program = """
      %fusion.7 = f32[2]{0} fusion(%a), kind=kLoop, metadata={op_name="jit(step)/add" source="x"}
      ROOT %dot.1 = f32[2]{0} custom-call(%b), metadata={op_name="jit(step)/dot_general"}
    """
    events = [("fusion_7", 2.0), ("fusion_7", 2.0), ("memset", 1.0)]
    told = kernel_times.summarize(
        events,
        2,
        groups=(("elementwise", "fusion"),),
        num_kernels=2,
        origins=kernel_times.sources(program),
    )
    assert told["kernels"] == [
        {"name": "fusion_7", "total_microseconds": 4.0, "count": 2, "origin": "jit(step)/add"},
        {"name": "memset", "total_microseconds": 1.0, "count": 1, "origin": ""},
    ]
    assert told["groups_microseconds_a_step"] == {"elementwise": 2.0, "other": 0.5}


def test_it_needs_no_package_of_the_data_or_of_the_configuration():
    blocked = ["grain", "ml_collections", "transformers", "torch", "tensorflow_datasets", "pyarrow"]
    blocked += ["array_record", "safetensors", "tensorboardX", "tokenizers", "PIL"]
    blocked += ["orbax", "etils"]
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
    subprocess.run([sys.executable, "-c", code + "import benchmarks.train_step"], check=True)


def test_a_record_says_what_was_measured_and_the_page_shows_it(tmp_path, capsys):
    path = tmp_path / "head.json"
    train.main(["--record=head", "--size=tiny", f"--out={path}"])
    record = json.loads(path.read_text())
    times = record["raw"]["seconds"]
    expected = times["chunked"] / times["four_matmuls"]
    assert record["ratio"]["time over the four matmuls"] == expected
    assert record["is_met"] == (
        expected <= 1.2 and record["ratio"]["peak over the naive head"] <= 0.3
    )
    assert record["versions"]["jax"] == jax.__version__
    (tmp_path / "other.json").write_text('{"device": "no record"}')
    page = tmp_path / "performance.md"
    make_tables.main([f"--results={tmp_path}", f"--out={page}"])
    assert "| `head` | log-probs over the whole vocabulary" in page.read_text()
    assert "no record" not in page.read_text()
    make_tables.main([f"--results={tmp_path}", f"--out={page}", "--check"])
    page.write_text("another\n")
    with pytest.raises(SystemExit):
        make_tables.main([f"--results={tmp_path}", f"--out={page}", "--check"])
    capsys.readouterr()


@pytest.mark.parametrize(
    ("value", "target", "is_met"),
    [(0.7, ">= 0.62", True), (0.5, ">= 0.62", False), (1.1, "<= 1.2", True), (True, "yes", True),
     (None, ">= 1", False), (False, "yes", False)],
)  # fmt: skip
def test_a_ratio_is_met_on_the_right_side_of_its_target(value, target, is_met):
    assert records.ratio(value, target)["is_met"] == is_met
