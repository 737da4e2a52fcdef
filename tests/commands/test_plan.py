"""`plan`: what is counted, compiled and estimated, and the changes that make a job fit."""

import dataclasses
import json
import pathlib
import re
import types

import jax
import pytest

from benchmarks import scale_model, tpu_compile
from prism_jax import errors, main
from prism_jax import mesh as mesh_lib
from prism_jax.commands.plan import (
    compiling,
    machines,
    memory,
    opening,
    page,
    planning,
    table,
)
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.policy import programs as policy_programs
from prism_jax.rollout import decode, prefill
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import programs
from prism_jax.stages.align import main as align_main
from prism_jax.stages.align import programs as align_programs
from prism_jax.stages.align import updates as align_updates
from tests.commands import planned
from tests.stages import rl_run
from tests.test_tpu_compile import needs_libtpu

_RECORDS = pathlib.Path(tpu_compile.__file__).parent / "results/tpu_compile.json"
# A Qwen3-VL with heads of the published sizes, 128 and 64.
_SMALL = {
    "model_type": "qwen3_vl",
    "tie_word_embeddings": True,
    "image_token_id": 60,
    "video_token_id": 61,
    "vision_start_token_id": 62,
    "vision_end_token_id": 63,
    "text_config": {
        "hidden_act": "silu",
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e6,
        "rope_scaling": {"mrope_section": [24, 20, 20], "rope_type": "default"},
        "tie_word_embeddings": True,
    },
    "vision_config": {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 128,
        "intermediate_size": 256,
        "depth": 2,
        "num_heads": 2,
        "in_channels": 3,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 64,
        "out_hidden_size": 256,
        "deepstack_visual_indexes": [0],
    },
}


@pytest.mark.parametrize("stage", opening.STAGES)
def test_each_device_holds_its_share_of_the_weights_in_every_phase(stage):
    whole = planned.estimate(stage, "4b", "v5p:2x2x1", **{"mesh.num_devices": 1})
    parts = planned.estimate(stage, "4b", "v5p:2x2x1")
    assert [phase.name for phase in parts.phases] == [phase.name for phase in whole.phases]
    for one, all_ in zip(parts.phases, whole.phases, strict=True):
        held = {**one.parts, **one.beside}
        for name, size in {**all_.parts, **all_.beside}.items():
            if name.endswith(("parameters", "states")):
                assert held[name] == pytest.approx(size / 4, rel=1e-3), name
            elif name.endswith("weights"):
                # A copy for decoding on each device: 4B leaves room for responses beside it.
                assert held[name] == pytest.approx(size, rel=1e-3), name
        assert any(size > 1 for size in held.values())


def test_the_sampler_takes_the_memory_that_training_leaves():
    plans = {
        number: planned.estimate("rlvr", "8b", "v5p:2x2x4", **{"mesh.num_devices": number})
        for number in (2, 16)
    }
    few, many = (plan.phases[1] for plan in plans.values())
    # Sixteen devices give every response a slot, two are filled: states, two devices to a copy of
    # the weights, and keys and values up to 0.94 of the rest.
    assert many.total < 0.8 * plans[16].opened.machine.generation.hbm_gib
    hbm = plans[2].opened.machine.generation.hbm_gib
    # Slots are a multiple of eight: up to seven short ones more would fit.
    sizes = re.findall(r"(\d+)(?: prompts)? x (\d+)", plans[2].opened.programs[0].note)
    places = sum(int(rows) * int(length) for rows, length in sizes)
    left = 7 * int(sizes[0][1]) / places * few.parts["caches"]
    assert 0.9 * hbm - left < few.total <= hbm
    assert few.fits(hbm)
    slots = {n: plan.opened.programs[0].note.partition(" x ")[0] for n, plan in plans.items()}
    assert slots[16].endswith(" 512"), slots


