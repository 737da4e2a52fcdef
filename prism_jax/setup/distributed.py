"""The start of a job of several processes: who they are, and `jax.distributed`.

The first of these that is there decides:

    PRISM_COORDINATOR=HOST[:PORT], PRISM_NUM_PROCESSES, PRISM_PROCESS_ID    all three or none
    GKE       TPU_WORKER_HOSTNAMES (or TPU_PROCESS_ADDRESSES) and TPU_WORKER_ID
    SLURM     a task of `srun`
    TPU VM    the metadata of Google Compute Engine

Several slices are one job: MEGASCALE_* says how many there are. Process 0 listens on port 8476
(PRISM_COORDINATOR_PORT names another): the port that JAX would choose, 8482, is closed by the usual
firewall of Google Cloud. PRISM_START_SECONDS limits the wait for missing workers.
"""

import dataclasses
import hashlib
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from prism_jax import errors, version
from prism_jax.checkpoints import lock
from prism_jax.setup import agreement, compilation_cache, roll_call

PORT = 8476
_NAMES = ("PRISM_COORDINATOR", "PRISM_NUM_PROCESSES", "PRISM_PROCESS_ID")
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
_NOTICE_SECONDS = 60.0
_LIMIT_SECONDS = 1800.0
_METADATA_SECONDS = 10.0
_METADATA_TRIES = 3
_RETRY_SECONDS = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """The processes of a job, and the number of this process."""

    source: str
    host: str  # of process 0
    port: int
    num_processes: int
    process: int
    job: str = ""  # its name among the jobs on the same hosts
    local_devices: tuple[int, ...] | None = None  # None: all of this host

    @property
    def address(self) -> str:
        """Return host and port of process 0."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def join(is_distributed: bool | None, *, notice_seconds: float = _NOTICE_SECONDS) -> None:
    """Join the processes of the job, if it has several; call it before JAX has devices.

    Args:
      is_distributed: None joins when there is a cluster; True must find one; False stays alone.
      notice_seconds: time between two lines that name the missing processes.

    Raises:
      InputError: the variables are wrong, there is no cluster, or its processes do not agree.
      MissingWorkers: not all processes came before the limit.
    """
    if is_distributed is False or jax.distributed.is_initialized():
        return
    limit_seconds = _seconds(os.environ)
    cluster = detect(os.environ)
    if cluster is None:
        if is_distributed:
            raise errors.InputError(
                f"mesh.is_distributed = True, but there is no cluster: neither {', '.join(_NAMES)} "
                "nor TPU workers nor a task of srun"
            )
        return
    if cluster.num_processes == 1:
        return
    caller = roll_call.Caller(
        process=cluster.process,
        of=cluster.num_processes,
        job=cluster.job,
        version=version.VERSION,
        options=_digests(sys.argv[1:]),
    )
    roll_call.hold(
        caller,
        host=cluster.host,
        port=cluster.port,
        notice_seconds=notice_seconds,
        limit_seconds=limit_seconds,
    )
    # Does nothing on accelerators; XLA's CPU client needs it to have other processes at all.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # The CPU client would run programs side by side, each process in another order, and threads
    # that wait in the collectives of one would keep those of the other from starting.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.distributed.initialize(
        cluster.address,
        cluster.num_processes,
        cluster.process,
        local_device_ids=cluster.local_devices,
        cluster_detection_method="deactivate",
    )
    agreement.watch(lock.release_all)
    if _keeps_programs_apart():
        # Process 0 alone writes. Of a job that is started again it would read a program that the
        # others compile, in which the collectives may have another order, or whose tuning waits
        # for all processes: each then waits for ever.
        jax.config.update("jax_enable_compilation_cache", False)
    if jax.default_backend() == "cpu":
        # At the first collective of a set of devices gloo gives its processes 30 s to come; later
        # one of them may be compiling for longer.
        _add_over_all_devices()


def _add_over_all_devices() -> None:
    mesh = jax.make_mesh((jax.device_count(),), ("all",))
    ones = jax.make_array_from_callback(
        (jax.device_count(),),
        NamedSharding(mesh, PartitionSpec("all")),
        lambda index: np.ones(1, np.int32),
    )
    add = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))
    jax.block_until_ready(add(ones))


def _keeps_programs_apart() -> bool:
    """Return whether a program that process 0 keeps is not found by the others.

    On CPUs the key is another one on each process. Hosts with GPUs may each have a home of their
    own; a folder that the user names is taken to be shared. TPU programs need no agreement.
    """
    backend = jax.default_backend()
    return backend == "cpu" or (backend == "gpu" and compilation_cache.is_default(os.environ))


def detect(environment: Mapping[str, str]) -> Cluster | None:
    """Return the cluster that this process is a part of, or None.

    Raises InputError when it is described wrongly.
    """
    port = _integer(environment, "PRISM_COORDINATOR_PORT", 1, 65535, PORT)
    if any(name in environment for name in _NAMES):
        return _named(environment, port)
    platforms = environment.get("JAX_PLATFORMS", "")
    has_tpu = not platforms or "tpu" in platforms.split(",")
    if has_tpu and "TPU_WORKER_ID" in environment and _gke_workers(environment):
        return _tpu("GKE", environment, _gke_workers(environment), port)
    if all(name in environment for name in _SLURM):
        return _slurm(environment, port)
    # JAX sets this variable on import where no TPU chip is plugged in.
    if has_tpu and "TPU_SKIP_MDS_QUERY" not in environment:
        return _tpu_vm(environment, port)
    return None


def _integer(
    environment: Mapping[str, str], name: str, least: int, most: int | None, default: int | None
) -> int:
    """Return the variable's number; refuse a text that is not a number within the bounds."""
    text = environment.get(name)
    if text is None and default is not None:
        return default
    is_number = text is not None and re.fullmatch(r"-?[0-9]+", text.strip()) is not None
    if not is_number or not least <= int(text) <= (int(text) if most is None else most):
        bounds = f">= {least}" if most is None else f"from {least} to {most}"
        raise errors.InputError(f"{name} must be an integer {bounds}, got {text!r}")
    return int(text)


