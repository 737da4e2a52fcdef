"""`gke.sh`, `slurm.sh`, `local_pod.sh` and `pipeline.sh` beside fake programs that fail."""

import os
import pathlib
import re
import signal
import subprocess

import pytest
import yaml

from launch import jobset
from tests.launch import scripts

_GKE = ("--name=a", "--type=v5p", "--topology=2x4x4", "--image=i")
_STAGE = ("--", "sft", "--config=x", "--config.y=a b's;$HOME")
_WHOLE = "[-m][prism_jax][sft][--config=x][--config.y=a b's;$HOME]"
_STATE = "get jobset a -o"


@pytest.mark.parametrize(
    ("rules", "code"),
    [
        ([{"match": _STATE, "times": 2}, {"match": _STATE, "out": "Completed"}], 0),
        ([{"match": _STATE, "out": "Failed"}, {"match": "get pods", "out": "143 2 134"}], 2),
        ([{"match": _STATE, "out": "Failed"}, {"match": "get pods", "out": ""}], 1),
        ([{"match": _STATE, "code": 1, "times": 4}, {"match": _STATE, "out": "Completed"}], 0),
        ([{"match": _STATE, "code": 1, "times": 5}], 1),
        ([{"match": "apply", "code": 1, "err": "no such cluster"}], 1),
        ([{"match": "delete", "code": 1, "err": "forbidden"}], 1),
    ],
)
def test_gke_replaces_applies_and_waits_for_a_jobset(cloud, rules, code):
    cloud.rules(*rules)
    seen, _, err = cloud.run("gke.sh", "run", *_GKE, *_STAGE)
    assert seen == code, err
    verbs = [call.split()[3] for call in cloud.calls()]
    failing = [rule["match"] for rule in rules if rule.get("err")]
    if failing == ["delete"]:
        assert verbs == ["delete"]
        return
    assert verbs[:2] == ["delete", "apply"]
    _, rendered, _ = cloud.run("gke.sh", "render", *_GKE, *_STAGE)
    assert (cloud.folder / "applied.yaml").read_text() == rendered


def _expanded(word):
    """Return a word of a container's command as Kubernetes hands it to the process."""
    return re.sub(r"\$(\$|\(\w+\))", lambda found: "$" if found[1] == "$" else "replaced", word)


def test_the_yaml_is_the_jobset_and_an_exit_code_of_2_alone_stops_it():
    odd = ("--config.a=$(PYTHONUNBUFFERED)", "--config.b=$$x$")
    options = ("--name=a", "--type=tpu7x", "--topology=2x2x2", "--image=i", "--slices=3")
    argv = [*options, *_STAGE, *odd]
    made = jobset.jobset(jobset.parser().parse_args(argv))
    assert yaml.safe_load("\n".join(jobset.yaml_lines(made))) == made
    (job,) = made["spec"]["replicatedJobs"]
    assert (job["replicas"], job["template"]["spec"]["parallelism"]) == (3, 2)
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 600
    words = [[_expanded(word) for word in c["command"][-5:]] for c in pod["containers"]]
    assert words == [[*_STAGE[1:], *odd]] * 2
    rules = job["template"]["spec"]["podFailurePolicy"]["rules"]
    assert [rule["onExitCodes"]["containerName"] for rule in rules] == ["jax-tpu-1", "jax-tpu-2"]
    # The same codes as `restarts` of common.sh.
    script = "source launch/common.sh; for i in {1..255}; do ! restarts $i || echo $i; done"
    done = subprocess.run(
        ["bash", "-c", script], cwd=scripts.ROOT, capture_output=True, text=True, check=True
    )
    restarted = [int(line) for line in done.stdout.split()]
    assert rules[0]["onExitCodes"]["values"] == restarted
    assert 2 not in restarted
    assert {1, 42, 134, 137, 143} <= set(restarted)


@pytest.mark.parametrize(
    ("kind", "topology", "hosts", "chips"),
    [
        ("v5e", "2x2", 1, 4),
        ("v5e", "2x4", 1, 8),
        ("v5e", "4x4", 4, 4),
        ("v5p", "2x2x1", 1, 4),
        ("v5p", "2x4x4", 8, 4),
        ("v6e", "16x16", 64, 4),
    ],
)
def test_hosts_and_chips_follow_from_the_topology(kind, topology, hosts, chips):
    argv = ["--name=a", f"--type={kind}", f"--topology={topology}", "--image=i", *_STAGE]
    made = jobset.jobset(jobset.parser().parse_args(argv))
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert (job["completions"], limits) == (hosts, {"google.com/tpu": str(chips)})