@pytest.mark.parametrize("memory_kind", ["device", "host"])
def test_moments_in_the_hosts_memory_take_none_of_the_device(memory_kind):
    plan = planned.estimate("sft", "4b", "v5p:2x2x1", **{"optim.memory": memory_kind})
    (update,) = plan.phases
    # The states of what is no stack of layers, the embedding, stay: 0.39 of 4.02 billion.
    share = update.parts["states"] / (2 * update.parts["parameters"])
    assert share < 0.11 if memory_kind == "host" else share > 0.8
    (told,) = (line for line in page.lines(plan) if line.startswith("memory of a host"))
    sizes = [float(part) for part in re.findall(r"(\d+) (?:GiB for a save|for the opt)", told)]
    # A save copies what is on the devices; float32 weights and two moments are 12 bytes each.
    assert len(sizes) == 1 + (memory_kind == "host")
    assert sum(sizes) == pytest.approx(3 * update.parts["parameters"] * 4, rel=0.1)


def test_adapters_alone_have_gradients_and_states():
    whole, adapters = (
        planned.estimate("sft", "8b", "v5e:4x4", **{"model.lora.rank": rank}).phases[0]
        for rank in (None, 16)
    )
    assert adapters.parts["states"] < 0.1 * whole.parts["states"]
    assert adapters.temporary < whole.temporary - 0.9 * whole.parts["parameters"]


def _shapes(tree) -> dict:
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    assert structure.num_leaves
    return {jax.tree_util.keystr(path): (leaf.shape, str(leaf.dtype)) for path, leaf in leaves}


_STEADYING = (
    *("ema_decay=0.9", "gradient_penalty=0.1", "penalty_noise=0.1"),
    *("replay_prompts=2", "replay_steps=1"),
)


@pytest.mark.slow
def test_the_programs_of_a_plan_are_those_that_a_run_calls(tmp_path, monkeypatch):
    """Compare the shapes of the arguments of every program of a step of alignment."""
    called, opened = {}, {}

    def recorded(phase, function, first):
        def call(*arguments, **static):
            called.setdefault(phase, []).append(_shapes(arguments[first:]))
            return function(*arguments, **static)

        return call

    def open_updates(*arguments, **options):
        starts, updates = make_updates(*arguments, **options)
        return starts, dataclasses.replace(
            updates,
            policy=recorded("policy's update", updates.policy, 0),
            discriminator=recorded("discriminator's update", updates.discriminator, 0),
        )

    def open_experience(run, policy, discriminator, *, feed, shapes, **rest):
        opened.update(run=run, models=(policy, discriminator), feed=feed, shapes=shapes)
        return make_experience(run, policy, discriminator, feed=feed, shapes=shapes, **rest)

    make_updates, make_experience = align_updates.open_updates, align_main.open_experience
    make_scorer, make_advance = discriminator_loss.make_scorer, decode.advance
    with monkeypatch.context() as patch:
        patch.setattr(align_updates, "open_updates", open_updates)
        patch.setattr(align_main, "open_experience", open_experience)
        patch.setattr(
            discriminator_loss, "make_scorer", lambda *a: recorded("scores", make_scorer(*a), 0)
        )
        patch.setattr(decode, "advance", lambda *a: recorded("decode", make_advance(*a), 0))
        patch.setattr(prefill, "fill", recorded("prefill", prefill.fill, 1))
        done = rl_run.run(
            *("align", rl_run.write(tmp_path / "files"), tmp_path / "run"),
            *("--config.mesh.num_devices=2", "--config.train.num_steps=1"),
            *("--config.rows.num_rows=-1", "--config.discriminator.rows.num_rows=-1"),
            *("--config.rows.has_shared_prompts=True", "--config.optim.memory=host"),
            *("--config.discriminator.rows.has_shared_prompts=True", "--config.seed=1"),
            "--config.honesty.every_steps=None",
            *(f"--config.discriminator.steadying.{field}" for field in _STEADYING),
        )
    assert done == 0
    sizes, run = opened["feed"].sizes, opened["run"]
    described = devices_lib.Described(platform="cpu", memory_bytes=1 << 40)
    monkeypatch.setattr(align_programs, "_shapes", lambda *_: opened["shapes"])
    # As many end tokens as the tokenizer of this model has.
    monkeypatch.setattr(policy_programs, "_END_TOKENS", opened["feed"].words.ids.ends)
    listed = align_programs.programs_of(
        run.options,
        dataclasses.replace(run.devices, described=described),
        dict(zip(("policy", "discriminator"), opened["models"], strict=True)),
        programs.Bounds(
            prompt_tokens=max(size.tokens for size in sizes),
            prompt_patches=max(size.patches for size in sizes),
            prompt_images=max(size.images for size in sizes),
            teacher_tokens=1,
        ),
    )
    called["scores of the mean"] = called["scores"][1:]
    assert {program.phase for program in listed} == set(called)
    for program in listed:
        # Prefill has two sizes, one prompt a part and as many as are read together: the larger.
        largest = called[program.phase][0]
        assert _shapes(program.arguments[program.phase == "prefill" :]) == largest, program.phase


