"""The records of `benchmarks.eight_gpus`: a stage's layouts side by side."""

import json
import math
import pathlib
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks import eight_jobs, records

_LAYOUTS = ("one", "each", "half", "single", "resumed")
# Values below this are compared with it: rounding leaves nothing else of them.
_FLOOR = 1e-3
_EQUAL = "<= 0.001"
CLAIMS = {
    "sft": "packed SFT",
    "warmup": "warm-up of a discriminator of 2B x 4 experts",
    "align": "alignment with a discriminator of 2B x 4 experts",
    "rlvr": "RLVR, 16 responses a prompt",
    "evaluate": "greedy evaluation",
}
_LIMIT = (
    "random weights; numerals with reasoning and responses of log-normal length, the latter "
    "written over with words in the format, so ratios to the sampler's log-probs mean nothing; "
    "the first step is left out of the medians"
)

Json = Any


def write(job: eight_jobs.Job, out: pathlib.Path) -> Json:
    """Write the record of the job's stage from all of its stored results; return it."""
    results = {}
    for layout in _LAYOUTS:
        path = job.result.with_name(f"{job.inputs.size}.{job.stage}.{layout}.json")
        result = eight_jobs.read(path)
        if result is not None:
            results[layout] = result
    record = make(job.stage, job.inputs.size, results)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{record['record']}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return record


def make(stage: str, size: str, results: Mapping[str, Json]) -> Json:
    """Return the record of a stage.

    Args:
      results: of the layouts that ran, from `eight_jobs.run`.
    """
    raw = {layout: raw_of(stage, result) for layout, result in results.items()}
    ratios = {f"{layout} ran": records.ratio("error" not in r, "yes") for layout, r in raw.items()}
    whole = results.get("one")
    if whole is not None and "error" not in whole:
        for layout in ("each", "resumed"):
            other = results.get(layout)
            if other is not None and "error" not in other:
                difference, name = largest_difference(whole, other)
                raw[layout]["most_different"] = name
                ratios[f"largest relative difference, {layout} to one"] = records.ratio(
                    difference, _EQUAL
                )
        ratios |= _scaling(stage, raw)
    devices = [one for result in results.values() for one in result["processes"]]
    kind = devices[0]["device_kind"] if devices else "unknown"
    most = max(result["num_devices"] for result in results.values())
    return records.make(
        f"eight_{stage}_{size}",
        f"{CLAIMS[stage]} of {size} on the devices of one host, as shipped",
        ratios,
        limit=_LIMIT,
        raw=raw,
        module="benchmarks.eight_gpus",
        device=f"{kind} x {most}",
    )


def _scaling(stage: str, raw: Mapping[str, Json]) -> dict[str, Json]:
    """Return tokens/s a device of all devices over those of fewer."""
    ratios = {}
    of_stage = {"sft": (("tokens", ">= 0.9"),), "evaluate": (("rollout_tokens", ">= 0.93"),)}
    of_stage["rlvr"] = of_stage["align"] = of_stage["evaluate"]
    for layout in ("half", "single"):
        for name, target in of_stage.get(stage, ()):
            key = f"{name}_a_second_a_device"
            value, base = (raw.get(which, {}).get(key) for which in ("one", layout))
            if value is not None and base is not None:
                title = f"{name.replace('_', ' ')}/s a device, all over {layout}"
                ratios[title] = records.ratio(value / base, target)
    return ratios


def raw_of(stage: str, result: Json) -> Json:
    """Return the measurements of a layout: memory, times, tokens a second, its metrics."""
    num_devices, processes = result["num_devices"], result["processes"]
    raw = {name: result[name] for name in ("command", "num_devices", "seconds")}
    raw["peak_gib_by_device"] = {
        number: round(value / 2**30, 2)
        for process in processes
        for number, value in process["peak_bytes"].items()
    }
    if "error" in result:
        return raw | {"error": result["error"], "metrics": result["metrics"]}
    first = processes[0]
    rollouts = first.get("rollouts", [])
    if len(rollouts) > 1:
        seconds = sum(one["seconds"] for one in rollouts[1:])
        tokens = sum(one["tokens"] for one in rollouts[1:])
        raw["rollout_tokens_a_second_a_device"] = tokens / seconds / num_devices
    raw["rollouts"] = rollouts
    if stage == "evaluate":
        return raw | {"summary": result["summary"]}
    # Before its last step, the rows of a resumed run are those of the run that it continues.
    rows = result["metrics"][-1:] if result["layout"] == "resumed" else result["metrics"]
    steady = rows[1:]
    raw |= {
        "seconds_to": first["seconds_to"],
        "median_seconds": {
            name: statistics.median(row[name] for row in steady)
            for name in (steady[0] if steady else {})
            if name.startswith("time/") and all(name in row for row in steady)
        },
        "account_of_wall_time": result["goodput"],
        "checkpoint": {
            "gigabytes": result["checkpoint_bytes"] / 1e9,
            "saves": first["saves"],
            "wait_times": first["save_wait_times"],
        },
        "metrics": rows,
    }
    raw |= _speed(stage, result, steady, raw)
    return raw


def _speed(stage: str, result: Json, steady: list[Json], raw: Json) -> Json:
    """Return what the steps after the first made a second, by phase."""
    if not steady:
        return {}
    step = statistics.median(row["time/step_seconds"] for row in steady)
    num_devices = result["num_devices"]
    if stage == "sft":
        padding = statistics.mean(row["data/padding_fraction"] for row in steady)
        places = result["places_a_step"] / step / num_devices
        return {
            "places_a_second_a_device": places,
            "tokens_a_second_a_device": places * (1 - padding),
        }
    if stage == "warmup":
        return {"pairs_a_second": result["pairs_a_step"] / step}
    # The first step's rollout is the first call.
    tokens = statistics.mean(one["tokens"] for one in raw["rollouts"][1:])
    rest = step - raw["median_seconds"]["time/generate_seconds"]
    return {
        "response_tokens_a_second_of_the_rest_of_a_step": tokens / rest,
        "response_tokens_a_second_of_a_step": tokens / step,
    }


def largest_difference(one: Json, other: Json) -> tuple[float, str]:
    """Return the largest relative difference of metrics of both, times left out, and its name.

    Of `resumed` there are metrics of the last step alone, which is compared.
    """
    values, others = dict(_values(one)), dict(_values(other))
    if other["layout"] == "resumed":
        last = f"step {other['metrics'][-1]['step']} "
        values, others = (
            {name: value for name, value in held.items() if name.startswith(last)}
            for held in (values, others)
        )
    if values.keys() != others.keys():
        return float("inf"), ", ".join(sorted(values.keys() ^ others.keys()))
    differences = {name: _difference(value, others[name]) for name, value in values.items()}
    name = max(differences, key=differences.__getitem__)
    return differences[name], name


def _difference(one: float, other: float) -> float:
    if one == other or (math.isnan(one) and math.isnan(other)):
        return 0.0
    difference = abs(one - other) / max(abs(one), abs(other), _FLOOR)
    return float("inf") if math.isnan(difference) else difference


def _values(result: Json) -> Iterator[tuple[str, float]]:
    """Yield every number of the metrics, or of the summary, under its place."""
    if "summary" in result:
        yield from _numbers(result["summary"], "summary")
        return
    for row in result["metrics"]:
        for name, value in row.items():
            if name != "step" and not name.startswith("time/"):
                yield f"step {row['step']} {name}", float(value)


def _numbers(value: Json, place: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for name, inside in value.items():
            if "seconds" not in name:
                yield from _numbers(inside, f"{place}.{name}")
    elif isinstance(value, int | float):
        yield place, float(value)