_SLURM = ("--name=a", "--nodes=2", "--max-restarts=2")


@pytest.mark.parametrize(
    ("code", "restarts", "is_stopped", "is_requeued"),
    [
        (0, 0, False, False),
        (2, 0, False, False),
        (143, 0, False, True),
        (134, 1, False, True),
        (143, 2, False, False),
        (143, 0, True, False),
    ],
)
def test_a_slurm_job_queues_itself_again_while_its_exit_code_says_so(
    cloud, code, restarts, is_stopped, is_requeued
):
    cloud.rules({"match": "sbatch", "out": "77;cluster\n"})
    assert cloud.run("slurm.sh", "submit", *_SLURM, *_STAGE)[0] == 0
    state = cloud.folder / "slurm"
    assert (state / "a.job").read_text() == "77\n"
    cloud.rules({"match": "squeue", "out": "RUNNING\n"})
    seen, _, err = cloud.run("slurm.sh", "submit", *_SLURM, *_STAGE)
    assert (seen, "a is in the queue already, as job 77" in err) == (2, True)
    if is_stopped:
        assert cloud.run("slurm.sh", "stop", *_SLURM)[0] == 0
        assert cloud.calls()[-1] == "scancel --signal=TERM 77"
    # The script itself, as SLURM would run it; a requeued job is killed where it sleeps.
    cloud.rules({"match": "srun", "code": code}, {"match": "scontrol", "code": 1})
    job = subprocess.run(
        ["bash", str(state / "a.sbatch")],
        env=cloud.environment | {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": str(restarts)},
        capture_output=True,
        check=False,
    )
    assert job.returncode == code
    assert ("scontrol requeue 77" in cloud.calls()) == is_requeued
    assert cloud.run("slurm.sh", "wait", *_SLURM)[0] == code


def test_a_slurm_job_starts_the_program_with_its_arguments_whole(cloud):
    _, script, _ = cloud.run("slurm.sh", "render", "--name=a", *_STAGE)
    entry = f"launch/entry.sh --python {cloud.stub}"
    (cloud.folder / "slurm").mkdir()
    script = script.replace("launch/entry.sh", entry)
    subprocess.run(["bash", "-c", script], env=cloud.environment, check=True)
    assert cloud.starts() == [f"{cloud.folder.name}: {_WHOLE}"]


def test_waiting_for_a_slurm_job_bears_a_silent_queue_and_sees_one_that_is_gone(cloud):
    assert cloud.run("slurm.sh", "wait", "--name=a")[0] == 2
    cloud.rules({"match": "sbatch", "code": 1, "err": "sbatch: error: no such partition"})
    assert cloud.run("slurm.sh", "submit", *_SLURM, *_STAGE)[0] == 1
    cloud.rules(
        {"match": "sbatch", "out": "77\n"},
        {"match": "squeue", "code": 1, "err": "slurm_load_jobs error: timeout", "times": 5},
        {"match": "squeue", "out": "PENDING\n"},
        {"match": "squeue", "code": 1, "err": "slurm_load_jobs error: Invalid job id specified"},
    )
    code, _, err = cloud.run("slurm.sh", "run", *_SLURM, *_STAGE)
    assert code == 143
    assert "job 77 has left the queue without an exit code" in err


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([[0], [0], [0]], 0),
        ([[143], [0], [143]], 143),
        ([[134], [2], [134]], 2),
        ([[134], [1], [143]], 1),
        # Started again once, and then through.
        ([[143, 0], [143, 0], [134, 0]], 0),
        # A process that does not notice that it lost a peer is killed, and starts again too.
        ([[137, 0], ["stuck", 0], [0, 0]], 0),
    ],
)
def test_a_local_pod_ends_with_the_worst_exit_code_of_its_processes(cloud, codes, code):
    for i, of_process in enumerate(codes):
        cloud.codes(str(i), *of_process)
    restarts = ("--max-restarts", "1") if max(map(len, codes)) > 1 else ()
    seen, out, err = cloud.run("local_pod.sh", "3", *restarts, *_STAGE, PRISM_GRACE_SECONDS="1")
    assert seen == code, err
    num_starts = max(map(len, codes))
    assert cloud.starts() == sorted(f"{i}: {_WHOLE}" for i in range(3) for _ in range(num_starts))
    for i in range(3):
        assert f"[{i}] process {i} of 3" in out


