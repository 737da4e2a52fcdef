"""A JobSet for GKE, as YAML for `kubectl apply -f -`; needs nothing but Python.

    python launch/jobset.py --name=a --type=v5p --topology=2x4x4 --image=IMAGE -- sft --config=…

Hosts and chips follow from the topology. Each slice is a Job, each host a pod; a Job that fails
fails the set, which starts anew while the exit code says so (see launch/common.sh) and
`--max_restarts` allows it.

Source of the form: the TPU examples of kubernetes-sigs/jobset, the exit codes of xpk's workloads,
and training/ironwood of tpu-recipes: two containers a host on tpu7x, each with two of its chips.
"""

import argparse
import dataclasses
import json
import math
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

Json = Any

# Exit codes that start the set again: 1 and, as in xpk, 42 and all from 127 on.
_RESTARTED = (1, 42, *range(127, 256))
# A process saves after the step that it is in, and a step of alignment may take minutes.
_GRACE_SECONDS = 600


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """The names of GKE for a kind of TPU, and the form of its hosts."""

    accelerator: str  # gke-tpu-accelerator
    num_dimensions: int  # of a topology
    most_chips_of_a_host: int  # a larger slice has hosts of 4 chips
    containers: int  # a host
    compute_type: str  # of Cluster Toolkit's gcluster


GENERATIONS = {
    "v5e": Generation(
        accelerator="tpu-v5-lite-podslice",
        num_dimensions=2,
        most_chips_of_a_host=8,
        containers=1,
        compute_type="ct5lp-hightpu-4t",
    ),
    "v5p": Generation(
        accelerator="tpu-v5p-slice",
        num_dimensions=3,
        most_chips_of_a_host=4,
        containers=1,
        compute_type="ct5p-hightpu-4t",
    ),
    "v6e": Generation(
        accelerator="tpu-v6e-slice",
        num_dimensions=2,
        most_chips_of_a_host=8,
        containers=1,
        compute_type="ct6e-hightpu-4t",
    ),
    "tpu7x": Generation(
        accelerator="tpu7x",
        num_dimensions=3,
        most_chips_of_a_host=4,
        containers=2,
        compute_type="tpu7x",
    ),
}


def _problems(args: argparse.Namespace) -> list[str]:
    """Return the problems with the options."""
    problems = []
    if re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", args.name) is None:
        problems.append(f"--name={args.name}: must be lower-case letters, digits and hyphens")
    if not args.command:
        problems.append("a command of prism_jax must follow --")
    if args.slices < 1 or args.max_restarts < 0:
        problems.append("--slices must be >= 1, --max_restarts >= 0")
    if args.single:
        return problems
    dimensions = GENERATIONS[args.type].num_dimensions
    if re.fullmatch(r"[1-9][0-9]*" + r"x[1-9][0-9]*" * (dimensions - 1), args.topology) is None:
        form = "x".join("ABC"[:dimensions])
        problems.append(f"--topology={args.topology}: must be {form} for {args.type}")
    elif _chips(args) > _chips_per_host(args) and _chips(args) % 4:
        problems.append(f"--topology={args.topology}: has {_chips(args)} chips, not whole hosts")
    if args.gcsfuse and re.fullmatch(r"[a-z0-9][-_.a-z0-9]+=/\S+", args.gcsfuse) is None:
        problems.append(f"--gcsfuse={args.gcsfuse}: must be BUCKET=/PATH")
    return problems


def _chips(args: argparse.Namespace) -> int:
    return math.prod(int(size) for size in args.topology.split("x"))


def _chips_per_host(args: argparse.Namespace) -> int:
    chips = _chips(args)
    return chips if chips <= GENERATIONS[args.type].most_chips_of_a_host else 4


