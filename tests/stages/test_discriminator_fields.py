"""No dead field: whatever alignment's and warm-up's configurations can say changes something.

Each field has a probe, a function of the configuration that needs no training, and a value other
than the base's; fields that change no result are named with what they change instead.
"""

import functools
import json

import pyarrow.parquet
import pytest

from prism_jax.policy import distill
from prism_jax.stages.align import main as align_main
from prism_jax.stages.warmup import main as warmup_main
from tests.stages import discriminator_probes as probes
from tests.stages import field_tables, rl_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = rl_run.write(tmp_path_factory.mktemp("fields"))
    _write_broken(folder)
    return folder


# Which probe sees which field, and a value that it must see.
_ALIGN = {
    probes.advantages: field_tables.each(
        {
            "advantage.caption_weight": 0.7,
            "advantage.cot_weight": 0.7,
            "advantage.credit": "segment",
            "advantage.scale": "teacher",
            "advantage.std_floor": 9.0,
            "discriminator.lengths.is_fitted": True,
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
    probes.pulls: field_tables.each(
        {
            "discriminator.regulariser": 0.5,
            "discriminator.microbatch_pairs": 2,
            "discriminator.lengths.match_ratio": 1.5,
            "discriminator.lengths.swap_coefficient": 0.5,
            "discriminator.score_dtype": "bfloat16",
        }
    ),
    probes.pulls_without_a_pair: field_tables.each({"discriminator.all_invalid": "released"}),
    probes.coefficients: field_tables.each({"discriminator.router": 0.01}),
    probes.settings: field_tables.each(
        {"discriminator.head_dropout": 0.1, "discriminator.score_dtype": "bfloat16"}
    )
    | field_tables.each(
        {
            "discriminator.steadying.gradient_penalty": 2.0,
            "discriminator.steadying.penalty_noise": 0.2,
        },
        before={
            "discriminator.steadying.gradient_penalty": 1.0,
            "discriminator.steadying.penalty_noise": 0.1,
        },
    ),
    probes.gated: field_tables.each({"advantage.teacher_gate": "verify"}),
    probes.averaged: field_tables.each({"discriminator.steadying.ema_decay": 0.75}),
    probes.replayed: field_tables.each(
        {
            "discriminator.steadying.replay_prompts": 2,
            "discriminator.steadying.replay_steps": 1,
        },
        before={
            "discriminator.steadying.replay_prompts": 1,
            "discriminator.steadying.replay_steps": 3,
        },
    ),
    probes.verified: field_tables.each(
        {"advantage.accuracy": "nobody", "advantage.format_of": "judge"}
    ),
    probes.judged: field_tables.each(
        {
            "judge.rule": "official",
            "judge.num_workers": 3,
            "judge.deadline_seconds": 3.0,
            "judge.memory_bytes": 1 << 30,
        }
    ),
    probes.threads: field_tables.each({"train.num_threads": 3}),
    probes.paces: field_tables.each(
        {
            "pace.discriminator_updates": 2,
            "pace.policy_every_steps": 2,
            "pace.discriminator_warmup_steps": 1,
            "pace.discriminator_max_accuracy": 0.75,
            "pace.policy_min_accuracy": 0.75,
        }
    ),
    probes.read: field_tables.each(
        {
            "seed": 1,
            "gate": "official",
            "discriminator.scored_token": "newline",
            "discriminator.teacher_max_tokens": 3,
            "discriminator.positions": "text_1d",
            "discriminator.lengths.equal_min_tokens": 2,
            "discriminator.sees_images": False,
            "discriminator.min_pixels": 64 * 64,
            "discriminator.max_pixels": 32 * 32,
            "discriminator.rows.row_tokens": 512,
            "discriminator.rows.row_sequences": 1,
            "discriminator.rows.num_rows": 4,
            "discriminator.rows.has_shared_prompts": True,
            "rows.row_tokens": 512,
            "rows.row_sequences": 1,
            "rows.num_rows": 4,
            "rows.has_shared_prompts": True,
            "rollout.num_prompts": 3,
            "prompts.path": ("broken.parquet",),
            "prompts.max_rows": 2,
            "prompts.max_prompt_tokens": 20,
            "prompts.min_pixels": 64 * 64,
            "prompts.max_pixels": 32 * 32,
            "prompts.limit_image_pixels": 1,
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
            {"prompts.path": ("broken.parquet",)},
            {"prompts.path": ("broken.parquet",), "prompts.max_bad_rows": 1},
        ),
        "prompts.weights": (
            {"prompts.path": ("train.parquet", "train.parquet")},
            {"prompts.path": ("train.parquet", "train.parquet"), "prompts.weights": (0.9, 0.1)},
        ),
    },
    probes.drawn_with: field_tables.each(
        {
            "rollout.num_responses": 2,
            "rollout.max_response_tokens": 64,
            "rollout.temperature": 0.5,
            "rollout.chunk_tokens": 8,
            "rollout.batch_responses": 4,
        }
    )
    | field_tables.cuts()
    | field_tables.ROLLOUT_MESH,
    probes.policy_optimizer: field_tables.optim("optim."),
    probes.discriminator_optimizer: field_tables.optim("discriminator.optim."),
    probes.policy_model: field_tables.sizes("model.sizes."),
    probes.discriminator_model: field_tables.sizes("discriminator.sizes."),
}
_SHARED = {
    probes.devices: field_tables.mesh()
    | field_tables.model_types()
    | field_tables.each({"model.attention": "splash"})
}
_WARMUP = {
    probes.pulls: field_tables.each(
        {
            "pairs.score_clip": 0.5,
            "pairs.regulariser": 0.5,
            "pairs.score_dtype": "bfloat16",
            "pairs.lengths.match_ratio": 1.5,
        }
    )
    | {"pairs.length_beta": ({}, {"pairs.length_beta": (("cot", 0.5),)})},
    probes.coefficients: field_tables.each({"pairs.router": 0.5}),
    probes.settings: field_tables.each(
        {"pairs.head_dropout": 0.1, "pairs.score_dtype": "bfloat16"}
    ),
    probes.read_pairs: field_tables.each(
        {
            "seed": 1,
            "data.train": ("few.jsonl",),
            "data.held_out_fraction": 0.0,
            "data.max_tokens": 20,
            "data.min_pixels": 64 * 64,
            "data.max_pixels": 32 * 32,
            "data.limit_image_pixels": 1,
            "data.sees_images": False,
            "data.view": "both",
            "pairs.lengths.equal_min_tokens": 2,
            "data.scored_token": "newline",
            "rows.row_tokens": 1024,
            "rows.row_sequences": 2,
            "rows.num_rows": 4,
            "rows.has_shared_prompts": True,
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
    probes.threads: field_tables.each({"data.num_threads": 3}),
    probes.policy_optimizer: field_tables.optim("optim."),
    probes.warmed_model: field_tables.sizes("model.sizes."),
}
_REFUSING = {
    *("prompts.path", "prompts.max_prompt_tokens", "data.max_tokens", "data.train"),
    *("rows.row_sequences", "model.attention"),
    *("prompts.limit_image_pixels", "data.limit_image_pixels"),
}
# What the commands ask of checkpoints, logs and the loop; the honesty panel is every second step.
_MAINS = {"align": align_main.main, "warmup": warmup_main.main}
_OF_THE_LOOP = {
    "align": field_tables.OF_THE_LOOP,
    "warmup": field_tables.OF_THE_LOOP | field_tables.each({"evaluate.every_steps": 4}),
}
_ASKED = {
    stage: functools.partial(field_tables.asked_of_the_loop, main) for stage, main in _MAINS.items()
}
# Fields that change what a run costs, keeps or says, or that only a file system decides about.
_ELSEWHERE = {
    "tests/test_cli.py, tests/stages/warmup/test_warmup.py: where a model comes from": (
        *("model.folder", "model.init", "model.step"),
        *("discriminator.folder", "discriminator.init", "data.words"),
    ),
    "tests/models/test_equivalence.py: the same result, computed otherwise": (
        *("model.remat", "discriminator.remat", "train.head_chunk_tokens"),
    ),
    "tests/policy/test_loss.py": (
        *("algorithm.aggregation", "algorithm.norm_tokens", "algorithm.sampler_weights"),
        *("algorithm.sampler_level", "algorithm.sampler_low", "algorithm.sampler_high"),
        "train.has_entropy",
    ),
    # Refused of a discriminator, by `setup.models.open_model`.
    "tests/models/test_lora.py": ("model.lora.rank", "model.lora.alpha", "model.lora.targets"),
    "tests/data/test_sources.py": (
        *("prompts.image_root", "prompts.cache_dir", "data.image_root", "data.cache_dir"),
    ),
    "tests/honesty/test_panel.py": ("honesty.every_steps", "honesty.num_pairs"),
    "tests/stages/align/test_align.py": ("rollout.dump_every_steps",),
    "tests/policy/test_rollouts.py": ("rollout.is_cut_allowed",),
    "tests/policy/test_held_out.py": field_tables.HELD_OUT,
    "tests/policy/test_distill.py, tests/stages/rlvr/test_distill.py": tuple(
        field_tables.fields(distill.Distill, "distill.")
    ),
    "one process alone": ("mesh.is_distributed",),
    "tests/stages/test_rl_configs.py": ("mesh.axes.sequence",),
}
_TABLES = {"align": _ALIGN | _SHARED, "warmup": _WARMUP | _SHARED}
_CASES = [
    pytest.param(stage, *case.values, id=f"{stage}:{case.id}")
    for stage, table in _TABLES.items()
    for case in field_tables.cases(table)
]


@pytest.mark.parametrize("stage", probes.STRUCTS)
def test_every_field_is_in_the_table_or_named_with_the_test_that_sees_it(stage):
    seen = field_tables.seen(_TABLES[stage]) | _OF_THE_LOOP[stage].keys()
    named = field_tables.named(_ELSEWHERE)
    assert not seen & named
    assert field_tables.fields(probes.STRUCTS[stage]) - named == seen


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
    "train.parquet": "corpus/align/train.parquet",
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
    return field_tables.outcome(lambda: probe(*arguments), workdir)


@functools.cache
def _base(probe, stage, folder, before):
    workdir = folder / f"base-{len(list(folder.iterdir()))}"
    return _outcome(probe, stage, folder, dict(before), workdir)


@pytest.mark.parametrize(("stage", "probe", "before", "after"), _CASES)
def test_every_field_changes_the_result(folder, tmp_path, stage, probe, before, after):
    base = _base(probe, stage, folder, tuple(before.items()))
    found = _outcome(probe, stage, folder, after, tmp_path / "changed")
    # A refusal is a result where the field says what is refused, and nowhere else.
    may_refuse = bool(_REFUSING & (set(before) | set(after)))
    field_tables.assert_differs(base, found, may_refuse=may_refuse)


@pytest.fixture(scope="module")
def commands(folder):
    return {
        stage: field_tables.Seen(
            kind, functools.partial(probes.configure, stage), folder, refusing=()
        )
        for stage, kind in probes.STRUCTS.items()
    }


@pytest.mark.parametrize(
    ("stage", "before", "after"),
    [
        pytest.param(stage, *states, id=f"{stage}:{field}")
        for stage, fields in _OF_THE_LOOP.items()
        for field, states in fields.items()
    ],
)
def test_what_is_asked_of_the_loop_follows_from_its_fields(commands, stage, before, after):
    commands[stage].assert_change_shows(_ASKED[stage], before, after)


@pytest.mark.parametrize("stage", _MAINS)
def test_the_same_is_asked_of_the_loop_twice(commands, stage):
    assert commands[stage].look(_ASKED[stage], {}) == commands[stage].base(_ASKED[stage], {})