def _living(cloud):
    done = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if str(cloud.stub) in line]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_to_a_local_pod_reaches_every_process_and_leaves_no_orphan(cloud, number):
    for i in range(2):
        cloud.codes(str(i), "wait")
    process = cloud.start("local_pod.sh", "2", "--max-restarts", "3", *_STAGE)
    scripts.wait_for(lambda: len(cloud.starts()) == 2)
    if number == signal.SIGINT:  # Ctrl-C: the terminal tells the whole group
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    if number == signal.SIGKILL:
        scripts.wait_for(lambda: not _living(cloud))
    else:
        assert (process.returncode, sorted(re.findall(r"\[\d\] saved", out))) == (
            143,
            ["[0] saved", "[1] saved"],
        )
    assert _living(cloud) == []
    assert len(cloud.starts()) == 2


def test_a_second_signal_kills(cloud):
    for i in range(2):
        cloud.codes(str(i), "stuck")
    process = cloud.start("local_pod.sh", "2", *_STAGE)
    scripts.wait_for(lambda: len(cloud.starts()) == 2)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        scripts.time.sleep(0.5)
    process.communicate(timeout=30)
    assert (process.returncode, _living(cloud)) == (137, [])


def test_secrets_come_from_a_file_that_nobody_else_can_read(cloud):
    path = cloud.folder / ".prism_env"
    path.write_text("LIBTPU_INIT_ARGS=--seen\n")
    path.chmod(0o600)
    code, out, _ = cloud.run("local_pod.sh", "1", *_STAGE)
    assert (code, "flags [--seen]" in out) == (0, True)
    path.chmod(0o644)
    code, out, _ = cloud.run("local_pod.sh", "1", *_STAGE)
    assert (code, "others can read it; chmod 600" in out) == (2, True)


def _chain(root):
    return (
        *("--size", "4b", "--root", str(root), "--base", "m", "--demonstrations", "d.json"),
        *("--align-prompts", "a", "--rl-prompts", "r", "--test-prompts", "t"),
        *("--args", "rlvr=--config.x=(1, 2)", "--", "local_pod.sh", "2"),
    )


def test_a_chain_stops_at_a_step_that_fails_goes_on_there_and_skips_what_is_finished(cloud):
    arguments = _chain(pathlib.Path(cloud.folder / "run"))
    # Their third start is that of warm-up; upcycling is of no process.
    for i in range(2):
        cloud.codes(str(i), 0, 0, 1)
    code, _, err = cloud.run("pipeline.sh", *arguments)
    assert code == 1
    assert err.splitlines()[-1].startswith("error: warmup ended with exit code 1; run the same")
    commands = [line.split("[")[3].rstrip("]") for line in cloud.starts()]
    assert sorted(set(commands)) == ["pairs", "sft", "upcycle", "warmup"]
    code, _, err = cloud.run("pipeline.sh", *arguments)
    assert code == 0, err
    finished = [line for line in err.splitlines() if line.endswith(": finished before")]
    assert [line.split(":")[0] for line in finished] == ["sft", "upcycle", "pairs"]
    assert sum("[--config.x=(1, 2)]" in line for line in cloud.starts()) == 2  # both processes
    before = cloud.starts()
    code, _, err = cloud.run("pipeline.sh", *arguments)
    assert (code, err.count("finished before"), cloud.starts()) == (0, 8, before)


def test_a_chain_in_a_bucket_asks_the_bucket_what_is_finished(cloud):
    cloud.rules({"match": "storage ls gs://b/r/sft/finished.json", "code": 1})
    code, _, err = cloud.run("pipeline.sh", "--to", "upcycle", *_chain("gs://b/r"))
    assert code == 0
    assert cloud.calls() == [
        "gcloud storage ls gs://b/r/sft/finished.json",
        "gcloud storage ls gs://b/r/upcycle/config.json",
    ]
    assert "upcycle: finished before" in err
    assert not (scripts.ROOT / "gs:").exists()
