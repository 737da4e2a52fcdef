"""The start of a job of several processes: detection, the roll call, and JAX across them."""

import concurrent.futures
import contextlib
import http.server
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading

import jax
import pytest

from prism_jax import configuration, errors
from prism_jax.setup import distributed, roll_call

_ROOT = pathlib.Path(__file__).parents[2]
_GKE = {
    "TPU_WORKER_HOSTNAMES": "job-slice-1-0.job,job-slice-1-1.job",
    "TPU_WORKER_ID": "1",
    "TPU_SKIP_MDS_QUERY": "true",
}
_SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[007-009,012],other",
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_NTASKS": "999",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "TPU_SKIP_MDS_QUERY": "1",
}
_PRISM = {"PRISM_COORDINATOR": "h", "PRISM_NUM_PROCESSES": "4", "PRISM_PROCESS_ID": "3"}


def _seen(environment):
    cluster = distributed.detect(environment)
    return cluster and (
        cluster.source,
        cluster.address,
        cluster.num_processes,
        cluster.process,
    )


@pytest.mark.parametrize(
    ("environment", "cluster"),
    [
        ({"TPU_SKIP_MDS_QUERY": "1"}, None),
        ({"JAX_PLATFORMS": "cpu"}, None),
        (_PRISM, ("PRISM_COORDINATOR", "h:8476", 4, 3)),
        (_PRISM | {"PRISM_COORDINATOR": "[::1]:7"}, ("PRISM_COORDINATOR", "[::1]:7", 4, 3)),
        (_PRISM | {"PRISM_COORDINATOR_PORT": "9"}, ("PRISM_COORDINATOR", "h:9", 4, 3)),
        (_PRISM | _SLURM | _GKE, ("PRISM_COORDINATOR", "h:8476", 4, 3)),
        (_GKE, ("GKE", "job-slice-1-0.job:8476", 2, 1)),
        (
            _GKE
            | {
                "MEGASCALE_NUM_SLICES": "3",
                "MEGASCALE_SLICE_ID": "1",
                "MEGASCALE_COORDINATOR_ADDRESS": "job-slice-0-0.job:8081",
            },
            ("GKE", "job-slice-0-0.job:8476", 6, 3),
        ),
        # Two containers a host: each worker of a slice is named with its port.
        (
            _GKE | {"TPU_PROCESS_ADDRESSES": "a:8471,a:8472,b:8471,b:8472", "TPU_WORKER_ID": "3"},
            ("GKE", "a:8476", 4, 3),
        ),
        (_GKE | {"JAX_PLATFORMS": "cpu"}, None),
        (_SLURM, ("SLURM", "node007:8476", 20, 9)),
        (_SLURM | {"SLURM_STEP_NODELIST": "n1,n2"}, ("SLURM", "n1:8476", 20, 9)),
        # A shell of `salloc` has no task of its own.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "TPU_SKIP_MDS_QUERY": "1"}, None),
    ],
)
def test_the_environment_says_which_process_of_how_many_this_is(environment, cluster):
    assert _seen(environment) == cluster


def test_a_task_of_slurm_takes_one_gpu_where_its_node_has_several_tasks():
    tasks = _SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x5)"}
    assert distributed.detect(tasks | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}).local_devices == (1,)
    assert distributed.detect(tasks | {"CUDA_VISIBLE_DEVICES": "1"}).local_devices is None
    alone = _SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x20)", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert distributed.detect(alone).local_devices is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"PRISM_PROCESS_ID": ""}, "all three or none must be set; PRISM_PROCESS_ID is not"),
        ({"PRISM_PROCESS_ID": "4"}, "PRISM_PROCESS_ID must be an integer from 0 to 3, got '4'"),
        ({"PRISM_NUM_PROCESSES": "0"}, "PRISM_NUM_PROCESSES must be an integer >= 1, got '0'"),
        ({"PRISM_NUM_PROCESSES": "two"}, "PRISM_NUM_PROCESSES must be an integer >= 1, got 'two'"),
        ({"PRISM_COORDINATOR": "http://h"}, "must be HOST or HOST:PORT, got 'http://h'"),
        ({"PRISM_COORDINATOR": "h:99999"}, "must be HOST or HOST:PORT, got 'h:99999'"),
        ({"PRISM_COORDINATOR_PORT": "0"}, "PRISM_COORDINATOR_PORT must be an integer from 1 to"),
    ],
)
def test_wrong_values_are_named(wrong, message):
    with pytest.raises(errors.InputError, match=re.escape(message)):
        distributed.detect(_PRISM | wrong)


