"""The chain: its order and commands, each step once, killed anywhere and started again."""

import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from configs import pipeline as config_file
from prism_jax import configuration, errors, main
from prism_jax.checkpoints import lock
from prism_jax.commands.pipeline import main as pipeline_main
from prism_jax.commands.pipeline import run as pipeline_run
from prism_jax.commands.pipeline import steps as pipeline_steps
from prism_jax.report import results

STUB = str(pathlib.Path(__file__).with_name("stub_program.py"))
SIZES = ("tiny", "demo", "small")


def _step(name: str, *options: str, removed: str | None = None) -> pipeline_steps.Step:
    arguments = (name, pipeline_steps.WORKDIR, *options)
    return pipeline_steps.Step(name=name, arguments=arguments, removed=removed)


def _run(workdir: pathlib.Path, steps, stream=None) -> int:
    """Run a chain in this process; return its exit code."""
    workdir.mkdir(exist_ok=True)
    stream = stream or (workdir / "lines").open("a+")
    runner = pipeline_run.Runner(
        workdir, program=(sys.executable, STUB), num_steps=len(steps), stream=stream
    )
    try:
        runner.run(steps)
    except SystemExit as stop:
        return stop.code
    finally:
        stream.flush()
    return 0


def _start(workdir: pathlib.Path, steps) -> subprocess.Popen:
    """Run a chain in a process of its own, which can be killed."""
    workdir.mkdir(exist_ok=True)
    script = (
        "import sys, pathlib, signal\n"
        # As from a terminal, also where the tests run under nohup or in the background.
        "for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):\n"
        "    signal.signal(number, signal.SIG_DFL)\n"
        "from tests.commands import test_pipeline\n"
        "from prism_jax.commands.pipeline import steps as pipeline_steps\n"
        f"steps = [{', '.join(f'pipeline_steps.{step!r}' for step in steps)}]\n"
        f"sys.exit(test_pipeline._run(pathlib.Path({str(workdir)!r}), steps, sys.stderr))\n"
    )
    root = pathlib.Path(__file__).parents[2]
    return subprocess.Popen([sys.executable, "-c", script], cwd=root, stderr=subprocess.PIPE)


def _until(is_true) -> None:
    deadline = time.monotonic() + 30
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _waiting(workdir: pathlib.Path, name: str) -> int:
    """Wait until a step counts and is known; return its process."""
    _until((workdir / f"{name}.count").exists)
    _until((workdir / "steps" / "running.lock").read_text)
    return int((workdir / "steps" / "running.lock").read_text())


def _calls(workdir: pathlib.Path) -> list[str]:
    path = workdir / "calls"
    return path.read_text().split() if path.exists() else []


def _record(workdir: pathlib.Path, name: str) -> dict:
    return json.loads((workdir / "steps" / f"{name}.json").read_text())


def test_steps_run_in_order_and_a_finished_chain_starts_none_again(tmp_path):
    steps = [_step("a"), _step("b"), _step("c")]
    assert _run(tmp_path, steps) == 0
    before = {name: _record(tmp_path, name) for name in "abc"}
    assert _run(tmp_path, steps) == 0
    assert _calls(tmp_path) == ["a", "b", "c"]
    assert {name: _record(tmp_path, name) for name in "abc"} == before


def test_a_step_is_one_line_and_its_words_are_in_its_log(tmp_path):
    _run(tmp_path, [_step("a"), _step("b")])
    _run(tmp_path, [_step("a"), _step("b"), _step("c")])
    lines = [line.split() for line in (tmp_path / "lines").read_text().splitlines()]
    assert [line[:2] for line in lines[:2]] == [["[1/2]", "a"], ["[2/2]", "b"]]
    assert [line[1:] for line in lines[2:4]] == [
        ["a", "0s", "finished", "before"],
        ["b", "0s", "finished", "before"],
    ]
    assert lines[4][:2] == ["[3/3]", "c"]
    assert (tmp_path / "steps" / "a.log").read_text() == "a speaks\n"