def _seconds(environment: Mapping[str, str]) -> float:
    return float(_integer(environment, "PRISM_START_SECONDS", 1, None, int(_LIMIT_SECONDS)))


def _named(environment: Mapping[str, str], port: int) -> Cluster:
    """Return the cluster of the three variables."""
    absent = [name for name in _NAMES if not environment.get(name, "").strip()]
    if absent:
        raise errors.InputError(
            f"{', '.join(_NAMES)}: all three or none must be set; {', '.join(absent)} is not"
        )
    address = environment[_NAMES[0]].strip()
    # [::1]:8476, 10.0.0.1:8476 or a name alone
    match = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^\s:/\[\]]+)(?::([0-9]+))?", address)
    if match is None or not 1 <= int(match[2] or port) <= 65535:
        raise errors.InputError(f"{_NAMES[0]} must be HOST or HOST:PORT, got {address!r}")
    count = _integer(environment, _NAMES[1], 1, None, None)
    return Cluster(
        source="PRISM_COORDINATOR",
        host=match[1].strip("[]"),
        port=int(match[2] or port),
        num_processes=count,
        process=_integer(environment, _NAMES[2], 0, count - 1, None),
    )


def _gke_workers(environment: Mapping[str, str]) -> list[str]:
    """Return the workers of this slice in the order of their numbers."""
    text = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    return [worker.strip() for worker in text.split(",") if worker.strip()]