def test_estimates_of_temporaries_are_near_what_was_compiled():
    """See the records' own page, docs/tpu_memory.md, for what was compiled."""
    ratios = []
    for record in json.loads(_RECORDS.read_text()):
        if record["program"] not in ("gradient", "train") or "temporary_gib" not in record:
            continue
        parts = machines.tpu(record["topology"], num_slices=1).num_devices
        is_policy = record["model"] != "discriminator"
        work = programs.Work(
            model=opening.MODELS[record["model"]],
            tokens=parts * record["row_tokens"],
            attended_tokens=parts * record["row_tokens"],
            sequence_tokens=record["row_tokens"],
            patches=parts * record["row_patches"],
            head_tokens=parts * record["row_tokens"] * is_policy,
            calls=1,
            has_gradient=True,
            is_decoding=False,
            remat="full",
            head_chunk_tokens=record["chunk_tokens"],
        )
        mesh = types.SimpleNamespace(shape=mesh_lib.axis_sizes({"fsdp": parts}, parts))
        devices = types.SimpleNamespace(mesh=mesh, token_parts=lambda parts=parts: parts)
        # The gradients are outputs of the one program, and of the state's size in the other.
        program = types.SimpleNamespace(
            work=work, devices=devices, gradients=(), parts={}, beside={}, phase="", is_fitted=False
        )
        found = memory.estimated(program).temporary / memory.ESTIMATE_FACTOR
        found += record["arguments_gib"] / 3 if record["program"] == "train" else 0
        ratios.append(found / record["temporary_gib"])
    assert len(ratios) == 10
    assert min(ratios) + 0.02 >= 1 / memory.ESTIMATE_FACTOR
    assert max(ratios) < 1.4


def test_what_is_advised_fits_and_each_change_is_needed():
    plan = planned.estimate("sft", "8b", "v5e:4x4")
    assert not plan.fits
    changes, found = planning.advise(plan, None)
    assert found.fits
    assert changes
    for name in changes:
        fewer = {key: value for key, value in changes.items() if key != name}
        assert not planning.make(planning.changed(plan.job, fewer), None).fits, name


def test_nothing_is_advised_where_nothing_helps():
    plan = planned.estimate("align", "8b", "v5e:2x2")
    assert planning.advise(plan, None) is None


@pytest.mark.parametrize("stage", ["align", "rlvr"])
def test_an_open_teacher_is_counted_in_every_phase(stage, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(_SMALL))
    changes = {"distill.folder": str(tmp_path), "distill.coefficient": 1.0}
    plan = planned.estimate(stage, "4b", "v5p:2x2x2", **changes)
    update = plan.phases[-1]
    assert update.parts["teacher"] > 0
    for phase in plan.phases[:-1]:
        assert phase.beside["teacher"] == update.parts["teacher"], phase.name
    assert "the time leaves out the teacher's forward pass" in "\n".join(page.lines(plan))
    without = planned.estimate(stage, "4b", "v5p:2x2x2")
    assert "teacher" not in {**without.phases[-1].parts, **without.phases[-1].beside}


