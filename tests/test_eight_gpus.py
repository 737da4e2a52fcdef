"""The figures of the benchmark on the GPUs of one host."""

import pytest

from benchmarks import eight_gpus, eight_records


def _run(folder, *arguments):
    eight_gpus.main(["--size=tiny", f"--folder={folder}", "--num_devices=2", *arguments])


def _result(layout, num_devices, seconds, losses):
    rows = [
        {"step": n, "loss/nll": loss, "data/padding_fraction": 0.25, "time/step_seconds": s}
        for n, (loss, s) in enumerate(zip(losses, seconds, strict=True), start=1)
    ]
    process = {"device_kind": "card", "peak_bytes": {"0": 3 << 30}, "seconds_to": {}}
    process |= {"saves": [], "save_wait_times": []}
    return {
        "layout": layout,
        "num_devices": num_devices,
        "command": [],
        "seconds": 60.0,
        "processes": [process],
        "metrics": rows,
        "goodput": {},
        "checkpoint_bytes": 10**9,
        "places_a_step": 8000,
    }


def test_ratios_leave_the_first_step_out_and_the_largest_difference_is_named():
    one = _result("one", 8, [99.0, 2.0, 2.0], [4.0, 3.0, 2.0])
    results = {
        "one": one,
        "each": _result("each", 8, [50.0, 3.0, 3.0], [4.0, 3.3, 2.0]),
        "single": _result("single", 1, [99.0, 8.0, 8.0], [4.0, 3.0, 2.0]),
        "resumed": _result("resumed", 4, [5.0, 5.0, 5.0], [0.0, 0.0, 2.0]),
    }
    record = eight_records.make("sft", "4b", results)
    # 8000 places in 2 s on 8 devices, and in 8 s on one.
    assert record["ratio"].pop("tokens/s a device, all over single") == pytest.approx(0.5)
    difference = record["ratio"].pop("largest relative difference, each to one")
    assert difference == pytest.approx(0.3 / 3.3)
    assert record["raw"]["each"]["most_different"] == "step 2 loss/nll"
    assert record["ratio"].pop("largest relative difference, resumed to one") == 0.0
    assert record["ratio"] == {f"{name} ran": True for name in results}
    assert not record["is_met"]
    assert record["raw"]["one"]["tokens_a_second_a_device"] == pytest.approx(375.0)
    assert record["raw"]["one"]["peak_gib_by_device"] == {"0": 3.0}


def test_a_run_that_failed_is_told_and_compared_with_nothing():
    failed = {
        "layout": "each",
        "num_devices": 2,
        "command": [],
        "seconds": 1.0,
        "processes": [],
        "metrics": [],
    }
    failed["error"] = "exit code 1: not enough memory"
    one = _result("one", 2, [9.0, 2.0, 2.0], [4.0, 3.0, 2.0])
    record = eight_records.make("sft", "4b", {"one": one, "each": failed})
    assert record["ratio"] == {"one ran": True, "each ran": False}
    assert not record["is_met"]
    assert record["raw"]["each"]["error"] == failed["error"]
    one["metrics"][1]["loss/nll"] = "NaN"
    other = _result("each", 2, [9.0, 2.0, 2.0], [4.0, 3.0, 2.0])
    assert eight_records.largest_difference(one, other) == (float("inf"), "step 2 loss/nll")


def test_parts_are_listed_and_a_part_without_its_inputs_is_refused(tmp_path, capsys):
    eight_gpus.main(["--size=8b", "--list"])
    names = capsys.readouterr().out.split()
    assert names[:3] == ["inputs", "sft.one", "sft.resumed"]
    assert set(names) >= {"rlvr.each", "align.each", "warmup.each", "evaluate.single"}
    with pytest.raises(SystemExit, match="run --part=inputs first"):
        _run(tmp_path, "--part=sft.one")