@pytest.mark.parametrize("code", [1, 2, 75])
def test_the_exit_code_of_a_failing_step_is_the_chains_and_nothing_follows(tmp_path, code):
    steps = [_step("a"), _step("b", f"fail={code}"), _step("c")]
    assert _run(tmp_path, steps) == code
    assert _calls(tmp_path) == ["a", "b"]
    record = _record(tmp_path, "b")
    assert (record["exit_code"], record["is_finished"]) == (code, False)
    lines = (tmp_path / "lines").read_text()
    assert f"failed with exit code {code}" in lines
    assert "  b speaks\n" in lines
    # The cause is mended: the step runs again, the one before it does not.
    steps[1] = _step("b")
    assert _run(tmp_path, steps) == 0
    assert _calls(tmp_path) == ["a", "b", "b", "c"]
    assert _record(tmp_path, "b")["num_starts"] == 2


def test_a_step_that_a_signal_killed_gives_128_and_the_signal(tmp_path):
    chain = _start(tmp_path, [_step("a", "wait=/nowhere")])
    os.kill(_waiting(tmp_path, "a"), signal.SIGKILL)
    assert chain.wait(30) == 137
    assert b"failed with exit code -9" in chain.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_the_step_save_and_the_next_start_goes_on(tmp_path, number):
    ready = tmp_path / "ready"
    steps = [_step("a"), _step("b", f"wait={ready}"), _step("c")]
    chain = _start(tmp_path, steps)
    _waiting(tmp_path, "b")
    chain.send_signal(number)
    assert chain.wait(30) == 143
    assert b"stopped; start again to go on" in chain.stderr.read()
    counted = int((tmp_path / "b.count").read_text())
    assert _record(tmp_path, "b")["exit_code"] == 143
    ready.touch()
    assert _run(tmp_path, steps) == 0
    assert _calls(tmp_path) == ["a", "b", "stopped", "b", "c"]
    assert int((tmp_path / "b.count").read_text()) == counted + 1


def test_a_chain_that_was_killed_leaves_a_step_which_the_next_start_ends_first(tmp_path):
    ready = tmp_path / "ready"
    steps = [_step("a"), _step("b", f"wait={ready}"), _step("c")]
    chain = _start(tmp_path, steps)
    pid = _waiting(tmp_path, "b")
    chain.kill()
    chain.wait(30)
    counted = (tmp_path / "b.count").read_text()
    _until(lambda: (tmp_path / "b.count").read_text() not in ("", counted))  # it lives on
    again = _start(tmp_path, steps)
    _until(lambda: _calls(tmp_path).count("b") == 2)
    ready.touch()
    assert again.wait(30) == 0
    assert f"ending process {pid}".encode() in again.stderr.read()
    assert _calls(tmp_path) == ["a", "b", "stopped", "b", "c"]


def test_wall_time_is_added_up_over_starts_also_over_one_that_was_killed(tmp_path):
    ready = tmp_path / "ready"
    steps = [_step("a", f"wait={ready}")]
    chain = _start(tmp_path, steps)
    # The record is written every two seconds; only what is in it counts.
    _until(lambda: (tmp_path / "steps" / "a.json").exists() and _record(tmp_path, "a")["seconds"])
    chain.kill()
    chain.wait(30)
    first = _record(tmp_path, "a")
    assert first["seconds"] >= 2
    assert not first["is_finished"]
    ready.touch()
    assert _run(tmp_path, steps) == 0
    last = _record(tmp_path, "a")
    assert last["seconds"] > first["seconds"]
    assert (last["num_starts"], last["is_finished"]) == (2, True)


def test_a_folder_that_its_command_refuses_is_removed_before_another_start(tmp_path):
    made = tmp_path / "model"
    partial = tmp_path / ".model.partial-77"
    partial.mkdir()
    other = tmp_path / "kept"
    other.mkdir()
    step = _step("a", f"make={made}", "fail=1", removed="model")
    assert _run(tmp_path, [step]) == 1
    assert made.exists()
    assert _run(tmp_path, [_step("a", f"make={made}", removed="model")]) == 0
    assert made.exists()
    assert other.exists()
    assert not partial.exists()


