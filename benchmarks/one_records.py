"""The records of `benchmarks.one_gpu`."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import eight_inputs, eight_jobs, eight_records, records

_MODULE = "benchmarks.one_gpu"
_WORK = (
    "random weights; numerals with reasoning and responses of log-normal length, the latter "
    "written over with words in the format; the first step is left out of the medians"
)
_NOTES = (
    "compiler_seconds",
    "update_seconds",
    "model_update_seconds",
    "copy_bytes_a_second",
)
_SETTINGS = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB")

Json = Any
Records = dict[str, Json]  # by name


def of_stage(job: eight_jobs.Job, result: Json) -> Records:
    """Return the records that follow from a part, and from those that ran before."""
    raw = raw_of(job, result)
    claim = f"{eight_records.CLAIMS[job.stage]} of {job.inputs.policy_size} on one card"
    made = [
        _make(
            f"one_gpu_{job.stage}",
            claim,
            {"ran": records.ratio("error" not in result, "yes")},
            raw,
            limit=_WORK if job.save_steps else f"{_WORK}; no checkpoint was written",
        )
    ]
    if job.layout == "cold":
        made = []
    if "error" not in result:
        of_layout = {"cold": _first_step, "warm": _of_warm}
        of_kind = {"rlvr": _rlvr_step, "align": _align_one_gpu}
        make = of_layout.get(job.layout) or of_kind.get(job.stage)
        made += [] if make is None else make(job, raw)
    elif job.stage == "align":
        made += _align_one_gpu(job, raw)
    return {record["record"]: record for record in made}


def of_upcycle(inputs: eight_inputs.Inputs, *, seconds: float, error: str | None) -> Json:
    """Return the record of `upcycle`."""
    sizes = {
        name: sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9
        for name, folder in (("read", inputs.dense), ("written", inputs.trunk))
    }
    return _make(
        "one_gpu_upcycle",
        f"a dense model of {inputs.dense_size} becomes the trunk of a discriminator",
        {"ran": records.ratio(error is None, "yes")},
        {"device_kind": None, "seconds": seconds, "gigabytes": sizes, "error": error},
        limit="the folder that is read was just written",
    )


def raw_of(job: eight_jobs.Job, result: Json) -> Json:
    """Return the measurements of a part."""
    raw = eight_records.raw_of(job.stage, result)
    notes = result["processes"][0] if result["processes"] else {}
    raw |= {name: notes[name] for name in _NOTES if name in notes}
    environment = job.environment(has_gpus=job.inputs.size != "tiny")
    raw["environment"] = {name: environment[name] for name in _SETTINGS if name in environment}
    return raw | {
        "seconds_to": notes.get("seconds_to", {}),
        "device_kind": notes.get("device_kind"),
        "update_times": notes.get("update_times", []),
        "mean_tokens": job.mean_tokens,
    }


def _make(name: str, claim: str, ratios: Mapping[str, Json], raw: Json, *, limit: str) -> Json:
    device = raw["device_kind"] or "unknown"
    return records.make(
        name, claim, dict(ratios), limit=limit, raw=raw, module=_MODULE, device=device
    )


def _first_step(job: eight_jobs.Job, cold: Json, warm: Json | None = None) -> list[Json]:
    seconds = {"cold": cold["seconds_to"]["first update"]}
    if warm is not None:
        seconds["warm"] = warm["seconds_to"]["first update"]
    targets = {"cold": "<= 75", "warm": "<= 30"}
    names = ("command", "seconds_to", "compiler_seconds", "device_kind", "environment")
    runs = {"cold": cold} | ({} if warm is None else {"warm": warm})
    return [
        _make(
            "first_step",
            f"seconds from the start of the command sft, {job.inputs.policy_size}, to the end of "
            "its first step, with an empty and a filled cache of compiled programs",
            {
                layout: records.ratio(seconds.get(layout), target)
                for layout, target in targets.items()
            },
            {layout: {name: run[name] for name in names} for layout, run in runs.items()}
            | {"device_kind": cold["device_kind"]},
            limit="points on the way are in seconds_to; the weights were written shortly before, "
            "so they may still be in the memory of the host",
        )
    ]


def _of_warm(job: eight_jobs.Job, warm: Json) -> list[Json]:
    """Return first_step with both runs, where the cold one was, and save_stall."""
    made = []
    cold = eight_jobs.read(job.result.with_name(job.result.name.replace(".warm.", ".cold.")))
    if cold is not None and "error" not in cold:
        made += _first_step(job, raw_of(job, cold), warm)
    return [*made, _save_stall(warm)]


def _save_stall(warm: Json) -> Json:
    saves = [
        stall(save, warm["checkpoint"]["wait_times"], warm["update_times"])
        for save in warm["checkpoint"]["saves"]
    ]
    *behind, last = saves
    first, *later = (save["stall_seconds"] / last["seconds_to_complete"] for save in behind)
    return _make(
        "save_stall",
        "seconds that an asynchronous save keeps training from going on, those by which it slows "
        "the steps beside it among them, over the seconds of a save that is waited for",
        {
            "first save of a process": records.ratio(first, "<= 0.1"),
            "later saves": records.ratio(statistics.mean(later), "<= 0.1"),
        },
        {name: warm[name] for name in ("command", "device_kind", "environment", "checkpoint")}
        | {"saves": saves},
        limit="the first save takes the host's pinned memory from the system, and compiles the "
        "checksums (compile_seconds); later ones have both",
    )


def stall(save: Json, waits: Sequence[Sequence[float]], updates: Sequence[float]) -> Json:
    """Return how long a save took, and how long it kept training from going on.

    Args:
      save: its step, and the times of its begin and of its return.
      waits: begin and end of each wait for the end of a save.
      updates: begin of each update.
    """
    begun, returned = save["times"]
    complete = next(end for begin, end in waits if begin >= returned)
    spans = list(itertools.pairwise(updates))
    beside = [end - begin for begin, end in spans if returned <= begin and end <= complete]
    # Three steps at the beginning compile and fill the queues.
    others = [end - begin for begin, end in spans[3:] if end <= begun or begin >= complete]
    usual = statistics.median(others or [end - begin for begin, end in spans])
    slowed = sum(seconds - usual for seconds in beside)
    return {
        "step": save["step"],
        "compile_seconds": save["compile_seconds"],
        "seconds_in_save": returned - begun,
        "seconds_to_complete": complete - begun,
        "steps_beside": len(beside),
        "usual_step_seconds": usual,
        "slowed_seconds": slowed,
        "stall_seconds": returned - begun + max(slowed, 0.0),
    }


def _rlvr_step(job: eight_jobs.Job, raw: Json) -> list[Json]:
    rate, rows = raw["copy_bytes_a_second"], raw["metrics"]
    steps = []
    for number in range(1, len(rows)):
        step = rows[number]["time/step_seconds"]
        generate = rows[number]["time/generate_seconds"]
        rollout, update = raw["rollouts"][number], raw["update_seconds"][number]
        ideal = rollout["needed_bytes"] / rate
        steps.append(
            {
                "step": step,
                "generate": generate,
                "update": update,
                "ideal": ideal,
                "generate_over_ideal": generate / ideal,
                "others": (step - generate - update) / step,
            }
        )
    return [
        _make(
            "rlvr_step",
            f"a step of RLVR of {job.inputs.policy_size}, responses of log-normal length, mean "
            f"{job.mean_tokens} before they are cut at the longest",
            {
                "seconds of rollouts over reading their bytes at the copy bandwidth": (
                    records.ratio(
                        statistics.median(one["generate_over_ideal"] for one in steps), "<= 1.5"
                    )
                ),
                "share of neither rollouts nor updates": records.ratio(
                    statistics.median(one["others"] for one in steps), "<= 0.05"
                ),
            },
            raw | {"steps": steps},
            limit="weights, keys and values of the schedule that ran are what must be read; "
            f"prompts are read within the seconds of rollouts; {_WORK}",
        )
    ]


def _align_one_gpu(job: eight_jobs.Job, raw: Json) -> list[Json]:
    fits = "error" not in raw
    shares = []
    if fits:
        updates = raw["model_update_seconds"]["discriminator"]
        for row, update in list(zip(raw["metrics"], updates, strict=True))[1:]:
            shares.append((row["time/score_seconds"] + update) / row["time/step_seconds"])
    return [
        _make(
            "align_one_gpu",
            f"a step of alignment, a policy of {job.inputs.policy_size} and a discriminator of "
            f"{job.inputs.dense_size} x 4 experts on one card",
            {
                "fits": records.ratio(fits, "yes"),
                "share of the discriminator's scores and update in a step": records.ratio(
                    statistics.median(shares) if shares else None, "<= 0.25"
                ),
            },
            raw | {"shares": shares},
            limit=f"responses of mean {job.mean_tokens}; no checkpoint was written; {_WORK}",
        )
    ]
