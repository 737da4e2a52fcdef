"""The rate at which a host saves its share of 8B: python -m benchmarks.save_share FOLDER.

    --layers=N   decoder layers of the share that are saved (1)
    --times=N    how often, the disk by itself before and after each (3)
    --out=FILE   the record

The share is that of one host of v5p-16: the state of `sft:8b` as `plan` lays it out on that slice,
cut for as many devices as the host has. It is saved by the project's checkpointer. Beside it as
many bytes are written to the same disk plainly, in one file, and flushed. Since the share may be
larger than the memory of the machine that measures, some decoder layers are saved, and the time of
the whole share follows from their rate.
"""

import argparse
import importlib
import math
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import records
from prism_jax import configuration, tree_paths, version
from prism_jax.checkpoints import checkpoint, lock
from prism_jax.checkpoints import meta as checkpoint_meta
from prism_jax.commands.plan import jobs, machines, opening

TOPOLOGY = "v5p:2x2x2"
SECONDS = 25.0  # a spot VM gets 30 from Google Cloud
_LAYERS = "text/layers/"
_BLOCK_BYTES = 64 << 20

# Shape of the host's part, the axis that is divided among its devices, and the type.
Share = tuple[tuple[int, ...], int | None, Any]


def shares(num_devices: int) -> dict[str, Share]:
    """Return a host's share of each array of the state, by name."""
    config = configuration.plain(importlib.import_module("configs.sft").get_config("8b"))
    job = jobs.make("sft", config, size="8b", machine=TOPOLOGY, given=jobs.Given())
    (program,) = opening.open_job(job, is_compiled=False).programs
    by_name: dict[str, Share] = {}
    for name, leaf in tree_paths.named_leaves(program.arguments[0]).items():
        shape = list(leaf.sharding.shard_shape(leaf.shape))
        divided = [n for n, size in enumerate(shape) if size != leaf.shape[n]]
        for axis in divided:
            shape[axis] *= num_devices
        by_name[name] = (tuple(shape), divided[0] if divided else None, leaf.dtype)
    return by_name


def num_bytes(share: Share) -> int:
    """Return the bytes of a share."""
    shape, _, dtype = share
    return math.prod(shape) * np.dtype(dtype).itemsize


def arrays(layers: int) -> dict[str, jax.Array]:
    """Return random arrays for the share of so many decoder layers, on all local devices."""
    devices = np.array(jax.local_devices())
    mesh = Mesh(devices, ("fsdp",))
    by_name = {}
    for number, (name, share) in enumerate(shares(len(devices)).items()):
        if _LAYERS not in name:
            continue
        shape, axis, dtype = share
        spec = PartitionSpec(*("fsdp" if n == axis else None for n in range(len(shape))))
        make = jax.jit(
            lambda key, shape=(layers, *shape[1:]), dtype=dtype: jax.random.normal(
                key, shape, dtype
            ),
            out_shardings=NamedSharding(mesh, spec),
        )
        by_name[name] = jax.block_until_ready(make(jax.random.key(number)))
    return by_name


def save(folder: pathlib.Path, state: dict[str, jax.Array]) -> dict[str, float]:
    """Save a state as the first of a new run; return the seconds."""
    identity = checkpoint_meta.RunIdentity(
        project_version=version.VERSION, stage="sft", config={}, model_config={}, may_differ=()
    )
    with (
        lock.hold(str(folder), beat_seconds=15.0),
        checkpoint.Checkpointer(
            str(folder),
            identity=identity,
            seed=0,
            save_every_steps=1,
            num_kept=1,
            allow_mismatch=False,
        ) as saver,
    ):
        begun = time.monotonic()
        saver.save(1, state, data_position=None)
        returned = time.monotonic()
        saver.wait()
        complete = time.monotonic()
        for path in folder.rglob("*"):
            if path.is_file():
                _flush(path)
        durable = time.monotonic()
    return {
        "until_training_goes_on": returned - begun,
        "until_complete": complete - begun,
        "until_flushed": durable - begun,
    }


def _flush(path: pathlib.Path) -> None:
    number = os.open(path, os.O_RDONLY)
    os.fsync(number)
    os.close(number)


def write_plainly(folder: pathlib.Path, size: int) -> float:
    """Write so many random bytes to one file and flush it; return the seconds."""
    block, path = np.random.default_rng(0).bytes(_BLOCK_BYTES), folder / "plain"
    begun = time.monotonic()
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, _BLOCK_BYTES):
            file.write(block[: size - start])
        os.fsync(file.fileno())
    seconds = time.monotonic() - begun
    path.unlink()
    return seconds


def measure(folder: pathlib.Path, *, layers: int, times: int) -> dict[str, Any]:
    """Return the record."""
    state = arrays(layers)
    size = sum(leaf.nbytes for leaf in state.values())
    whole = sum(num_bytes(share) for share in shares(jax.local_device_count()).values())
    runs = []
    for _ in range(times):
        with tempfile.TemporaryDirectory(dir=folder) as name:
            run = pathlib.Path(name)
            seconds = {"plain_before": write_plainly(run, size)}
            seconds |= save(run, state)
            shutil.rmtree(run / "checkpoints")
            runs.append(seconds | {"plain_after": write_plainly(run, size)})
    middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    plain = statistics.median(run[name] for run in runs for name in ("plain_before", "plain_after"))
    rate, disk = (size / seconds / 1e9 for seconds in (middle["until_flushed"], plain))
    need = whole / SECONDS / 1e9
    hosts = machines.tpu(TOPOLOGY, num_slices=1).num_hosts
    return records.make(
        "save_share",
        f"the share of one of the {hosts} hosts of a v5p-16 in the state of sft:8b, "
        f"{whole / 1e9:.1f} GB, is saved within {SECONDS:g} s",
        {
            "seconds of the share at the measured rate": records.ratio(
                whole / rate / 1e9, f"<= {SECONDS:g}"
            ),
            "rate over the disk's": records.ratio(rate / disk, ">= 0.8"),
        },
        limit=f"{SECONDS:g} s need {need:.2f} GB/s; the disk of this machine takes {disk:.2f} GB/s "
        f"from a plain write of the same size, and the checkpointer wrote {rate:.2f} GB/s",
        raw={
            "share_bytes": whole,
            "saved_bytes": size,
            "saved_layers": layers,
            "seconds": runs,
            "gigabytes_per_second": {"saved": rate, "plain": disk, "needed": need},
        },
        module="benchmarks.save_share",
        device=f"{os.cpu_count()} CPU cores, local disk",
    )


def main(argv: list[str]) -> None:
    """Measure, print the record, and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    machine = machines.tpu(TOPOLOGY, num_slices=1)
    jax.config.update("jax_num_cpu_devices", machine.num_devices // machine.num_hosts)
    options.folder.mkdir(parents=True, exist_ok=True)
    made = measure(options.folder, layers=options.layers, times=options.times)
    records.emit(made, options.out)


if __name__ == "__main__":
    main(sys.argv[1:])
