"""A plan as text."""

import math
from collections.abc import Mapping
from typing import Any

from prism_jax.commands.plan import memory
from prism_jax.commands.plan.planning import Plan
from prism_jax.setup import programs

# What names of parts are counted as, by their last word.
_COLUMNS = ("parameters", "states", "caches", "batches", "padding", "activations")
_COLUMN_OF = {
    "parameters": "parameters",
    "weights": "parameters",
    "reference": "parameters",
    "teacher": "parameters",
    "states": "states",
    "caches": "caches",
    "batch": "batches",
}
_HOST_BASE_GIB = 10.0  # of the program, its libraries and its data
# Pinned memory that JAX takes of a GPU's host at most, where its variable names no other limit.
_PINNED_GIB = 64


def columns(phase: memory.Phase) -> dict[str, float]:
    """Return the memory of a phase in the columns of the table, in GiB."""
    sizes = dict.fromkeys(_COLUMNS, 0.0)
    for held in (phase.parts, phase.beside):
        for name, size in held.items():
            sizes[_COLUMN_OF[name.rpartition(" ")[2]]] += size
    sizes["padding"] = phase.padding
    sizes["activations"] = phase.temporary
    return sizes


def lines(plan: Plan) -> list[str]:
    """Return the machine, a table of the phases, the host, and the time."""
    machine, kind = plan.opened.machine, plan.opened.machine.generation
    axes = plan.opened.devices.mesh.shape
    mesh = " x ".join(f"{name} {size}" for name, size in axes.items() if size > 1) or "one device"
    chips = machine.num_chips * machine.num_slices
    text = [
        f"{machine.name}: {machine.gcloud_type()}, {machine.num_hosts} hosts, {chips} chips, "
        f"{machine.num_devices} devices of {kind.hbm_gib:g} GiB; mesh {mesh}",
        "",
        f"{'GiB a device':22}" + "".join(f"{name:>12}" for name in (*_COLUMNS, "total", "of HBM")),
    ]
    for phase in plan.phases:
        sizes = columns(phase)
        row = "".join(f"{sizes[name]:12.2f}" for name in _COLUMNS)
        share = f"{phase.total / kind.hbm_gib:.2f}"
        text.append(f"{phase.name:22}{row}{phase.total:12.2f}{share:>12}  {verdict(phase, plan)}")
    notes = dict.fromkeys(program.note for program in plan.opened.programs if program.note)
    text += ["", *notes, *_host(plan), *_time(plan)]
    return text


def verdict(phase: memory.Phase, plan: Plan) -> str:
    """Return a phase's entry in the table."""
    how = "compiled" if phase.is_compiled else "estimate"
    if phase.refusal is not None:
        return "does not fit (refused by the compiler; the figures are an estimate)"
    hbm = plan.opened.machine.generation.hbm_gib
    if phase.fits(hbm):
        return f"fits ({how})"
    return f"{'does not fit' if phase.total > hbm else 'fits without a safe margin'} ({how})"


def _host(plan: Plan) -> list[str]:
    """Return the estimated contents of a host's memory."""
    machine = plan.opened.machine
    saved: dict[str, float] = {}
    kept: dict[str, float] = {}
    for program in plan.opened.programs:
        for held in (program.parts, program.beside):
            for name, tree in held.items():
                if name.endswith(("parameters", "states")):
                    kept[name] = programs.host_bytes(tree) / memory.GIB
                    # A save copies what is on the devices, and reads the rest where it is.
                    saved[name] = memory.size_gib(tree)
    devices = machine.num_devices / machine.num_hosts
    copies, states = (sum(of.values()) * devices for of in (saved, kept))
    needed = f"{copies:.0f} GiB for a save in the background"
    if states:
        needed += f", {states:.0f} for the optimizer's states"
    needed += f" and about {_HOST_BASE_GIB:g} besides"
    has = machine.generation.host_gigabytes * machine.chips_per_host / 4
    total = f" of {has / 1.0737:.0f}" if has else ""
    text = [f"memory of a host (estimate): {needed}{total}"]
    # Both lie in pinned memory; some of it is between arrays, or holds a layer's states twice.
    pinned = math.ceil(1.1 * (copies + states))
    if not machine.is_tpu and pinned > _PINNED_GIB:
        text.append(
            f"one process for all GPUs pins more of it than the {_PINNED_GIB} GiB that JAX allows: "
            f"set XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB={pinned}"
        )
    return text


def _time(plan: Plan) -> list[str]:
    if not plan.steps_an_hour:
        return []
    return [
        f"at most {plan.steps_an_hour:.3g} steps an hour by the roofline (estimate: peak speeds, "
        "every response at its longest)"
    ]


def advice(changes: Mapping[str, Any], plan: Plan) -> list[str]:
    """Return the changes to make, and the memory that the job takes then."""
    fields = " ".join(f"--config.{name}={value}" for name, value in changes.items())
    fullest = plan.fullest
    how = "compiled" if fullest.is_compiled else "estimate"
    hbm = plan.opened.machine.generation.hbm_gib
    text = [
        f"it fits with: {fields}",
        f"the fullest phase, {fullest.name}, then takes {fullest.total:.2f} of {hbm:g} GiB ({how})",
    ]
    if any("dtype" in name for name in changes):
        text.append("types of weights and moments change the training, the other fields do not")
    if "mesh.axes.tensor" in changes:
        text.append(
            "tensor leaves fewer parts for rows: the same batch in more microbatches (with a "
            "router's term these are a part of the training, see num_rows)"
        )
    return text