@contextlib.contextmanager
def _metadata(attributes):
    """Serve attributes of a virtual machine; others are not found."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            value = attributes.get(self.path.rsplit("/", 1)[1])
            given = value if self.headers["Metadata-Flavor"] == "Google" else 403
            self.send_response(given if isinstance(given, int) else 404 if given is None else 200)
            self.end_headers()
            self.wfile.write(given.encode() if isinstance(given, str) else b"")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
    finally:
        server.shutdown()


def test_a_tpu_vm_reads_its_place_from_the_metadata(monkeypatch):
    one = {"agent-worker-number": "1", "worker-network-endpoints": "a:0:10.0.0.1,b:1:10.0.0.2"}
    with _metadata(one) as environment:
        assert _seen(environment) == ("TPU VM", "10.0.0.1:8476", 2, 1)
        assert distributed.detect(environment | {"JAX_PLATFORMS": "cpu"}) is None
    slices = "X: 'y'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
    slices += "MEGASCALE_COORDINATOR_ADDRESS: '10.9.0.1:8080'\n"
    named = one | {"worker-network-endpoints": "host-a,host-b", "tpu-env": slices}
    with _metadata(named) as environment:
        assert _seen(environment) == ("TPU VM", "10.9.0.1:8476", 4, 3)
    with _metadata({}) as environment:
        assert _seen(environment) is None
    # A pod must not fall apart into jobs of one host each because its metadata did not come.
    monkeypatch.setattr(distributed, "_RETRY_SECONDS", 0.0)
    with _metadata({"agent-worker-number": 503}) as environment:
        with pytest.raises(errors.InputError, match=r"agent-worker-number \(status 503\)"):
            distributed.detect(environment)


def _port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _call(callers, *, limit_seconds=10):
    """Let these processes, threads here, call; return what each ends with."""
    port = _port()

    def hold(caller):
        try:
            roll_call.hold(
                caller, host="localhost", port=port, notice_seconds=60, limit_seconds=limit_seconds
            )
        except (errors.InputError, roll_call.MissingWorkers) as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(len(callers)) as pool:
        return list(pool.map(hold, callers))


def _caller(process, *, of=3, version="1", job="", **options):
    return roll_call.Caller(process=process, of=of, job=job, version=version, options=options)


@pytest.mark.parametrize(
    ("third", "message"),
    [
        (_caller(2), None),
        (_caller(2, of=4), "process 2 was started with processes 4, process 0 with 3"),
        (_caller(2, version="2"), "process 2 was started with version 2, process 0 with 1"),
        (_caller(2, seed="a"), "process 2 was started with another seed than process 0"),
        (_caller(1), "two processes have the number 1, the second one at"),
    ],
)
def test_processes_that_do_not_agree_are_all_refused_with_the_same_line(third, message):
    verdicts = _call([_caller(0), _caller(1), third])
    assert len(set(verdicts)) == 1
    assert (verdicts[0] is None) == (message is None)
    assert message is None or verdicts[0].startswith(message)


def test_another_job_on_the_same_hosts_does_not_disturb_and_many_processes_come():
    stranger = _caller(2, of=40, job="other")
    verdicts = _call([*(_caller(i, of=40) for i in range(40)), stranger], limit_seconds=3)
    assert verdicts == [None] * 40 + ["42"]


def test_a_field_says_whether_a_cluster_is_joined(monkeypatch):
    for name in {*_PRISM, *_SLURM, *_GKE}:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    distributed.join(None)
    assert not jax.distributed.is_initialized()
    with pytest.raises(errors.InputError, match="is_distributed = True, but there is no cluster"):
        distributed.join(True)
    monkeypatch.setenv("PRISM_PROCESS_ID", "wrong")
    distributed.join(False)
    with pytest.raises(errors.InputError, match="all three or none must be set"):
        distributed.join(None)
    for text, value in (("true", True), ("false", False), ("None", None)):
        override = f"--config.mesh.is_distributed={text}"
        argv = ["--config=configs/sft.py:tiny", "--workdir=x", override]
        assert configuration.read(argv, command="sft")[0].mesh.is_distributed is value


def test_no_value_of_an_option_travels():
    digests = distributed._digests(["sft", "--a=secret", "--b", "--a=other"])
    assert digests.keys() == {"command", "--a", "--b"}
    assert "secret" not in str(digests)
    assert digests != distributed._digests(["sft", "--a=other", "--b", "--a=secret"])


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        (("sft", "--workdir", "a", "--new"), set()),
        (("warmup", "--workdir", "a", "--new"), {"command"}),
        (("sft", "--workdir", "b", "--new"), {"--workdir"}),
        (("sft", "--workdir", "a", "--new", "b"), {"--new"}),
    ],
)
def test_the_command_and_values_that_stand_alone_are_compared(other, differs):
    digests = distributed._digests(["sft", "--workdir", "a", "--new"])
    others = distributed._digests(other)
    assert digests.keys() == others.keys()
    assert {name for name in digests if digests[name] != others[name]} == differs


_PROCESS = """
from prism_jax.setup import distributed
distributed.join(None, notice_seconds=0.2)
print("joined", flush=True)
import jax
from jax.experimental import multihost_utils
total = multihost_utils.process_allgather(jax.process_index() + 1).sum()
# In one write: gloo's own lines go to the same place.
print(f"sum {total} of {jax.process_count()} devices {jax.device_count()}", flush=True)
"""


def _start(number, port, *, seconds=300):
    return subprocess.Popen(
        [sys.executable, "-c", _PROCESS],
        cwd=_ROOT,
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "PRISM_COORDINATOR": f"localhost:{port}",
            "PRISM_NUM_PROCESSES": "3",
            "PRISM_PROCESS_ID": str(number),
            "PRISM_START_SECONDS": str(seconds),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_start_says_who_is_missing_and_goes_on_when_they_come():
    port = _port()
    running = [_start(0, port), _start(2, port)]
    try:
        line = next(line for line in running[0].stderr if " 2 of 3 " not in line)
        assert "process 0 waits for 1 of 3 processes: process 1 did not connect" in line
        with socket.create_connection(("localhost", port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        running.append(_start(1, port))
        outputs = [process.communicate(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0, 0], outputs
    assert all("sum 6 of 3 devices 6" in out for out, _ in outputs), outputs
    # Where one compiles for longer than gloo waits, its devices are connected already.
    assert all(out.index("[Gloo] Rank") < out.index("joined") for out, _ in outputs), outputs


def test_a_start_gives_up_at_its_limit_with_an_exit_code_that_restarts():
    port = _port()
    running = [
        _start(0, port, seconds=2),
        _start(1, port),
        _start(2, _port(), seconds=1),
    ]
    try:
        outputs = [process.communicate(timeout=120)[1].splitlines() for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [42, 42, 42]
    missing = re.compile("error: gave up after [0-9]+ s: process 0 waits for [12] of 3 processes")
    assert missing.match(outputs[0][-1])
    assert outputs[1][-1] == outputs[0][-1] or "cannot reach process 0" in outputs[1][-1]
    assert "process 2 of 3 cannot reach process 0 at localhost:" in outputs[2][-1]
