"""No dead field: whatever alignment's and warm-up's configurations can say changes something.

Each field has a probe, a function of the configuration that needs no training, and a value other
than the base's; fields that change no result are named with what they change instead.
"""

import dataclasses
import functools
import json
import typing

import jax
import numpy as np
import pyarrow.parquet
import pytest

from prism_jax import errors
from tests.stages import discriminator_probes as probes
from tests.stages import rl_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = rl_run.write(tmp_path_factory.mktemp("fields"))
    _write_broken(folder)
    return folder


# Which probe sees which field, and a value that it must see.
_OPTIM = {
    "schedule": {"schedule": "linear", "end_factor": 0.5},
    "peak": {"peak": 0.5},
    "warmup_steps": {"warmup_steps": 2, "warmup_fraction": None},
    "warmup_fraction": {"warmup_fraction": 0.5},
    "end_factor": ({"schedule": "linear", "end_factor": 0.5}, {"end_factor": 0.1}),
    "b1": {"b1": 0.5},
    "b2": {"b2": 0.5},
    "eps": {"eps": 0.1},
    "weight_decay": {"weight_decay": 0.5},
    "no_decay": {"no_decay": ()},
    "frozen": {"frozen": ("a/.*",)},
    "factors": {"factors": (("a/.*", 0.1),)},
    "clip_norm": {"clip_norm": 0.1},
    "mu_dtype": {"mu_dtype": "bfloat16"},
    "nu_dtype": {"nu_dtype": "bfloat16"},
}
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 32,
    "rope_theta": 5e5,
    "tie_word_embeddings": False,
    "vision_hidden_size": 64,
    "vision_intermediate_size": 32,
    "vision_num_layers": 2,
    "vision_num_heads": 2,
    "vision_num_position_embeddings": 64,
    "vision_deepstack_layers": (),
    "initializer_range": 0.1,
}


def _at(prefix, changes):
    return {prefix + name: value for name, value in changes.items()}


def _optim(prefix, base):
    """Return for each field of an optimiser what differs before and after."""
    found = {}
    for name, change in _OPTIM.items():
        before, after = change if isinstance(change, tuple) else ({}, change)
        start = base | _at(prefix, before)
        found[prefix + name] = (start, start | _at(prefix, after))
    return found


def _each(changes):
    """Return (nothing, the change) for each field."""
    return {name: ({}, {name: value}) for name, value in changes.items()}


def _sizes(prefix):
    return _each(_at(prefix, _SIZES))


_GENTLE = {"no_decay": (".*/scale",), "peak": 0.01, "weight_decay": 0.1, "schedule": "constant"}
_GENTLE |= {"end_factor": 1.0, "warmup_fraction": 0.0}

