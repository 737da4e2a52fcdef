"""No dead field in the stages that ask a policy a list of prompts: evaluate, pairs, and curate's
first step. The policy's answers are a script's; all else is real.
"""

import contextlib
import dataclasses
import io
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from configs import curate as curate_file
from configs import evaluate as evaluate_file
from configs import pairs as pairs_file
from prism_jax import errors
from prism_jax.commands import evaluate, pairs
from prism_jax.commands.curate import main as curate_main
from prism_jax.data import processor
from prism_jax.rollout import engine
from tests import tiny_checkpoint, training_run
from tests.stages import field_tables, prompt_fields


class _Sampler:
    """Answer by chance of the key, and remember what was asked."""

    def __init__(self, policy: pathlib.Path):
        self._tokenizer = processor.Processor.from_folder(policy).tokenizer
        self.opened: list[Any] = []
        self.asked: list[Any] = []

    def open(self, source, policy, devices) -> "_Sampler":
        """Stand for the loading of a policy."""
        del policy
        self.opened.append((source.folder, source.step, field_tables.placed(devices)))
        return self

    def __call__(self, prompts, sampling, key, *, num_responses, shapes) -> engine.Rollout:
        """Return texts as tokens."""
        data = np.asarray(jax.random.key_data(key))
        told = [(prompt.tokens, prompt.pixels) for prompt in prompts]
        self.asked.append((told, sampling, data, num_responses, shapes))
        size = len(prompts) * num_responses
        tokens = np.zeros((size, sampling.max_tokens), np.int32)
        lengths = np.zeros(size, np.int32)
        chosen = np.random.default_rng(data).integers(len(prompt_fields.TEXTS), size=size)
        for place, number in enumerate(chosen):
            ids = self._tokenizer.encode(prompt_fields.TEXTS[number])
            ids.append(self._tokenizer.eos_token_id)
            tokens[place, : len(ids)], lengths[place] = ids, len(ids)
        return engine.Rollout(
            tokens=tokens,
            logprobs=np.zeros(tokens.shape, np.float32),
            lengths=lengths,
            ended=np.ones(size, bool),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Done:
    """A job that is done."""

    sampler: _Sampler
    written: pathlib.Path
    told: str  # on standard error


_RUNS = {
    evaluate.Config: evaluate.run,
    pairs.Config: pairs.run,
    curate_main.Config: curate_main.run,
}


def _run(given) -> _Done:
    sampler = _Sampler(given.folder / "policy")
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        _RUNS[type(given.options)](given.config, str(given.workdir), open_sampler=sampler.open)
    is_step = isinstance(given.options, curate_main.Config)
    written = given.workdir / "difficulty" if is_step else given.workdir
    return _Done(sampler=sampler, written=written, told=told.getvalue())


def opened(given):
    """Return which policy is opened, and on which devices."""
    return _run(given).sampler.opened


def asked(given):
    """Return what the sampler is asked, prompts and pictures included."""
    return _run(given).sampler.asked


def asked_from_store(given):
    """Return the same of prompts that lie in an object store."""
    with field_tables.a_store(given.folder):
        return asked(given)


def written(given):
    """Return what a user finds: responses, pairs, rates, the rows that are chosen, counts."""
    folder = _run(given).written
    found = {path.name: path.read_text() for path in folder.glob("*.jsonl")}
    found |= {path.name: pq.read_table(path)["id"].to_pylist() for path in folder.glob("*.parquet")}
    summary = json.loads((folder / "summary.json").read_text())
    # Without what repeats the configuration.
    repeated = ("policy", "prompts", "judge", "thresholds")
    return found | {name: value for name, value in summary.items() if name not in repeated}


def num_lines(given):
    """Return how many lines of progress are told."""
    return sum("[#" in line or "[ " in line for line in _run(given).told.splitlines())


def judged(given):
    """Return the rewards of four responses, and the processes that are started."""
    options = given.options
    is_step = isinstance(options, curate_main.Config)
    open_judge = options.difficulty.judge.open if is_step else options.rewards.open_judge
    return field_tables.judged(open_judge, prompt_fields.TASKS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stage:
    kind: type
    configure: Callable[[pathlib.Path], Any]
    table: field_tables.Table
    elsewhere: dict[str, tuple[str, ...]]


def _configure(config, section, folder):
    section.policy.folder = str(folder / "policy")
    section.prompts.path = str(folder / "rows.jsonl")
    section.mesh.num_devices = 1
    section.max_tokens = 256
    section.batch_responses = 6
    return config


def _evaluate(folder):
    config = evaluate_file.get_config("tiny,samples")
    return _configure(config, config, folder)


def _pairs(folder):
    config = pairs_file.get_config("tiny")
    config.num_responses = 3
    return _configure(config, config, folder)


def _difficulty(folder):
    config = curate_file.get_config("tiny,difficulty")
    config.difficulty.num_samples = 3
    return _configure(config, config.difficulty, folder)


def _of_all(prefix=""):
    """Return the tables of the fields that all three stages have."""

    def each(changes, before=None):
        start = field_tables.at(prefix, before or {})
        return field_tables.each(field_tables.at(prefix, changes), before=start)

    mesh = {
        prefix + name: tuple(field_tables.at(prefix, state) for state in states)
        for name, states in field_tables.mesh().items()
    }
    return {
        opened: mesh
        | each({"policy.folder": "@other", "policy.dtype": "bfloat16"})
        | each({"policy.attention": "splash"})
        | each({"policy.step": "best"}, before={"policy.folder": "@run"}),
        asked: prompt_fields.read(prefix=prefix)
        | each(
            {
                "seed": 1,
                "sampling.temperature": 0.5,
                "sampling.top_k": 5,
                "sampling.top_p": 0.5,
                "max_tokens": 200,
                "batch_responses": 12,
            }
        ),
        asked_from_store: prompt_fields.stored(prefix=prefix),
        num_lines: each({"line_every_steps": 2}),
    }


def _joined(first, second):
    """Return a table with the fields of two."""
    return {probe: first.get(probe, {}) | second.get(probe, {}) for probe in {**first, **second}}


_REFUSING = {"policy.attention", *prompt_fields.REFUSING}
_ONE_PROCESS = {
    "one process alone": ("mesh.is_distributed",),
    "test_rows_split_along_their_length_are_refused": ("mesh.axes.sequence",),
}
_STAGES = {
    "evaluate": _Stage(
        kind=evaluate.Config,
        configure=_evaluate,
        table=_joined(
            _of_all(),
            {
                asked: field_tables.each({"has_greedy": False, "num_samples": 2}),
                written: field_tables.each(
                    {
                        "rewards.judge": "official",
                        "rewards.custom": "@reward.py:score",
                        "rewards.accuracy_weight": 0.5,
                        "rewards.format_weight": 0.5,
                    }
                ),
                judged: prompt_fields.judge("rewards."),
            },
        ),
        elsewhere=_ONE_PROCESS,
    ),
    "pairs": _Stage(
        kind=pairs.Config,
        configure=_pairs,
        table=_joined(
            _of_all(),
            {
                asked: field_tables.each({"num_responses": 2}),
                written: field_tables.each({"has_equal_segments": True}),
            },
        ),
        elsewhere=_ONE_PROCESS,
    ),
    "curate": _Stage(
        kind=curate_main.Config,
        configure=_difficulty,
        table=_joined(
            _of_all("difficulty."),
            {
                asked: field_tables.each({"difficulty.num_samples": 2}),
                written: field_tables.each(
                    {
                        "difficulty.judge.rule": "official",
                        "difficulty.rl_above": 0.5,
                        "difficulty.rl_below": 0.3,
                        "difficulty.hard_at_most": 0.5,
                    }
                ),
                judged: prompt_fields.judge("difficulty.judge."),
            },
        ),
        elsewhere={
            name: tuple(f"difficulty.{field}" for field in fields)
            for name, fields in _ONE_PROCESS.items()
        },
    ),
}


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fields")
    policy = tiny_checkpoint.write(folder / "policy")
    tiny_checkpoint.write(folder / "other")
    training_run.write(folder / "run", models={"": policy}, steps=(1, 2), finished=False)
    training_run.name_best(folder / "run", 1)
    prompt_fields.write(folder)
    refusing = _REFUSING | {f"difficulty.{field}" for field in _REFUSING}
    return {
        name: field_tables.Seen(stage.kind, stage.configure, folder, refusing=refusing)
        for name, stage in _STAGES.items()
    }


@pytest.mark.parametrize("name", _STAGES)
def test_every_field_is_in_the_table_or_named_with_the_test_that_sees_it(name):
    stage = _STAGES[name]
    found, named = field_tables.seen(stage.table), field_tables.named(stage.elsewhere)
    assert not found & named
    # The second step of `curate` and the judge behind an endpoint have files of their own.
    others = ("teacher.", "llm_judge.")
    fields = {f for f in field_tables.fields(stage.kind) if not f.startswith(others)}
    assert fields - named == found


@pytest.mark.parametrize("name", _STAGES)
def test_rows_split_along_their_length_are_refused(stages, name):
    field = "difficulty.mesh.axes.sequence" if name == "curate" else "mesh.axes.sequence"
    with pytest.raises(errors.InputError, match=r"axes\.sequence must be 1.* got 2"):
        stages[name].look(opened, {field: 2})


@pytest.mark.parametrize(
    ("name", "probe"),
    [
        pytest.param(name, probe, id=f"{name}:{probe.__name__}")
        for name, stage in _STAGES.items()
        for probe in stage.table
    ],
)
def test_a_probe_sees_the_same_twice(stages, name, probe):
    assert stages[name].look(probe, {}) == stages[name].base(probe, {})


_CASES = [
    pytest.param(name, *case.values, id=f"{name}:{case.id}")
    for name, stage in _STAGES.items()
    for case in field_tables.cases(stage.table)
]


@pytest.mark.parametrize(("name", "probe", "before", "after"), _CASES)
def test_every_field_changes_what_is_seen(stages, name, probe, before, after):
    stages[name].assert_change_shows(probe, before, after)


@pytest.mark.parametrize("name", _STAGES)
def test_the_responses_are_of_the_seed(stages, name):
    seed = "difficulty.seed" if name == "curate" else "seed"
    stages[name].assert_change_shows(written, {}, {seed: 1})
