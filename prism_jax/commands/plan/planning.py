"""The plan of a job: the memory of its phases, its time, and what would make it fit."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prism_jax import errors
from prism_jax.commands.plan import compiling, memory, opening, roofline

# A configuration's field, dotted, and its value.
Changes = Mapping[str, Any]
_LEAST_CHUNK = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The needs of a job on a machine."""

    job: opening.Job
    opened: opening.Opened
    phases: list[memory.Phase]
    steps_an_hour: float  # at most, by the roofline

    @property
    def fits(self) -> bool:
        """Return whether every phase fits."""
        hbm = self.opened.machine.generation.hbm_gib
        return all(phase.fits(hbm) for phase in self.phases)

    @property
    def fullest(self) -> memory.Phase:
        """Return the phase that needs most, of those that do not fit if there are any."""
        hbm = self.opened.machine.generation.hbm_gib
        return max(
            self.phases,
            key=lambda phase: (phase.refusal is not None, not phase.fits(hbm), phase.total),
        )


Compile = Callable[[opening.Job, str], Mapping[str, Any]]


def compiler(cache: pathlib.Path, limits: compiling.Limits) -> Compile:
    """Return the function that compiles a phase, or reads it from the cache."""
    compiling.require_libtpu()
    return lambda job, phase: compiling.compile_phase(job, phase, cache=cache, limits=limits)


def make(job: opening.Job, compile_phase: Compile | None) -> Plan:
    """Return the plan; without a compiler all of it is an estimate.

    Raises:
      InputError: the configuration does not go on the machine.
    """
    opened = opening.open_job(job, is_compiled=False)
    phases = []
    for program in opened.programs:
        if compile_phase is None:
            phases.append(memory.estimated(program))
            continue
        measured = compile_phase(job, program.phase)
        if "refusal" in measured:
            phases.append(memory.estimated(program, refusal=str(measured["refusal"])))
        else:
            phases.append(memory.compiled(program, measured))
    return Plan(
        job=job,
        opened=opened,
        phases=phases,
        steps_an_hour=roofline.steps_an_hour(opened.programs, opened.machine),
    )


def advise(plan: Plan, compile_phase: Compile | None) -> tuple[Changes, Plan] | None:
    """Return the fewest changes found with which the job fits, and its plan then; None without.

    Changes are taken one after the other, the gentlest first, until an estimate fits; those that
    were not needed are taken back. What is found is compiled where there is a compiler, and where
    it is refused the search goes on.
    """
    taken: dict[str, Any] = {}
    for changes in _candidates(plan):
        taken |= changes
        estimate = _try(plan.job, taken)
        if estimate is None:
            for name in changes:
                del taken[name]
            continue
        if not estimate.fits:
            continue
        needed = _without_needless(plan.job, taken)
        if compile_phase is None:
            plan_then = _try(plan.job, needed)
        else:
            plan_then = make(changed(plan.job, needed), compile_phase)
        if plan_then is not None and plan_then.fits:
            return needed, plan_then
    return None


def changed(job: opening.Job, changes: Changes) -> opening.Job:
    """Return the job with fields of its configuration changed."""
    config = _copy(job.config)
    for name, value in changes.items():
        *path, last = name.split(".")
        section = config
        for part in path:
            section = section[part]
        section[last] = value
    return dataclasses.replace(job, config=config)


def _copy(value: Any) -> Any:
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _try(job: opening.Job, changes: Changes) -> Plan | None:
    """Return the estimate for a changed job; None where it does not go on the machine at all."""
    try:
        return make(changed(job, changes), None)
    except (errors.InputError, ValueError, ZeroDivisionError):
        return None


def _without_needless(job: opening.Job, taken: Changes) -> dict[str, Any]:
    needed = dict(taken)
    for name in list(taken):
        section, _, field = name.rpartition(".")
        moments = (f"{section}.mu_dtype", f"{section}.nu_dtype")
        if field == "rounding" and any(moment in needed for moment in moments):
            # It takes no memory: moments in bfloat16 need it to follow slow changes.
            continue
        fewer = {key: value for key, value in needed.items() if key != name}
        estimate = _try(job, fewer)
        if estimate is not None and estimate.fits:
            needed = fewer
    return needed


def _candidates(plan: Plan) -> Iterator[dict[str, Any]]:
    """Yield changes of the configuration's fields, the gentlest first."""
    config, devices = plan.job.config, plan.opened.devices
    number = devices.mesh.size

    def field(name: str) -> Any:
        node: Any = config
        for part in name.split("."):
            if not isinstance(node, Mapping) or part not in node:
                return None
            node = node[part]
        return node

    for rows in ("rows.num_rows", "discriminator.rows.num_rows", "train.num_rows"):
        if field(rows) not in (None, -1):
            yield {rows: -1}
    for remat in ("model.remat", "discriminator.remat"):
        if field(remat) not in (None, "full"):
            yield {remat: "full"}
    limit = field("mesh.max_fsdp")
    if limit is not None and devices.mesh.shape["data"] > 1:
        yield {"mesh.max_fsdp": None}
    chunk = field("train.head_chunk_tokens")
    while chunk is not None and chunk > _LEAST_CHUNK:
        chunk //= 2
        yield {"train.head_chunk_tokens": chunk}
    tensor = 2
    while tensor <= min(8, number):
        if number % tensor == 0:
            yield {"mesh.axes.tensor": tensor}
        tensor *= 2
    for name in ("optim", "discriminator.optim"):
        if field(f"{name}.memory") == "device":
            yield {f"{name}.memory": "host"}
    # From here on the training changes.
    for name in ("optim", "discriminator.optim"):
        if field(name) is not None:
            moments = {f"{name}.{moment}": "bfloat16" for moment in ("mu_dtype", "nu_dtype")}
            yield moments | {f"{name}.rounding": "stochastic"}
    if field("model.param_dtype") == "float32":
        yield {"model.param_dtype": "bfloat16"}
