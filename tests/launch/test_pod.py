"""`pod.sh` against a fake cloud that fails at each call."""

import os
import signal

import pytest

from tests.launch import scripts

_NAMES = ("--name", "a", "--type", "v5p-16", "--zone", "us-east5-a")
_UP = ("up", *_NAMES, "--spot")
_RUN = ("run", *_NAMES, "--", "sft", "--config=x", '--config.y=a b\'s;$HOME "q"')
_CREATE = "queued-resources create"
_DESCRIBE = r"describe a .*state\.state"
_REASON = r"describe a .*failedData"
_DELETE = "gcloud compute tpus queued-resources delete a --zone=us-east5-a --force --quiet"
_STOCK_OUT = 'ERROR: There is no more capacity in the zone "us-east5-a"\n'
_QUOTA = "ERROR: Quota limit 'TPUV5PPerProjectPerZone' has been exceeded. RESOURCE_EXHAUSTED\n"


def _is(state, **more):
    return {"match": _DESCRIBE, "out": f"{state}\n", **more}


def _count(cloud, text):
    return sum(text in call for call in cloud.calls())


def test_up_waits_until_the_tpu_is_there_and_calls_what_its_dry_run_shows(cloud):
    _, shown, _ = cloud.run("pod.sh", *_UP, "--dry-run")
    cloud.rules(_is("WAITING_FOR_RESOURCES", times=2), _is("ACTIVE"))
    code, _, err = cloud.run("pod.sh", *_UP)
    create, describe = shown.splitlines()
    # As shells quote; the fake cloud quotes as Python does.
    assert [call.replace("'", "") for call in cloud.calls()] == [
        text.replace("\\", "") for text in (create, describe, describe, describe)
    ]
    assert code == 0
    assert "a is there: 1 x v5p-16, 8 chips on 2 hosts" in err
    assert "bash launch/pod.sh down --name a --type v5p-16 --zone us-east5-a" in err
    # Once more: it is there already.
    cloud.rules(_is("ACTIVE"))
    assert cloud.run("pod.sh", *_UP)[0] == 0
    assert _count(cloud, _CREATE) == 1
    assert cloud.run("pod.sh", "down", *_NAMES)[0] == 0
    assert cloud.calls()[-1] == _DELETE
    # It is not deleted a second time, nor anything that this script did not make.
    code, _, err = cloud.run("pod.sh", "down", *_NAMES)
    assert (code, _count(cloud, "delete")) == (2, 1)
    assert "--force deletes it all the same" in err