def test_a_finished_step_with_another_command_is_refused_before_anything_runs(tmp_path):
    _run(tmp_path, [_step("a"), _step("b", "x=1")])
    with pytest.raises(errors.InputError, match=r"step b has finished with other .*x=1 .*x=2"):
        _run(tmp_path, [_step("new"), _step("a"), _step("b", "x=2")])
    assert _calls(tmp_path) == ["a", "b"]


def test_a_chain_whose_folder_was_taken_over_starts_no_step(tmp_path):
    with lock.hold(str(tmp_path), beat_seconds=60.0):
        owner = json.loads((tmp_path / "lock.json").read_text())
        (tmp_path / "lock.json").write_text(json.dumps(owner | {"host": "elsewhere"}))
        with pytest.raises(errors.InputError, match="was taken over"):
            _run(tmp_path, [_step("one")])
    assert not (tmp_path / "steps" / "one.json").exists()
    assert not (tmp_path / "steps" / "one.log").exists()


def test_a_folder_can_be_moved_between_two_starts(tmp_path):
    steps = [_step("a"), _step("b")]
    assert _run(tmp_path / "one", steps[:1]) == 0
    (tmp_path / "one").rename(tmp_path / "two")
    assert _run(tmp_path / "two", steps) == 0
    assert _calls(tmp_path / "two") == ["a", "b"]


# The chain of the method.


def _options(size: str, **changes) -> pipeline_steps.Config:
    config = config_file.get_config(size)
    config.base.folder = "BASE"
    config.update_from_flattened_dict(changes)
    return configuration.parse(pipeline_steps.Config, config)


def _named(steps) -> dict[str, pipeline_steps.Step]:
    return {step.name: step for step in steps}


def test_the_chain_is_the_method_of_the_paper_in_its_order():
    assert [step.name for step in pipeline_steps.plan(_options("demo"))] == [
        *("data", "sft", "upcycle", "pairs", "warmup", "align", "rlvr"),
        *("evaluate_base", "evaluate_sft", "evaluate_align", "evaluate_rlvr", "report"),
    ]


def test_a_new_base_model_is_trained_and_exported_first():
    options = _options("demo", **{"base.folder": "", "base.tokenizer": "TOK"})
    steps = _named(pipeline_steps.plan(options))
    assert list(steps)[:4] == ["data", "base", "base_model", "sft"]
    assert "--config=configs/sft.py:demo,new" in steps["base"].arguments
    assert "--config.model.folder=$WORKDIR/base_model" in steps["sft"].arguments
    assert "--config.policy.folder=$WORKDIR/base_model" in steps["evaluate_base"].arguments
    assert steps["base_model"].removed == "base_model"


def test_the_discriminators_trunk_is_the_base_model_or_the_policy_of_sft():
    of_base = _named(pipeline_steps.plan(_options("demo")))
    assert "--from=BASE" in of_base["upcycle"].arguments
    of_sft = _named(pipeline_steps.plan(_options("demo", trunk="sft")))
    assert list(of_sft).index("sft_model") == list(of_sft).index("sft") + 1
    assert "--from=$WORKDIR/sft_model" in of_sft["upcycle"].arguments


@pytest.mark.parametrize("size", SIZES)
def test_every_step_reads_only_what_an_earlier_one_wrote(size):
    options = _options(size, **{"base.folder": "", "base.tokenizer": "TOK", "trunk": "sft"})
    written = set()
    for step in pipeline_steps.plan(options):
        ends = [argument.partition("=")[2] for argument in step.arguments]
        named = {e.split("/")[1] for e in ends if e.startswith(f"{pipeline_steps.WORKDIR}/")}
        own = "corpus" if step.name == "data" else step.name
        if step.name != "report":
            assert own in named, step.name
            assert named - {own} <= written, step.name
        written.add(own)


