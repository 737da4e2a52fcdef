"""The table of docs/fits.md: every shipped configuration on the machines that it is for.

    python -m prism_jax plan --table=docs/fits.md              compiles what is not in the cache
    python -m prism_jax plan --table=docs/fits.md --no-compile estimates alone

Compiled rows are kept beside the page, in docs/fits.json, with the digest of the code they were
compiled from, and stay until they are compiled again; the others are estimated anew.
"""

import dataclasses
import importlib
import json
import pathlib
from collections.abc import Sequence

from prism_jax import configuration, errors, progress
from prism_jax.commands.plan import compiling, jobs, machines, memory, opening, planning

SIZES = ("4b", "8b")
# From the smallest; one host, and slices up to 256 chips.
TOPOLOGIES = (
    "v5e:4x4", "v5e:8x8", "v5e:16x16",
    "v5p:2x2x1", "v5p:2x2x2", "v5p:4x4x4",
    "v6e:2x4", "v6e:4x4", "v6e:16x16",
    "tpu7x:2x2x1", "tpu7x:2x2x2",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A configuration on a machine, as the page and its JSON have it."""

    stage: str
    size: str
    machine: str
    mesh: str
    phase: str  # the fullest
    total_gib: float
    estimate_gib: float  # of the fullest phase by the estimate
    hbm_gib: float
    is_compiled: bool  # the fullest phase was; all others too, where `compiled` names them
    compiled: list[str]  # phases
    refusal: bool
    steps_an_hour: float
    code: str  # digest of the code, of compiled rows
    advice: str  # fields with which it fits, where it does not; empty: none of those tried

    @property
    def fits(self) -> bool:
        """Return whether a tenth of the memory stays free."""
        return not self.refusal and self.total_gib <= memory.SAFE_FRACTION * self.hbm_gib


def write(path: pathlib.Path, compile_phase: planning.Compile | None, *, only: str | None) -> None:
    """Write the page and its JSON.

    Args:
      only: STAGE, STAGE/SIZE or STAGE/SIZE/TOPOLOGY: make those rows alone, keep all others.
    """
    kept_at = path.with_suffix(".json")
    kept = [Row(**row) for row in json.loads(kept_at.read_text())] if kept_at.exists() else []
    by_name = {(row.stage, row.size, row.machine): row for row in kept}
    rows = []
    for stage in opening.STAGES:
        for size in SIZES:
            for machine in TOPOLOGIES:
                name = (stage, size, machine)
                chosen = compile_phase if _is_named(name, only) else None
                old = by_name.get(name)
                if chosen is None and old is not None and (old.compiled or only is not None):
                    rows.append(old)
                    continue
                made = row_of(stage, size, machine, chosen)
                if made is not None:
                    rows.append(made)
    kept_at.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    path.write_text(text(rows))


def _is_named(name: Sequence[str], only: str | None) -> bool:
    parts = only.split("/") if only is not None else []
    return all(part == given for part, given in zip(parts, name, strict=False))


def row_of(
    stage: str, size: str, machine: str, compile_phase: planning.Compile | None
) -> Row | None:
    """Return the row of a configuration; None where it does not go on the machine."""
    config = importlib.import_module(f"configs.{stage}").get_config(size)
    job = jobs.make(
        stage, configuration.plain(config), size=size, machine=machine, given=jobs.Given()
    )
    try:
        estimate = planning.make(job, None)
        plan = estimate if compile_phase is None else planning.make(job, compile_phase)
    except errors.InputError as error:
        progress.say(f"{stage}:{size} on {machine}: {error}")
        return None
    fullest, advice = plan.fullest, ""
    if not fullest.fits(plan.opened.machine.generation.hbm_gib):
        found = planning.advise(plan, None)
        if found is not None:
            advice = " ".join(f"{name}={value}" for name, value in found[0].items())
    axes = plan.opened.devices.mesh.shape
    return Row(
        stage=stage,
        size=size,
        machine=machine,
        mesh=" x ".join(f"{name} {n}" for name, n in axes.items() if n > 1),
        phase=fullest.name,
        total_gib=round(fullest.total, 2),
        estimate_gib=round(max(one.total for one in estimate.phases), 2),
        hbm_gib=plan.opened.machine.generation.hbm_gib,
        is_compiled=fullest.is_compiled,
        compiled=[phase.name for phase in plan.phases if phase.is_compiled or phase.refusal],
        refusal=fullest.refusal is not None,
        steps_an_hour=round(plan.steps_an_hour, 2),
        code=compiling.code_digest()[:12] if fullest.is_compiled else "",
        advice=advice,
    )


def text(rows: Sequence[Row]) -> str:
    """Return the page."""
    head = """# What fits

Each shipped configuration of 4b and 8b on TPU slices: the fullest phase of the stage, and GiB of a
device in it. A row *fits* when that is at most 0.90 of what libtpu lets a program use. Made by
`python -m prism_jax plan --table=docs/fits.md`; figures in docs/fits.json. **Nothing was executed
on a TPU.**

*compiled*: the stage's own programs were compiled for the topology (JAX 0.10.2, libtpu 0.0.42.1).
*estimate*: arithmetic from the shapes that those programs have, without compiling; temporaries are
counted 1.2 times, since of the ten compiled gradients of `benchmarks/results/tpu_compile.json` the
plain count makes 0.82 to 1.32 times the compiled size. Prompts have 2048 tokens, all of a picture
that the configuration allows; a teacher's segment has 6144 tokens. Steps an hour are a bound by the
roofline at peak speeds with every response at its longest: what a chip cannot exceed, not what it
reaches.

What does not fit as it is is not shipped for that machine: the last column has the fields with
which it would fit by the estimate. A change of a type changes the training; `tensor` leaves fewer
parts for rows, which changes it where a router's term counts (warm-up); the others do not.
"""
    lines = [head]
    for stage in opening.STAGES:
        lines += [f"## {stage}", ""]
        lines.append(
            "| size | machine | gcloud | mesh | fullest phase | GiB | of | fits | steps/h ≤ | "
            "fits with |"
        )
        lines.append("|---|---|---|---|---|---:|---:|---|---:|---|")
        lines += [_line(row) for row in rows if row.stage == stage]
        lines.append("")
    lines += _comparison(rows)
    return "\n".join(lines)


def _line(row: Row) -> str:
    machine = machines.tpu(row.machine, num_slices=1)
    how = f"compiled ({', '.join(row.compiled)})" if row.is_compiled else "estimate"
    told = "fits" if row.fits else "no"
    gcloud = machine.gcloud_type().partition(" (")[0].partition(",")[0]
    rate = f"{row.steps_an_hour:.3g}" if row.steps_an_hour else ""
    return (
        f"| {row.size} | `{row.machine}` | {gcloud} | {row.mesh} | {row.phase} | "
        f"{row.total_gib:.2f} | {row.hbm_gib:g} | {told}, {how} | {rate} | "
        f"{f'`{row.advice}`' if row.advice else '' if row.fits else 'more chips'} |"
    )


def _comparison(rows: Sequence[Row]) -> list[str]:
    """Return the compiled rows beside their estimates."""
    found = [row for row in rows if row.is_compiled]
    if not found:
        return []
    lines = ["## Compiled and estimated", ""]
    lines += [
        "| configuration | machine | phase | compiled | estimate |",
        "|---|---|---|---:|---:|",
    ]
    for row in found:
        lines.append(
            f"| {row.stage}:{row.size} | `{row.machine}` | {row.phase} | {row.total_gib:.2f} | "
            f"{row.estimate_gib:.2f} |"
        )
    return [*lines, ""]