@pytest.mark.parametrize(
    ("rules", "code", "num_creates", "num_deletes", "message"),
    [
        # Stock-outs, at once and after waiting, are asked again.
        (
            [{"match": _CREATE, "code": 1, "err": _STOCK_OUT, "times": 2}, _is("ACTIVE")],
            *(0, 3, 0, "asking again in"),
        ),
        (
            [
                _is("FAILED"),
                {"match": _REASON, "out": "There is no more capacity in the zone"},
                _is("ACTIVE"),
            ],
            *(0, 2, 1, "no v5p-16 is free"),
        ),
        ([_is("SUSPENDED"), _is("ACTIVE")], 0, 2, 1, "taken away before it was used"),
        (
            [{"match": _CREATE, "code": 1, "err": _STOCK_OUT, "times": 99}],
            *(1, 3, 0, "no v5p-16 in us-east5-a after 3 requests"),
        ),
        # Nothing else is.
        ([{"match": _CREATE, "code": 1, "err": _QUOTA}], 2, 1, 0, "error: no quota for v5p-16"),
        (
            [_is("FAILED"), {"match": _REASON, "out": "Quota limit exceeded"}],
            *(2, 1, 1, "error: no quota for v5p-16"),
        ),
        (
            [{"match": _CREATE, "code": 1, "err": "ERROR: Resource 'a' already exists"}],
            *(2, 1, 0, "a exists already in us-east5-a"),
        ),
        # What may have been made is deleted.
        (
            [{"match": _CREATE, "code": 1, "err": "ERROR: deadline exceeded"}],
            *(1, 1, 1, "deleting the request"),
        ),
        (
            [{"match": _DESCRIBE, "code": 1, "err": "ERROR: 503", "times": 99}],
            *(1, 1, 1, "error: gcloud does not answer: ERROR: 503"),
        ),
        ([{"match": _DESCRIBE, "code": 1, "times": 4}, _is("ACTIVE")], 0, 1, 0, "a is there"),
        (
            [
                {"match": _CREATE, "code": 1, "err": "ERROR: deadline exceeded"},
                {"match": "delete", "code": 1, "err": "ERROR: 503"},
            ],
            *(1, 1, 1, f"could not delete it; it costs until you do: {_DELETE}"),
        ),
        (
            [
                {"match": _CREATE, "code": 1, "err": "ERROR: deadline exceeded"},
                {"match": "delete", "code": 1, "err": "ERROR: NOT_FOUND"},
            ],
            *(1, 1, 1, "a is deleted"),
        ),
    ],
)
def test_up_when_a_call_fails(cloud, rules, code, num_creates, num_deletes, message):
    cloud.rules(*rules)
    seen, _, err = cloud.run("pod.sh", *_UP, "--retries", "2")
    assert (seen, _count(cloud, _CREATE), _count(cloud, "delete")) == (
        code,
        num_creates,
        num_deletes,
    ), err
    assert message in err
    left = (cloud.folder / "pods/a.us-east5-a").exists()
    assert left == (code == 0 or "could not delete" in message)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("call", [_CREATE, "describe"])
def test_up_deletes_what_it_made_when_it_is_stopped(cloud, call, number):
    cloud.rules(
        {"match": _CREATE, "seconds": 0.5 if call == _CREATE else 0},
        _is("WAITING_FOR_RESOURCES", times=999),
    )
    process = cloud.start("pod.sh", *_UP)
    scripts.wait_for(lambda: _count(cloud, call))
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, cloud.calls()[-1]) == (130, _DELETE)
    assert f"deleting the request: {_DELETE}" in err


def test_run_copies_starts_follows_and_ends_with_the_code_of_the_worst_worker(cloud):
    workers = [cloud.worker(f"a.{i}") for i in range(2)]
    # Preempted once; then one worker finds its input wrong, the other loses it.
    cloud.codes("a.0", 143, 134, 42, 42)
    cloud.codes("a.1", 143, 2)
    code, out, err = cloud.run("pod.sh", *_RUN)
    assert code == 2, err
    whole = '[-m][prism_jax][sft][--config=x][--config.y=a b\'s;$HOME "q"]'
    assert cloud.starts() == [f"a.0: {whole}"] * 4 + [f"a.1: {whole}"] * 2
    assert "process a.0 of ? flags [--xla_tpu_enable_async_collective_fusion=true " in out
    log = (workers[0] / ".prism_jax/a/log").read_text()
    assert "exit code 143: restart 1 of at most 20" in log
    # Workers that do not come twice in a row will not come.
    assert log.endswith("ended with exit code 42\n")
    assert not (workers[0] / "prism_jax/tests").exists()
    _, out, _ = cloud.run("pod.sh", "status", *_NAMES)
    assert sorted(line.split()[-1] for line in out.splitlines()) == ["2", "42"]


def test_a_second_run_is_refused_and_the_first_one_goes_on_until_stop(cloud):
    for i in range(2):
        cloud.worker(f"a.{i}")
        cloud.codes(f"a.{i}", "wait")
    process = cloud.start("pod.sh", *_RUN)
    scripts.wait_for(lambda: len(cloud.starts()) == 2)
    code, _, err = cloud.run("pod.sh", *_RUN)
    assert (code, process.poll()) == (2, None)
    assert [_count(cloud, verb) for verb in ("scp", "worker.sh start", "worker.sh stop")] == [
        1,
        1,
        0,
    ]
    assert "a runs already: bash launch/pod.sh logs --name a" in err
    assert cloud.run("pod.sh", "stop", *_NAMES)[0] == 0
    out, _ = process.communicate(timeout=30)
    # Nobody starts again what was stopped; the log shown is that of worker 0.
    assert (process.returncode, out.count("saved"), len(cloud.starts())) == (143, 1, 2)