@pytest.mark.parametrize(
    ("topology", "gcloud", "hosts", "devices"),
    [
        ("v5e:4x4", "v5litepod-16 (runtime v2-alpha-tpuv5-lite)", 4, 16),
        ("v5p:2x4x4", "v5p-64 (runtime v2-alpha-tpuv5)", 8, 32),
        ("v6e:2x4", "v6e-8 (runtime v2-alpha-tpuv6e)", 1, 8),
        ("tpu7x:2x2x2", "tpu7x, through GKE alone (launch/gke.sh)", 2, 16),
    ],
)
def test_a_topology_is_named_as_gcloud_names_it(topology, gcloud, hosts, devices):
    machine = machines.tpu(topology, num_slices=1)
    assert (machine.gcloud_type(), machine.num_hosts, machine.num_devices) == (
        gcloud,
        hosts,
        devices,
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--topology=v9:2x2",), "--topology=v9:2x2: must be KIND:AxB"),
        (("--topology=v5p:4x4",), "v5p has 3 dimensions"),
        (("--topology=v5e:4x4", "--config.rows.num_rows=5"), "a multiple of 16 such as 16, got 5"),
        (("--topology=v5e:4x4", "--config.rows.row_tokens=10250"), "10368 would do"),
        (("--topology=v5e:4x4", "--teacher=8b"), "this rlvr has no teacher, only policy"),
        ((), "--topology=… (or --gpus=N) must be given"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(capsys, arguments, told):
    assert main.main(["plan", "--config=configs/rlvr.py:4b", "--no-compile", *arguments]) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_gpus_are_estimated_and_said_to_be(capsys):
    command = ["plan", "--config=configs/sft.py:4b", "--gpus=4", "--hbm=80"]
    assert main.main(command) == 0
    told = capsys.readouterr().out
    assert "4 x GPU of 80 GB" in told
    assert "fits (estimate)" in told
    assert "compiled" not in told
    assert "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB" not in told
    assert main.main(["plan", "--config=configs/sft.py:8b", "--gpus=8", "--hbm=80"]) == 0
    # 4 bytes for each of 8.77 billion parameters, 8 more but for the tower's 0.58, and a tenth.
    assert "set XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB=104" in capsys.readouterr().out
    assert main.main([*command[:2], "--gpus=1", "--hbm=24"]) == 1


@needs_libtpu
@pytest.mark.tpu
@pytest.mark.slow
def test_a_stage_is_compiled_by_its_own_programs_and_kept(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(_SMALL))
    command = [
        *("plan", "--config=configs/sft.py:tiny", "--topology=v5e:2x2", f"--model={tmp_path}"),
        *(f"--cache={tmp_path / 'kept'}", "--config.model.dtype=bfloat16"),
        *("--config.data.row_tokens=256", "--config.data.row_patches=(256,)"),
        *("--config.train.num_rows=-1", "--config.train.step_rows=8"),
    ]
    assert main.main(command) == 0
    told = capsys.readouterr().out
    assert "v5litepod-4" in told
    assert "fits (compiled)" in told
    (kept,) = (tmp_path / "kept").iterdir()
    found = json.loads(kept.read_text())
    # The state is updated in place.
    assert 0 < found["alias"] <= found["argument"]
    monkeypatch.setattr(compiling, "_run", lambda *_: pytest.fail("compiled twice"))
    assert main.main(command) == 0
    # Other code, or another field, is another program.
    with monkeypatch.context() as patch:
        patch.setattr(compiling, "code_digest", lambda: "other")
        with pytest.raises(BaseException, match="compiled twice"):
            main.main(command)


def test_a_compilation_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    job = planned.job("sft", "4b", "v5e:4x4")
    monkeypatch.setattr(compiling.importlib.metadata, "version", lambda _: "1")
    limits = compiling.Limits(seconds=0.0, gibibytes=16.0)
    with pytest.raises(errors.InputError, match="takes more than 0 s: give --compile-seconds"):
        compiling.compile_phase(job, "update", cache=tmp_path, limits=limits)
    limits = dataclasses.replace(limits, seconds=600.0, gibibytes=0.0)
    with pytest.raises(errors.InputError, match="give --compile-gib"):
        compiling.compile_phase(job, "update", cache=tmp_path, limits=limits)


def test_the_pages_are_those_of_their_scripts():
    docs = _RECORDS.parents[2] / "docs"
    rows = [table.Row(**row) for row in json.loads((docs / "fits.json").read_text())]
    assert (docs / "fits.md").read_text() == table.text(rows)
    assert (docs / "scale.md").read_text() == scale_model.page()


def test_every_published_configuration_has_a_machine_of_each_kind_but_the_smallest():
    docs = _RECORDS.parents[2] / "docs"
    rows = [table.Row(**row) for row in json.loads((docs / "fits.json").read_text())]
    fitting = {(row.stage, row.size, row.machine.partition(":")[0]) for row in rows if row.fits}
    expected = {
        (stage, size, kind)
        for stage in opening.STAGES
        for size in table.SIZES
        for kind in ("v5p", "v6e", "tpu7x")
    }
    assert expected <= fitting
