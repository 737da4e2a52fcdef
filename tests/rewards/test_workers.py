"""Judging in processes: whatever an answer does to them, the batch comes back, in order."""

import os
import subprocess
import sys
import threading
import time

import pytest

from prism_jax import errors
from prism_jax.rewards import score, workers
from tests.rewards.test_score import OFFICIAL, STRICT, respond, task

DEADLINE_SECONDS = 2.0
MEMORY_BYTES = 2 << 30


def make_pool(
    module="prism_jax.rewards.judge_process", num_workers=1, deadline=DEADLINE_SECONDS, rule=STRICT
):
    return workers.JudgePool(
        rule,
        num_workers=num_workers,
        deadline_seconds=deadline,
        memory_bytes=MEMORY_BYTES,
        module=module,
    )


@pytest.fixture(scope="module")
def pool():
    with make_pool(num_workers=2) as pool:
        yield pool


@pytest.fixture(scope="module")
def faulty():
    with make_pool("tests.rewards.faulty_judge") as pool:
        yield pool


def ask(pool, *answers, truth="1+x"):
    return pool.grade([task(respond(answer), truth) for answer in answers])


def test_mathematics_is_judged_in_a_worker(pool):
    assert [one.total for one in ask(pool, "x+1", "x+2", "1+x")] == [1.0, 0.2, 1.0]


def test_results_are_in_order_when_fast_and_slow_tasks_mix(pool):
    tasks = []
    for n in range(1, 13):
        tasks += [task(respond(f"{n}x+{n}"), f"{n}(x+1)"), task(respond(str(n)), str(n % 3))]
    wanted = [accuracy for n in range(1, 13) for accuracy in (1.0, float(n < 3))]
    assert [one.accuracy for one in pool.grade(tasks)] == wanted


def test_equal_answers_are_judged_once_whatever_was_thought_before(faulty):
    """Four equal hangs cost one deadline, not four."""
    ask(faulty, "x+1")
    responses = [respond("hng+1").replace("b</think>", f"{n}</think>") for n in range(4)]
    start = time.monotonic()
    rewards = faulty.grade([task(response, "1+x") for response in responses])
    assert [one.reason for one in rewards] == [score.Reason.TIMEOUT] * 4
    assert time.monotonic() - start < 2 * DEADLINE_SECONDS


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^9}",
        "20000000!",
        "(" * 500 + "x+1" + ")" * 500,
        "\\sqrt{" * 120 + "x" + "}" * 120,
        "+".join("x^9" for _ in range(250)),
        "(x+1)^{1000000}",
        "{" * 500 + "x",
        "\\frac{1}{" * 60 + "x" + "}" * 60,
    ],
)
def test_a_hostile_answer_earns_no_accuracy_within_the_deadline(pool, answer):
    start = time.monotonic()
    (rewards,) = ask(pool, answer)
    assert rewards.accuracy == 0
    # The start of a process may lie in between.
    assert time.monotonic() - start < DEADLINE_SECONDS + 15
    assert ask(pool, "x+1")[0].total == 1.0


def test_a_sum_of_3000_terms_as_truth_costs_the_deadline_at_most():
    truth = "$" + "+".join(f"x^{{{n}}}" for n in range(3000)) + "$"
    with make_pool(rule=OFFICIAL, deadline=1.0) as pool:
        start = time.monotonic()
        rewards = ask(pool, "$x+2$", "$x^1+1$", truth=truth)
        assert [one.total for one in rewards] == [0.2, 0.2]
        assert rewards[0].reason in (score.Reason.TIMEOUT, score.Reason.WRONG, score.Reason.ERROR)
        assert time.monotonic() - start < 2.0 + 30


@pytest.mark.parametrize(
    ("answer", "reason", "restarts"),
    [
        ("hng+1", score.Reason.TIMEOUT, 1),
        ("bsy+1", score.Reason.TIMEOUT, 1),
        ("seg+1", score.Reason.ERROR, 1),
        ("ext+1", score.Reason.ERROR, 1),
        ("mem+1", score.Reason.ERROR, 0),
        ("err+1", score.Reason.ERROR, 0),
        ("out+1", score.Reason.WRONG, 0),
    ],
)
def test_a_worker_that_fails_costs_only_its_task(faulty, answer, reason, restarts):
    before = faulty.num_restarts
    rewards = ask(faulty, "x+1", answer, "2+x", "1+x")
    assert [one.total for one in rewards[:1] + rewards[2:]] == [1.0, 0.2, 1.0]
    assert rewards[1].reason is reason
    assert rewards[1].total == (0.2 if reason is score.Reason.WRONG else 0.0)
    assert faulty.num_restarts - before == restarts