@pytest.mark.parametrize(
    ("match", "message"),
    [
        ("code a", "a worker of a cannot be reached"),
        ("scp", "copying the project to a worker of a failed"),
        ("tar -xzf", "copying the project to a worker of a failed"),
        ("worker.sh install", "a worker of a failed: bash launch/worker.sh install"),
        ("worker.sh start", "a worker of a failed: bash launch/worker.sh start"),
    ],
)
def test_a_worker_that_cannot_be_reached_ends_the_start_and_leaves_no_job(cloud, match, message):
    for i in range(2):
        cloud.worker(f"a.{i}")
        cloud.codes(f"a.{i}", "wait")
    cloud.rules({"match": match, "worker": "a.1"})
    code, _, err = cloud.run("pod.sh", *_RUN)
    assert code == 1
    assert f"error: {message}" in err
    if match == "worker.sh start":
        path = cloud.folder / "a.0/.prism_jax/a/exit"
        scripts.wait_for(path.exists)
        assert path.read_text() == "143\n"
    assert len(cloud.starts()) <= 1


def test_run_asks_for_another_spot_tpu_when_its_own_is_taken_away(cloud):
    cloud.rules(_is("ACTIVE"))
    cloud.run("pod.sh", *_UP, "--create-flag=--service-account=a b@c")
    for i in range(2):
        cloud.worker(f"a.{i}")
    gone = {"match": "command=cd.*worker.sh (follow|code)", "code": 255, "times": 4}
    cloud.rules(gone, _is("SUSPENDED"), _is("WAITING_FOR_RESOURCES"), _is("ACTIVE"))
    # Not even that it was a spot TPU needs to be said again.
    code, _, err = cloud.run("pod.sh", "run", *_NAMES, "--", "sft")
    assert code == 0, err
    assert "a was taken away: asking for another" in err
    verbs = [c.split()[4] for c in cloud.calls() if "queued-resources" in c]
    assert verbs == ["create", "describe", "describe", "delete", "create", "describe", "describe"]
    first, again = [c for c in cloud.calls() if _CREATE in c]
    assert first == again
    assert "--spot" in first


def test_ctrl_c_leaves_the_stage_running_and_says_how_to_see_and_end_it(cloud):
    for i in range(2):
        cloud.worker(f"a.{i}")
        cloud.codes(f"a.{i}", "wait")
    process = cloud.start("pod.sh", *_RUN)
    scripts.wait_for(lambda: len(cloud.starts()) == 2)
    scripts.wait_for(lambda: _count(cloud, "follow"))
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "to see it: bash launch/pod.sh logs --name a" in err
    assert cloud.run("pod.sh", "stop", *_NAMES)[0] == 0
    states = [cloud.folder / f"a.{i}/.prism_jax/a/exit" for i in range(2)]
    scripts.wait_for(lambda: all(path.exists() for path in states))
    assert [path.read_text() for path in states] == ["143\n", "143\n"]


def test_run_gives_up_on_workers_that_never_answer(cloud):
    cloud.rules(
        {"match": "command=cd.*worker.sh (follow|code)", "code": 255, "times": 999},
        _is("ACTIVE", times=999),
    )
    for i in range(2):
        cloud.worker(f"a.{i}")
    code, _, err = cloud.run("pod.sh", *_RUN, PRISM_MOST_LOST="2")
    assert code == 1
    assert err.splitlines()[-1].startswith("error: the workers of a do not answer")
