"""The table of docs/fits.md: every shipped configuration on the machines that it is for.

    python -m prism_jax plan --table=docs/fits.md              compiles what is not in the cache
    python -m prism_jax plan --table=docs/fits.md --no-compile estimates alone

Rows are kept beside the page, in docs/fits.json, with the digest of the code that they were made
with. A compiled row stays until it is compiled again, an estimate until the code has changed.
"""

import dataclasses
import importlib
import json
import pathlib
from collections.abc import Iterator, Sequence

from prism_jax import configuration, errors, progress
from prism_jax.commands.plan import compiling, jobs, machines, memory, opening, planning

SIZES = ("4b", "8b")
ONE_GPU_SIZES = ("2b_one_gpu", "4b_one_gpu")
ONE_GPU_GIGABYTES = 80.0
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
    is_fitted: bool  # the fullest phase takes what memory there is
    compiled: list[str]  # phases
    refusal: bool
    steps_an_hour: float
    code: str  # digest of the code that it was made with
    advice: str  # fields with which it fits, where it does not; empty: none of those tried

    @property
    def fits(self) -> bool:
        """Return whether a tenth of the memory stays free."""
        share = 1.0 if self.is_fitted else memory.SAFE_FRACTION
        return not self.refusal and self.total_gib <= share * self.hbm_gib


def write(path: pathlib.Path, compile_phase: planning.Compile | None, *, only: str | None) -> None:
    """Write the page and its JSON.

    Args:
      only: STAGE, STAGE/SIZE or STAGE/SIZE/TOPOLOGY: make those rows alone, keep all others.
    """
    kept_at = path.with_suffix(".json")
    old_rows = [Row(**row) for row in json.loads(kept_at.read_text())] if kept_at.exists() else []
    rows = {(row.stage, row.size, row.machine): row for row in old_rows}
    code = compiling.code_digest()[:12]
    for name in _names():
        old = rows.get(name)
        chosen = compile_phase if _is_named(name, only) and not _is_gpu(name[2]) else None
        is_kept = old is not None and (old.code == code or not _is_named(name, only))
        if chosen is None and (is_kept or (old is not None and old.is_compiled)):
            continue
        made = row_of(*name, chosen)
        rows.pop(name, None)
        if made is None:
            continue
        rows[name] = made
        progress.say(f"{'/'.join(name)}: {made.total_gib:.2f} of {made.hbm_gib:g} GiB")
        # After each row: to make them all takes long.
        listed = [rows[one] for one in _names() if one in rows]
        kept_at.write_text(json.dumps([dataclasses.asdict(row) for row in listed], indent=1) + "\n")
        path.write_text(text(listed))


def _names() -> Iterator[tuple[str, str, str]]:
    """Yield stage, size and machine of every row."""
    for stage in opening.STAGES:
        for size in SIZES:
            for machine in TOPOLOGIES:
                yield stage, size, machine
        if stage not in opening.ASKING:
            for size in ONE_GPU_SIZES:
                yield stage, size, machines.gpus(1, ONE_GPU_GIGABYTES).name


def _is_gpu(machine: str) -> bool:
    return machine == machines.gpus(1, ONE_GPU_GIGABYTES).name


def _is_named(name: Sequence[str], only: str | None) -> bool:
    parts = only.split("/") if only is not None else []
    return all(part == given for part, given in zip(parts, name, strict=False))