_ALIGN = {
    probes.advantages: _each(
        {
            "advantage.caption_weight": 0.7,
            "advantage.cot_weight": 0.7,
            "advantage.eps": 0.5,
            "advantage.align_coef": 2.0,
            "advantage.accuracy_weight": 2.0,
            "advantage.format_weight": 2.0,
            "advantage.wrong_penalty": 2.0,
            "advantage.format_penalty": 2.5,
            "advantage.mode": "sign_align",
            "discriminator.score_clip": 0.5,
            "discriminator.length_beta": (("cot", 0.5),),
        }
    )
    | {
        "advantage.response_weight": (
            {"discriminator.view": "both", "advantage.response_weight": 0.1},
            {"discriminator.view": "both", "advantage.response_weight": 0.9},
        )
    },
    probes.pulls: _each({"discriminator.regulariser": 0.5, "discriminator.microbatch_pairs": 2}),
    probes.pulls_without_a_pair: _each({"discriminator.all_invalid": "released"}),
    probes.coefficients: _each({"discriminator.router": 0.01}),
    probes.dropout: _each({"discriminator.head_dropout": 0.1}),
    probes.verified: _each({"advantage.accuracy": "nobody", "advantage.format_of": "judge"}),
    probes.judged: _each({"verifier.judge": "official"}),
    probes.paces: _each(
        {
            "pace.discriminator_updates": 2,
            "pace.policy_every_steps": 2,
            "pace.discriminator_warmup_steps": 1,
        }
    ),
    probes.read: _each(
        {
            "seed": 1,
            "gate": "official",
            "discriminator.scored_token": "newline",
            "discriminator.teacher_max_tokens": 3,
            "discriminator.positions": "text_1d",
            "discriminator.sees_images": False,
            "discriminator.min_pixels": 64 * 64,
            "discriminator.max_pixels": 32 * 32,
            "discriminator.rows.row_tokens": 512,
            "discriminator.rows.row_sequences": 1,
            "discriminator.rows.num_rows": 4,
            "rows.row_tokens": 512,
            "rows.row_sequences": 1,
            "rows.num_rows": 4,
            "rollout.num_prompts": 3,
            "prompts.path": "broken.parquet",
            "prompts.max_rows": 2,
            "prompts.max_prompt_tokens": 20,
            "prompts.min_pixels": 64 * 64,
            "prompts.max_pixels": 32 * 32,
        }
    )
    | {
        "discriminator.view": (
            {},
            {
                "discriminator.view": "whole",
                "advantage.caption_weight": None,
                "advantage.cot_weight": None,
                "advantage.response_weight": 1.0,
            },
        ),
        "prompts.overlong": (
            {"prompts.max_prompt_tokens": 20},
            {"prompts.max_prompt_tokens": 20, "prompts.overlong": "filter"},
        ),
        "prompts.max_bad_rows": (
            {"prompts.path": "broken.parquet"},
            {"prompts.path": "broken.parquet", "prompts.max_bad_rows": 1},
        ),
    },
    probes.drawn_with: _each(
        {
            "rollout.num_responses": 2,
            "rollout.max_response_tokens": 64,
            "rollout.temperature": 0.5,
            "rollout.top_k": 5,
            "rollout.top_p": 0.5,
            "rollout.chunk_tokens": 8,
            "rollout.batch_responses": 4,
        }
    ),
    probes.policy_optimizer: _optim("optim.", _at("optim.", _GENTLE)),
    probes.discriminator_optimizer: _optim(
        "discriminator.optim.", _at("discriminator.optim.", _GENTLE)
    ),
    probes.policy_model: _sizes("model.sizes."),
    probes.discriminator_model: _sizes("discriminator.sizes."),
}
_SHARED = {
    probes.devices: _each(
        {
            "model.dtype": "bfloat16",
            "model.param_dtype": "bfloat16",
            "mesh.num_devices": 2,
            "mesh.rules": (("mlp", None),),
        }
    )
    | {
        f"mesh.axes.{name}": (
            {"mesh.num_devices": 2},
            {"mesh.num_devices": 2, "mesh.axes.fsdp": 1, f"mesh.axes.{name}": 2},
        )
        for name in ("data", "tensor", "expert")
    }
    | {
        "mesh.axes.fsdp": (
            {"mesh.num_devices": 2, "mesh.axes.data": -1, "mesh.axes.fsdp": 1},
            {"mesh.num_devices": 2, "mesh.axes.data": -1, "mesh.axes.fsdp": 2},
        )
    },
}
_SHARED[probes.devices]["model.param_dtype"] = (
    {"model.dtype": "bfloat16"},
    {"model.dtype": "bfloat16", "model.param_dtype": "bfloat16"},
)
_WARMUP = {
    probes.pulls: _each({"pairs.score_clip": 0.5, "pairs.regulariser": 0.5})
    | {"pairs.length_beta": ({}, {"pairs.length_beta": (("cot", 0.5),)})},
    probes.coefficients: _each({"pairs.router": 0.5}),
    probes.dropout: _each({"pairs.head_dropout": 0.1}),
    probes.read_pairs: _each(
        {
            "seed": 1,
            "data.train": ("few.jsonl",),
            "data.held_out_fraction": 0.0,
            "data.max_tokens": 20,
            "data.min_pixels": 64 * 64,
            "data.max_pixels": 32 * 32,
            "data.sees_images": False,
            "data.view": "both",
            "data.scored_token": "newline",
            "rows.row_tokens": 1024,
            "rows.row_sequences": 2,
            "rows.num_rows": 4,
            "train.num_pairs": 1,
            "evaluate.num_batches": 1,
        }
    )
    | {
        "data.overlong": (
            {"data.max_tokens": 20},
            {"data.max_tokens": 20, "data.overlong": "filter"},
        ),
        "data.gate": (
            {"data.train": ("loose.jsonl",)},
            {"data.train": ("loose.jsonl",), "data.gate": "official"},
        ),
        "data.max_bad_rows": (
            {"data.train": ("loose.jsonl",)},
            {"data.train": ("loose.jsonl",), "data.max_bad_rows": 1},
        ),
        "train.num_epochs": (
            {"train.num_steps": None, "train.num_epochs": 1},
            {"train.num_steps": None, "train.num_epochs": 2},
        ),
    },
    probes.policy_optimizer: _optim("optim.", _at("optim.", _GENTLE)),
    probes.warmed_model: _sizes("model.sizes."),
}
_REFUSING = {
    *("prompts.path", "prompts.max_prompt_tokens", "data.max_tokens", "data.train"),
    *("rows.row_sequences",),
}
# Fields that change what a run costs, keeps or says, or that only a file system decides about.
_ELSEWHERE = {
    "tests/test_loop.py, tests/test_checkpoint.py": (
        *("checkpoint.save_every_steps", "checkpoint.num_kept"),
        *("resume.step", "resume.allow_mismatch"),
    ),
    "tests/test_loop.py: how far a run goes, and when it looks at held-out rows": (
        *("train.num_steps", "train.max_skipped_in_row", "evaluate.every_steps"),
    ),
    "tests/test_progress.py, tests/test_metric_writers.py": (
        *("log.line_every_steps", "log.wandb_project"),
    ),
    "tests/test_cli.py, tests/stages/test_warmup.py: where a model comes from": (
        *("model.folder", "model.init", "discriminator.folder", "discriminator.init", "data.words"),
    ),
    "tests/models/test_equivalence.py: the same result, computed otherwise": (
        *("model.attention", "model.remat", "discriminator.remat"),
        *("train.head_chunk_tokens", "train.num_threads", "data.num_threads"),
    ),
    "tests/test_policy_update.py": (
        *("algorithm.loss", "algorithm.clip_low", "algorithm.clip_high", "algorithm.dual_clip"),
        *("algorithm.aggregation", "algorithm.norm_tokens", "algorithm.sampler_weights"),
        *("algorithm.sampler_level", "algorithm.sampler_low", "algorithm.sampler_high"),
        *("train.has_entropy",),
    ),
    "tests/rewards/test_workers.py": (
        *("verifier.num_workers", "verifier.deadline_seconds", "verifier.memory_bytes"),
    ),
    "tests/data/test_sources.py": (
        *("prompts.image_root", "prompts.cache_dir", "data.image_root", "data.cache_dir"),
    ),
    "tests/stages/test_honesty.py": ("honesty.every_steps", "honesty.num_pairs"),
    "tests/stages/test_align.py": ("rollout.dump_every_steps",),
    "one process alone": ("mesh.is_distributed",),
}
_TABLES = {"align": _ALIGN | _SHARED, "warmup": _WARMUP | _SHARED}
_CASES = [
    pytest.param(stage, probe, *states, id=f"{stage}:{field}")
    for stage, table in _TABLES.items()
    for probe, fields in table.items()
    for field, states in fields.items()
]