@pytest.mark.parametrize("size", SIZES)
def test_every_step_is_a_command_whose_configuration_takes_its_arguments(size, tmp_path):
    seed = 5
    options = _options(
        size, **{"seed": seed, "base.folder": "", "base.tokenizer": "TOK", "trunk": "sft"}
    )
    for step in pipeline_steps.plan(options):
        command, *arguments = step.command(tmp_path)
        assert command in main.COMMANDS
        assert not any("$" in argument for argument in arguments)
        module = importlib.import_module(f"prism_jax.{main.COMMANDS[command][0]}")
        if not any(argument.startswith("--config=") for argument in arguments):
            module.parser().parse_args(arguments)
            continue
        config, workdir = configuration.read(arguments, command=command)
        stages = ("sft", "warmup", "align", "rlvr")
        if command in stages:
            module = importlib.import_module(f"prism_jax.stages.{command}.config")
        assert configuration.parse(module.Config, config).seed == seed
        assert workdir == str(tmp_path / step.name)


def test_the_best_steps_are_read_where_the_chain_says_so():
    held_out = {f"arguments.{name}": ("--config.held_out.path=F",) for name in ("align", "rlvr")}
    steps = pipeline_steps.plan(_options("demo", step="best", **held_out))
    reading = {step.name for step in steps if any(".step=best" in x for x in step.arguments)}
    assert reading == {"rlvr", "evaluate_align", "evaluate_rlvr"}
    with pytest.raises(errors.InputError, match=r"arguments\.rlvr must have --config\.held_out"):
        _options("demo", step="best", **{"arguments.align": held_out["arguments.align"]})
    dropped = (*held_out["arguments.align"], "--config.held_out.is_best_kept=False")
    with pytest.raises(errors.InputError, match=r"arguments\.align must keep the best step"):
        _options("demo", step="best", **held_out | {"arguments.align": dropped})


def test_further_arguments_reach_their_step_and_no_other():
    extra = "--config.train.num_steps=3"
    steps = pipeline_steps.plan(_options("demo", **{"arguments.rlvr": (extra,)}))
    assert [step.name for step in steps if extra in step.arguments] == ["rlvr"]
    steps = pipeline_steps.plan(_options("demo", **{"arguments.evaluate": ("--x",)}))
    found = [step.name for step in steps if "--x" in step.arguments]
    assert found == [f"evaluate_{stage}" for stage in results.STAGES]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "exactly one must be given"),
        (["--config.base.folder=nowhere"], "config.base.folder = nowhere: there is no config.json"),
        (["--config.base.tokenizer=nowhere"], "there is no tokenizer.json"),
        (["--config.base.folder=a", "--config.base.tokenizer=b"], "exactly one must be given"),
        (["--config.base.folder=a", "--config.seed=-1"], "seed must be >= 0, got -1"),
        (["--config.base.folder=a", "--config.trunk=rlvr"], "config.trunk must be one of"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, capsys, arguments, told):
    workdir = tmp_path / "chain"
    given = ["pipeline", "--config=configs/pipeline.py:demo", f"--workdir={workdir}", *arguments]
    assert main.main(given) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1
    assert not workdir.exists()


def test_sizes_that_the_corpus_does_not_have_are_refused():
    for size in ("4b", "huge", "demo,new", "drift"):
        with pytest.raises(ValueError, match=r"must be one of|options are"):
            config_file.get_config(size)


def test_the_command_ends_with_the_accuracies_and_the_report(tmp_path, capsys, monkeypatch):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    monkeypatch.setattr(pipeline_run.Runner, "run", lambda self, steps: None)
    given = ["--config=configs/pipeline.py:demo", f"--workdir={tmp_path / 'chain'}"]
    pipeline_main.main([*given, f"--config.base.folder={base}"])
    out, err = capsys.readouterr()
    assert err == "accuracy: base not run, sft not run, align not run, rlvr not run\n"
    assert out == f"{tmp_path / 'chain' / 'report.html'}\n"


def test_the_demo_without_a_base_checkpoint_says_so_and_leaves_with_2(tmp_path):
    env = os.environ | {"PRISM_DEMO_BASE": str(tmp_path / "none")}
    told = subprocess.run(
        ["bash", "launch/demo.sh"], env=env, capture_output=True, text=True, check=False
    )
    assert told.returncode == 2
    assert "there is no base checkpoint" in told.stderr
    assert told.stderr.count("\n") == 1