def _containers(args: argparse.Namespace) -> list[Json]:
    """Return the containers of a host."""
    generation = GENERATIONS[args.type]
    count = 1 if args.single else generation.containers
    entry = ["bash", "launch/entry.sh"]
    entry += ["--single"] if args.single else ["--generation", args.type]
    variables = [{"name": "PYTHONUNBUFFERED", "value": "1"}]
    containers = []
    for number in range(count):
        container: Json = {
            "name": "jax-tpu" if count == 1 else f"jax-tpu-{number + 1}",
            "image": args.image,
            "workingDir": args.directory,
            # Kubernetes replaces $(NAME) in a command, and makes $$ one $.
            "command": [*entry, "--", *(one.replace("$", "$$") for one in args.command)],
            "env": variables,
        }
        if args.secret:
            # Its keys become variables; the values stay in the cluster.
            container["envFrom"] = [{"secretRef": {"name": args.secret}}]
        if not args.single:
            chips = str(_chips_per_host(args) // count)
            container["resources"] = {"limits": {"google.com/tpu": chips}}
        mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
        if args.gcsfuse:
            mounts.append({"name": "bucket", "mountPath": args.gcsfuse.split("=", 1)[1]})
        container["volumeMounts"] = mounts
        containers.append(container)
    return containers


def _pod(args: argparse.Namespace) -> Json:
    """Return the pod of one host."""
    volumes: list[Json] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    annotations = {}
    if args.gcsfuse:
        annotations["gke-gcsfuse/volumes"] = "true"
        bucket = args.gcsfuse.split("=", 1)[0]
        volumes.append(
            {
                "name": "bucket",
                "csi": {
                    "driver": "gcsfuse.csi.storage.gke.io",
                    "volumeAttributes": {
                        "bucketName": bucket,
                        "mountOptions": "implicit-dirs",
                    },
                },
            }
        )
    spec: Json = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "containers": _containers(args),
        "volumes": volumes,
    }
    if args.service_account:
        spec["serviceAccountName"] = args.service_account
    if not args.single:
        spec["nodeSelector"] = {
            "cloud.google.com/gke-tpu-accelerator": GENERATIONS[args.type].accelerator,
            "cloud.google.com/gke-tpu-topology": args.topology,
        }
        if args.spot:
            spec["nodeSelector"]["cloud.google.com/gke-spot"] = "true"
        spec["tolerations"] = [
            {"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}
        ]
    metadata = {"metadata": {"annotations": annotations}} if annotations else {}
    return {**metadata, "spec": spec}


def jobset(args: argparse.Namespace) -> Json:
    """Return the JobSet."""
    hosts = 1 if args.single else max(1, _chips(args) // _chips_per_host(args))
    pod = _pod(args)
    rules = [
        {
            "action": "FailJob",
            "onExitCodes": {
                "containerName": container["name"],
                "operator": "NotIn",
                "values": list(_RESTARTED),
            },
        }
        for container in pod["spec"]["containers"]
    ]
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": rules},
        "template": pod,
    }
    # One slice a node pool: pods of two slices never share one.
    key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    annotations = {} if args.single else {"annotations": {key: "cloud.google.com/gke-nodepool"}}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": args.name, "namespace": args.namespace, **annotations},
        "spec": {
            "ttlSecondsAfterFinished": 86400,
            "failurePolicy": {
                "maxRestarts": args.max_restarts,
                "rules": [
                    {
                        "name": "stopHere",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    },
                ],
            },
            "replicatedJobs": [
                {
                    "name": "slice",
                    "replicas": 1 if args.single else args.slices,
                    "template": {"spec": job},
                }
            ],
        },
    }


def yaml_lines(value: Json, indent: int = 0) -> list[str]:
    """Return YAML in block style, strings as JSON writes them; lists of numbers on one line."""
    space = " " * indent
    lines = []
    if isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, dict | list) and not _is_flat(item):
                lines += [f"{space}{key}:", *yaml_lines(item, indent + 2)]
            else:
                lines.append(f"{space}{key}: {json.dumps(item)}")
        return lines
    for item in value:
        inner = [json.dumps(item)] if _is_flat(item) else yaml_lines(item, indent + 2)
        lines += [f"{space}- {inner[0].lstrip()}", *inner[1:]]
    return lines


def _is_flat(value: Json) -> bool:
    """Return whether the value stands on one line: a scalar, or a list of numbers."""
    if isinstance(value, list):
        return all(isinstance(item, int) for item in value)
    return not isinstance(value, dict)


def gcluster(args: argparse.Namespace) -> list[str]:
    """Return the command of Cluster Toolkit that submits the same job."""
    entry = ["bash", "launch/entry.sh", "--generation", args.type, "--", *args.command]
    return [
        *("gcluster", "job", "submit", "--name", args.name),
        *("--compute-type", GENERATIONS[args.type].compute_type, "--topology", args.topology),
        *("--num-slices", str(args.slices), "--restarts", str(args.max_restarts)),
        *("--image", args.image, "--gke-namespace", args.namespace),
        *("--command", f"cd {shlex.quote(args.directory)} && exec {shlex.join(entry)}"),
    ]


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    options = argparse.ArgumentParser(prog="jobset.py", description="Print a JobSet for GKE.")
    add = options.add_argument
    add("--name", required=True)
    add("--type", required=True, choices=tuple(GENERATIONS))
    add("--topology", default="", help="of a slice: 4x4 for v5e and v6e, 2x4x4 for v5p and tpu7x")
    add("--slices", type=int, default=1)
    add("--image", required=True, help="with the project at --directory")
    add("--directory", default="/prism_jax")
    add("--namespace", default="default")
    add("--service_account", default="", help="of Kubernetes, which may read and write the bucket")
    add("--secret", default="", help="a Kubernetes secret whose keys become variables")
    add("--gcsfuse", default="", help="BUCKET=/PATH: mount a bucket")
    add("--max_restarts", type=int, default=20)
    add("--spot", action="store_true")
    add("--single", action="store_true", help="one pod without TPU, for upcycle and export")
    add("--gcluster", action="store_true", help="print the command of Cluster Toolkit instead")
    add("command", nargs="*")
    return options


def main(argv: Sequence[str]) -> int:
    """Print the JobSet or the command."""
    args = parser().parse_args(argv)
    problems = _problems(args)
    if problems:
        sys.stderr.write(f"error: {'; '.join(problems)}\n")
        return 2
    if args.gcluster:
        print(shlex.join(gcluster(args)))
    else:
        print("\n".join(yaml_lines(jobset(args))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