def _tpu(source: str, environment: Mapping[str, str], workers: Sequence[str], port: int) -> Cluster:
    """Return the cluster of one slice or several, from the workers of this one."""
    num_slices = _integer(environment, "MEGASCALE_NUM_SLICES", 1, None, 1)
    number = _integer(environment, "MEGASCALE_SLICE_ID", 0, num_slices - 1, 0)
    worker = _integer(environment, "TPU_WORKER_ID", 0, len(workers) - 1, None)
    # The coordinator of the slices is process 0 of slice 0.
    first = environment.get("MEGASCALE_COORDINATOR_ADDRESS", "").strip() or workers[0]
    return Cluster(
        source=source,
        host=first.split(":")[0],
        port=port,
        num_processes=num_slices * len(workers),
        process=number * len(workers) + worker,
    )


def _slurm(environment: Mapping[str, str], port: int) -> Cluster:
    """Return the cluster of a job step; its tasks are the processes."""
    nodes = environment["SLURM_STEP_NODELIST"]
    # node7 of "node7,node9"; node007 of "node[007-009,012],other"
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    if match is None:
        raise errors.InputError(f"SLURM_STEP_NODELIST = {nodes!r} names no node")
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    count = _integer(environment, name, 1, None, None)
    local = _integer(environment, "SLURM_LOCALID", 0, None, None)
    visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    # "4(x2)": four tasks on each of two nodes. With one task a node it takes all GPUs; with
    # several each takes one of them, unless Slurm has bound one GPU to each task already.
    tasks = int(re.match(r"[0-9]*", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))[0] or 1)
    return Cluster(
        source="SLURM",
        job=environment["SLURM_JOB_ID"],
        host=match[1] + (match[2] or ""),
        port=port,
        num_processes=count,
        process=_integer(environment, "SLURM_PROCID", 0, count - 1, None),
        local_devices=(local,) if tasks > 1 and len(visible) > 1 else None,
    )


def _tpu_vm(environment: Mapping[str, str], port: int) -> Cluster | None:
    """Return the cluster of a TPU VM; None where there is no such metadata."""
    number = _metadata(environment, "agent-worker-number")
    endpoints = _metadata(environment, "worker-network-endpoints")
    if number is None or endpoints is None:
        return None
    # Either host names, or triples name:id:address.
    workers = [part.strip().split(":")[-1] for part in endpoints.split(",") if part.strip()]
    pairs = re.findall(r"^\s*(MEGASCALE_\w+):\s*'?([^'\n]*?)'?\s*$", _tpu_env(environment), re.M)
    megascale = dict(pairs) | {k: v for k, v in environment.items() if k.startswith("MEGASCALE_")}
    values = {name: value for name, value in megascale.items() if value}
    return _tpu("TPU VM", values | {"TPU_WORKER_ID": number}, workers, port)


def _tpu_env(environment: Mapping[str, str]) -> str:
    return _metadata(environment, "tpu-env") or ""


def _metadata(environment: Mapping[str, str], key: str) -> str | None:
    """Return an attribute of this virtual machine; None where there is none."""
    server = environment.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/{key}",
        headers={"Metadata-Flavor": "Google"},
    )
    # Never through a proxy: the server is on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    reason: object = None
    for _ in range(_METADATA_TRIES):
        try:
            with opener.open(request, timeout=_METADATA_SECONDS) as answer:
                return answer.read().decode().strip()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            reason = f"status {error.code}"
        except OSError as error:
            reason = error
        time.sleep(_RETRY_SECONDS)
    raise errors.InputError(
        f"this host has TPU chips, but the metadata server {server} does not tell {key} "
        f"({reason}); TPU_SKIP_MDS_QUERY=1 starts without it, on this host alone"
    )


def _digests(arguments: Sequence[str]) -> dict[str, str]:
    """Return the command and each option with a digest of its values: no value travels.

    A value may follow its option as an argument of its own.
    """
    values: dict[str, list[str]] = {}
    name = "command"
    for argument in arguments:
        value = argument
        if argument.startswith("--"):
            name, _, value = argument.partition("=")
        values.setdefault(name, []).append(value)
    return {
        name: hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
        for name, texts in values.items()
    }
