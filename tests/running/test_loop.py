import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from prism_jax import errors, metrics, tree_paths
from prism_jax.checkpoints import checkpoint
from prism_jax.running import loop, preemption
from prism_jax.training import train_state
from tests import toy_run

NUM_STEPS = 40


def _rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _untimed(rows):
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def _params(workdir):
    _, abstract = train_state.abstract_params(toy_run.Toy, param_dtype=np.float32)
    params, _ = checkpoint.load_params(str(workdir), abstract, item="params", step=None)
    return {name: np.asarray(x) for name, x in tree_paths.named_leaves(params).items()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return the folder of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    toy_run.run(workdir, num_steps=NUM_STEPS)
    return workdir


@pytest.fixture(scope="module")
def killable(tmp_path_factory):
    """Return a function that runs the toy in another process and may send it a signal."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        # Restarts do not compile again.
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    with subprocess.Popen(
        [sys.executable, "-m", "tests.toy_run"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as server:

        def order(workdir, *, signal=None, rows=0, delay_seconds=0.0):
            text = {
                "workdir": str(workdir),
                "num_steps": NUM_STEPS,
                "signal": signal,
                "rows": rows,
                "delay_seconds": delay_seconds,
            }
            server.stdin.write(json.dumps(text) + "\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline())

        yield order
        server.stdin.close()


def _assert_same_run(workdir, uninterrupted):
    rows = _rows(workdir)
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    assert _untimed(rows) == _untimed(_rows(uninterrupted))
    for name, expected in _params(uninterrupted).items():
        np.testing.assert_array_equal(_params(workdir)[name], expected, err_msg=name)


def test_a_run_killed_at_random_moments_ends_with_the_same_bits_and_rows(
    tmp_path, uninterrupted, killable
):
    moments = random.Random(0)
    done = 0
    for _ in range(3):
        done += moments.randint(2, 7)
        code = killable(
            tmp_path, signal="SIGKILL", rows=done, delay_seconds=moments.uniform(0.0, 0.05)
        )
        assert code == -signal.SIGKILL
    assert killable(tmp_path) == 0
    _assert_same_run(tmp_path, uninterrupted)


def test_sigterm_saves_the_step_and_leaves_with_143_and_the_run_goes_on(
    tmp_path, uninterrupted, killable
):
    assert killable(tmp_path, signal="SIGTERM", rows=7) == 143
    rows = _rows(tmp_path)
    assert checkpoint.read_meta(str(tmp_path), step=len(rows))["stage"] == "toy"
    assert 7 <= len(rows) < NUM_STEPS
    assert not (tmp_path / "finished.json").exists()
    assert killable(tmp_path) == 0
    _assert_same_run(tmp_path, uninterrupted)
    starts = [json.loads(x) for x in (tmp_path / "goodput.jsonl").read_text().splitlines()]
    assert {line["lost_steps"] for line in starts} == {0}


def test_a_run_cut_and_continued_on_another_mesh_ends_within_rounding(tmp_path, uninterrupted):
    shutil.copytree(uninterrupted / "checkpoints", tmp_path / "checkpoints")
    abstract, _, step = toy_run.setup()
    mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    target = train_state.with_shardings(abstract, jax.tree.map(lambda _: spread, abstract))
    with toy_run.open_checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore(target, step=36)
    data = toy_run.Counted(num_microbatches=2)
    data.set_state(restored.data_position)
    state = restored.state
    for _ in range(restored.step, NUM_STEPS):
        state, _ = step(state, next(data), jax.random.key(0))
    for name, leaf in tree_paths.named_leaves(state.params).items():
        np.testing.assert_allclose(leaf, _params(uninterrupted)[name], rtol=1e-4, atol=1e-5)


def test_evaluation_is_in_the_row_of_its_step_and_after_the_last(tmp_path):
    toy_run.run(tmp_path, num_steps=6, evaluate=lambda state, step: {"eval/step": step})
    rows = _rows(tmp_path)
    assert {row["step"]: row["eval/step"] for row in rows if "eval/step" in row} == {4: 4, 6: 6}


def test_an_evaluation_is_in_the_time_of_no_step(tmp_path):
    def evaluate(state, step):
        del state
        time.sleep(1.5)
        return {"eval/step": step}

    toy_run.run(tmp_path, num_steps=6, evaluate=evaluate)
    rows = _rows(tmp_path)
    assert [row["step"] for row in rows if "eval/step" in row] == [4, 6]
    # The first step may compile.
    assert max(row["time/step_seconds"] for row in rows[1:]) < 1.0


def test_a_step_has_the_time_of_its_own_experience_and_data(tmp_path):
    def experience(state, batch, key):
        jax.block_until_ready(state)
        time.sleep(0.2)
        return loop.learn_from_data(state, batch, key)

    toy_run.run(tmp_path, num_steps=7, sleep_seconds=0.1, experience=experience)
    rows = _rows(tmp_path)
    # Steps 3 and 6 are saved: everything before them is waited for.
    assert min(row["time/step_seconds"] for row in rows) > 0.2
    assert all(0.1 <= row["time/data_seconds"] < 0.3 for row in rows)


def test_metrics_are_read_while_the_next_step_is_under_way(tmp_path):
    num_rows = []

    def update(state, batch, key, *, step):
        path = tmp_path / "metrics.jsonl"
        num_rows.append(path.read_bytes().count(b"\n"))
        return step(state, batch, key)

    step = toy_run.setup()[2]
    toy_run.run(tmp_path, num_steps=6, update=functools.partial(update, step=step))
    # Steps 3 and 6 are saved, and their rows are written before that.
    assert num_rows == [0, 0, 1, 3, 3, 4]


def test_a_run_that_skips_too_many_updates_in_a_row_is_given_up(tmp_path):
    class Broken(toy_run.Counted):
        def __next__(self):
            batch = super().__next__()
            if self.position > 4:
                batch["x"] = np.full_like(batch["x"], np.nan)
            return batch

    data = Broken(num_microbatches=2)
    with pytest.raises(loop.DivergedError, match="optim/skipped_in_row is 3 after step 7"):
        toy_run.run(tmp_path, num_steps=20, data=data)
    assert all(np.isfinite(leaf).all() for leaf in _params(tmp_path).values())


def test_data_that_ends_early_is_named(tmp_path):
    class Short(toy_run.Counted):
        def __next__(self):
            if self.position == 2:
                raise StopIteration
            return super().__next__()

    with pytest.raises(errors.InputError, match="ended after 2 batches"):
        toy_run.run(tmp_path, num_steps=5, data=Short(num_microbatches=2))


def test_experience_and_update_may_not_measure_under_one_name(tmp_path):
    def update(state, batch, key):
        return state, {"loss/total": metrics.Sum(value=1.0)}

    pending = loop._Pending(None, None, None, None, None)
    told = update(None, None, None)[1]
    with pytest.raises(ValueError, match=r"\['loss/total'\]"):
        pending.put(1, told, told, None, begun=0.0, data_seconds=0.0)


def test_a_finished_run_started_again_takes_no_step(tmp_path):
    toy_run.run(tmp_path, num_steps=3)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    toy_run.run(tmp_path, num_steps=3, update=None)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_one_process_sees_sigterm_and_puts_the_handler_back():
    before = signal.getsignal(signal.SIGTERM)
    with preemption.watch() as is_preempted:
        assert not is_preempted(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert is_preempted(2)
        # A second signal is to kill at once.
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is before


def test_preempted_leaves_the_program_with_143():
    with pytest.raises(SystemExit) as caught:
        raise preemption.Preempted(7)
    assert caught.value.code == 143
    assert "step 7" in str(caught.value)


def test_a_run_whose_folder_was_taken_over_writes_nothing_more(tmp_path):
    class Overtaken(toy_run.Counted):
        def __next__(self):
            if self.position == 7:  # steps 1 to 6 are over, 3 and 6 are saved, the 7th has begun
                owner = json.loads((tmp_path / "lock.json").read_text())
                (tmp_path / "lock.json").write_text(json.dumps(owner | {"host": "elsewhere"}))
            return super().__next__()

    with pytest.raises(errors.InputError, match=r"was taken over by process \d+ on elsewhere"):
        toy_run.run(tmp_path, num_steps=9, data=Overtaken(num_microbatches=2))
    assert [row["step"] for row in _rows(tmp_path)] == list(range(1, 7))
    with toy_run.open_checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [3, 6]
    assert json.loads((tmp_path / "lock.json").read_text())["host"] == "elsewhere"


@pytest.mark.parametrize(
    ("position", "is_refused"),
    [
        ({"next_step": 3, "seed": 0}, False),
        ({"next_step": 4, "seed": 0}, True),
        ({"next_step": True}, True),
        ({"next_step": 7, "surplus": []}, False),  # RLVR draws as many batches as it needs
        ({"next_index": 9}, False),
    ],
)
def test_a_position_that_counts_batches_is_that_of_its_step(tmp_path, position, is_refused):
    class Data:
        def set_state(self, state):
            self.state = state

    abstract, make_state, _ = toy_run.setup()
    data = Data()
    with toy_run.open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, make_state(), data_position=position)
        checkpointer.wait()

        def restore():
            return loop.restore_or_make(
                checkpointer, data, abstract_state=abstract, make_state=make_state, step=None
            )

        if is_refused:
            with pytest.raises(errors.InputError, match="data stand before step"):
                restore()
        else:
            assert restore()[1] == 3
            assert data.state == position