def row_of(
    stage: str, size: str, machine: str, compile_phase: planning.Compile | None
) -> Row | None:
    """Return the row of a configuration; None where it does not go on the machine."""
    config = importlib.import_module(f"configs.{stage}").get_config(size)
    job = jobs.make(
        stage,
        configuration.plain(config),
        size=size.partition("_")[0],
        machine="1" if _is_gpu(machine) else machine,
        hbm_gigabytes=ONE_GPU_GIGABYTES if _is_gpu(machine) else None,
        given=jobs.Given(),
    )
    try:
        estimate = planning.make(job, None)
        plan = estimate if compile_phase is None else planning.make(job, compile_phase)
    except errors.InputError as error:
        progress.say(f"{stage}:{size} on {machine}: {error}")
        return None
    fullest, advice = plan.fullest, ""
    if not fullest.fits(plan.opened.machine.generation.hbm_gib):
        changes_and_plan = planning.advise(plan, None)
        if changes_and_plan is not None:
            advice = " ".join(f"{name}={value}" for name, value in changes_and_plan[0].items())
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
        is_fitted=fullest.is_fitted,
        compiled=[phase.name for phase in plan.phases if phase.is_compiled or phase.refusal],
        refusal=fullest.refusal is not None,
        steps_an_hour=round(plan.steps_an_hour, 2),
        code=compiling.code_digest()[:12],
        advice=advice,
    )


def text(rows: Sequence[Row]) -> str:
    """Return the page."""
    head = """# What fits

Each shipped configuration of 4b and 8b on TPU slices, and those of one GPU on a GPU of 80 GB: the
fullest phase of the stage, and GiB of a device in it. A row *fits* when that is at most 0.90 of the
memory that a program may use. The sampler takes up to 0.94 of what training leaves free, so its
phases fit, above that share too, whenever a slot on each part does. Made by
`python -m prism_jax plan --table=docs/fits.md`; figures in docs/fits.json. **Nothing was executed
on a TPU.**

*compiled*: the programs of the stage were compiled for the topology (JAX 0.10.2, libtpu 0.0.42.1);
the last table names the digest of the code that they were compiled from. *estimate*: arithmetic
from the shapes that those programs have, without compiling; temporaries are counted 1.2 times,
since of the ten compiled gradients of `benchmarks/results/tpu_compile.json` the plain count makes
0.82 to 1.32 times the compiled size. Prompts have 2048 tokens, all of a picture that the
configuration allows; a teacher's segment has 6144 tokens. Steps an hour are a bound by the roofline
at peak speeds with every response at its longest, above what any run reaches. A GPU's memory is
what JAX may take with `XLA_PYTHON_CLIENT_MEM_FRACTION` near 1; its default is three quarters.

A configuration that does not fit is not shipped for that machine: the last column has the fields
with which it would fit by the estimate. A change of a type changes the training; `tensor` leaves
fewer parts for rows, which changes it where a router's term counts (warm-up); the others do not.
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
    machine = machines.gpus(1, ONE_GPU_GIGABYTES)
    if not _is_gpu(row.machine):
        machine = machines.tpu(row.machine, num_slices=1)
    how = f"compiled ({', '.join(row.compiled)})" if row.is_compiled else "estimate"
    verdict = "fits" if row.fits else "no"
    gcloud = machine.gcloud_type().partition(" (")[0].partition(",")[0]
    rate = f"{row.steps_an_hour:.3g}" if row.steps_an_hour else ""
    return (
        f"| {row.size} | `{row.machine}` | {gcloud} | {row.mesh} | {row.phase} | "
        f"{row.total_gib:.2f} | {row.hbm_gib:g} | {verdict}, {how} | {rate} | "
        f"{f'`{row.advice}`' if row.advice else '' if row.fits else 'more chips'} |"
    )


def _comparison(rows: Sequence[Row]) -> list[str]:
    """Return the compiled rows beside their estimates."""
    compiled = [row for row in rows if row.is_compiled]
    if not compiled:
        return []
    lines = ["## Compiled and estimated", ""]
    lines += [
        "| configuration | machine | phase | compiled | estimate | code |",
        "|---|---|---|---:|---:|---|",
    ]
    for row in compiled:
        lines.append(
            f"| {row.stage}:{row.size} | `{row.machine}` | {row.phase} | {row.total_gib:.2f} | "
            f"{row.estimate_gib:.2f} | `{row.code}` |"
        )
    return [*lines, ""]