def test_a_worker_killed_from_outside_between_batches_is_replaced():
    with make_pool() as pool:
        assert ask(pool, "x+1")[0].total == 1.0
        pool.pool._workers[0].process.kill()
        pool.pool._workers[0].process.wait()
        assert ask(pool, "x+1")[0].total == 1.0
        assert pool.num_restarts == 1


def test_a_pool_works_outside_the_main_thread(pool):
    rewards = []
    thread = threading.Thread(target=lambda: rewards.extend(ask(pool, "x+1", "x+3")))
    thread.start()
    thread.join()
    assert [one.total for one in rewards] == [1.0, 0.2]


def test_a_task_without_a_truth_is_refused_by_its_number(pool):
    with pytest.raises(ValueError, match=r"without ground truth cannot be judged: \[1\]"):
        pool.grade([task(respond("1"), "1"), task(respond("1"), None)])


def test_close_ends_the_processes_and_is_idempotent():
    pool = make_pool(num_workers=2)
    processes = [worker.process for worker in pool.pool._workers]
    pool.close()
    pool.close()
    assert all(process.poll() is not None for process in processes)
    with pytest.raises(RuntimeError, match="after close"):
        pool.grade([])


def test_workers_end_by_themselves_when_their_parent_is_killed():
    program = (
        "import os, signal\n"
        "from tests.rewards import test_workers\n"
        "pool = test_workers.make_pool()\n"
        "test_workers.ask(pool, 'x+1')\n"
        "print(pool.pool.process_ids[0], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = os.pathsep.join(part or "." for part in sys.path)
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    worker = int(ran.stdout)
    give_up = time.monotonic() + 20
    while is_running(worker):
        assert time.monotonic() < give_up, f"worker {worker} outlives its parent"
        time.sleep(0.05)


def is_running(process_id):
    try:
        with open(f"/proc/{process_id}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_imports_neither_jax_nor_numpy():
    program = (
        "import sys\n"
        "from prism_jax.rewards import judge_process\n"
        "print(sorted({'jax', 'flax', 'numpy', 'torch'} & set(sys.modules)))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(part or "." for part in sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == "[]"


def test_a_worker_that_cannot_start_stops_the_run_with_a_reason():
    with make_pool("prism_jax.rewards.no_such_module") as pool:
        with pytest.raises(RuntimeError, match="could not start"):
            ask(pool, "x+1")


def test_512_easy_answers_take_well_under_a_second(pool):
    pairs = [
        ("B", "B"), ("The answer is C", "C"), ("12 cm", "12"), ("1,234", "1234"), ("-3", "3"),
        ("2 and 3", "2,3"), ("yes", "no"), ("\\frac{1}{2}", "0.5"), ("x=4", "4"),
        ("triangle", "circle"), ("10:30", "1030"), ("50%", "0.5"), ("17", "19"),
        ("(1,2)", "(1, 2)"), ("5 kg", "5000 g"), ("D. dog", "D"),
    ]  # fmt: skip
    tasks = [task(respond(answer), truth) for answer, truth in pairs * 32]
    start = time.perf_counter()
    rewards = pool.grade(tasks)
    seconds = time.perf_counter() - start
    assert sum(one.accuracy for one in rewards) == 32 * 11
    # About a twentieth of this when the machine is free.
    assert len(rewards) == 512 and seconds < 1.0


@pytest.mark.parametrize(
    ("num_workers", "deadline", "match"), [(0, 1.0, "num_workers"), (1, 0.0, "deadline")]
)
def test_impossible_settings_are_refused(num_workers, deadline, match):
    with pytest.raises(errors.InputError, match=match):
        make_pool(num_workers=num_workers, deadline=deadline)
