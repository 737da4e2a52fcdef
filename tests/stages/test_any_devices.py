"""The published configurations run on 1 to 256 devices, and a step learns from the same on each."""

import dataclasses
import importlib
import math

import pytest
from flax import nnx

from models import discriminator, presets, qwen3_vl, sharding
from prism_jax import configuration, mesh, row_layout
from prism_jax.training import train_state

_NUM_DEVICES = (1, 2, 4, 6, 8, 12, 16, 32, 64, 96, 128, 192, 256)
_STAGES = ("sft", "warmup", "align", "rlvr")


def _options(stage: str, size: str):
    config = importlib.import_module(f"configs.{stage}").get_config(size)
    config.model.folder = "none"
    if stage == "align":
        config.discriminator.folder = "none"
    section = config.prompts if stage in ("align", "rlvr") else config.data
    section["path" if stage in ("align", "rlvr") else "train"] = ("none",)
    kind = importlib.import_module(f"prism_jax.stages.{stage}.config").Config
    return configuration.parse(kind, config)


def _params(model: str) -> nnx.State:
    if model == "discriminator":
        config, build = presets.DISCRIMINATOR_2B_MOE4X, discriminator.Discriminator
        more = {"moe_implementation": "dense"}
    else:
        config = {"4b": presets.QWEN3_VL_4B, "8b": presets.QWEN3_VL_8B}[model]
        build, more = qwen3_vl.Qwen3VL, {"has_head": True, "moe_implementation": None}
    rules = mesh.rules(mesh.DEFAULT_RULES)
    types = {"rules": rules, "dtype": "bfloat16", "param_dtype": "float32"}
    make = lambda rngs: build(config, **more, **types, rngs=rngs)  # noqa: E731
    return train_state.abstract_params(make, param_dtype=None)[1]


@pytest.mark.parametrize("size", ["4b", "8b"])
@pytest.mark.parametrize("stage", _STAGES)
def test_a_row_on_each_part_of_any_mesh_and_the_batch_stays(stage, size):
    options = _options(stage, size)
    axes, limit = dataclasses.asdict(options.mesh.axes), options.mesh.max_fsdp
    for number in _NUM_DEVICES:
        found = mesh.axis_sizes(axes, number, max_fsdp=limit)
        assert math.prod(found.values()) == number
        parts = found["data"] * found["fsdp"]
        layout = row_layout.RowLayout(row_parts=parts, token_multiple=128)
        assert not options.problems_on(layout)
        if stage == "sft":
            count, rows = options.microbatches(layout)
            assert rows == parts
            assert (count - 1) * rows < options.train.step_rows <= count * rows


@pytest.mark.parametrize("model", ["4b", "8b", "discriminator"])
def test_the_mesh_of_any_number_divides_every_published_weight(model):
    rules = mesh.rules(mesh.DEFAULT_RULES)
    limit = _options("rlvr", "4b").mesh.max_fsdp
    wrong = []
    for path, leaf in nnx.to_flat_state(_params(model)):
        spec = sharding.spec(rules, *leaf.get_metadata("axes"))
        shape = leaf.get_value().shape
        wrong += [
            (path, n)
            for n, axis in zip(shape, spec, strict=True)
            if "fsdp" in sharding.axis_names(axis) and n % limit
        ]
    assert not wrong


def test_rows_that_do_not_divide_are_told_with_the_numbers_that_would_do():
    options = _options("align", "4b")
    rows = dataclasses.replace(options.rows, num_rows=12, row_tokens=8200)
    layout = row_layout.RowLayout(row_parts=8, token_multiple=128)
    assert dataclasses.replace(options, rows=rows).problems_on(layout) == [
        "rows.num_rows must be -1, a row on each of the 8 parts (data x fsdp) of the mesh, or a "
        "multiple of 8 such as 8 or 16, got 12",
        "rows.row_tokens must be a multiple of 128 for splash attention, got 8200; 8320 would do",
    ]