def _fields(kind, prefix=""):
    """Return the paths of all fields, those of sections that may be absent included."""
    found = set()
    for field in dataclasses.fields(kind):
        options = [field.type, *typing.get_args(field.type)]
        section = [x for x in options if isinstance(x, type) and dataclasses.is_dataclass(x)]
        path = prefix + field.name
        found |= _fields(section[0], f"{path}.") if section else {path}
    return found


@pytest.mark.parametrize("stage", probes.STRUCTS)
def test_every_field_is_in_the_table_or_named_with_the_test_that_sees_it(stage):
    seen = {field for fields in _TABLES[stage].values() for field in fields}
    named = {field for fields in _ELSEWHERE.values() for field in fields}
    assert not seen & named
    assert _fields(probes.STRUCTS[stage]) - named == seen


def _write_broken(folder):
    """Write the prompts with one teacher that only the released gate accepts, and such a pair."""
    table = pyarrow.parquet.read_table(folder / "corpus" / "align" / "train.parquet")
    place = table.column_names.index("teacher_caption")
    values = table.column(place).to_pylist()
    values[0] = "<caption></caption>"
    table = table.set_column(place, "teacher_caption", [values])
    pyarrow.parquet.write_table(table, folder / "corpus" / "align" / "broken.parquet")
    first, *rest = (folder / "pairs" / "pairs.jsonl").read_text().splitlines()
    row = json.loads(first) | {"student_caption": "<caption></caption>"}
    (folder / "pairs" / "loose.jsonl").write_text("\n".join([json.dumps(row), *rest]) + "\n")
    (folder / "pairs" / "few.jsonl").write_text("\n".join(rest[4:]) + "\n")


_FILES = {
    "broken.parquet": "corpus/align/broken.parquet",
    "loose.jsonl": "pairs/loose.jsonl",
    "few.jsonl": "pairs/few.jsonl",
}


def _placed(value, folder):
    """Return a value with the names of files as paths."""
    if isinstance(value, tuple):
        return tuple(_placed(one, folder) for one in value)
    return str(folder / _FILES[value]) if isinstance(value, str) and value in _FILES else value


def _outcome(probe, stage, folder, changes, workdir):
    """Return what a probe sees as bytes; what it refuses is an outcome too."""
    changes = {name: _placed(value, folder) for name, value in changes.items()}
    options = probes.options(stage, folder, changes)
    arguments = [options, folder]
    if "workdir" in probe.__code__.co_varnames[: probe.__code__.co_argcount]:
        workdir.mkdir()
        arguments.append(workdir)
    try:
        found = probe(*arguments)
    except errors.InputError as error:
        return str(error)
    leaves, structure = jax.tree.flatten(found)
    told = [
        (str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes())
        if isinstance(leaf, np.ndarray | jax.Array)
        else repr(leaf)
        for leaf in leaves
    ]
    return told, str(structure)


@functools.cache
def _base(probe, stage, folder, before):
    workdir = folder / f"base-{len(list(folder.iterdir()))}"
    return _outcome(probe, stage, folder, dict(before), workdir)


@pytest.mark.parametrize(("stage", "probe", "before", "after"), _CASES)
def test_every_field_changes_the_result(folder, tmp_path, stage, probe, before, after):
    base = _base(probe, stage, folder, tuple(before.items()))
    found = _outcome(probe, stage, folder, after, tmp_path / "changed")
    assert found != base
    # A refusal is a result where the field says what is refused, and nowhere else.
    is_about_refusal = _REFUSING & (set(before) | set(after))
    assert is_about_refusal or not isinstance(base, str), base
    assert is_about_refusal or not isinstance(found, str), found
