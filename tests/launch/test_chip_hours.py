"""Chip hours come from the last line of each start."""

import json

import pytest

from launch import chip_hours
from prism_jax.running import goodput


def _line(started, seconds, *, kind="TPU v5p", devices=8):
    return json.dumps(
        {"started": started, "step": 1, "lost_steps": 0, "num_devices": devices}
        | {"device_kind": kind, "init_seconds": 360.0, "step_seconds": seconds}
    )


def test_hours_are_those_of_all_starts_times_their_chips():
    lines = [_line("a", 10.0), _line("a", 3240.0), _line("b", 90.0, devices=4), '{"started": "c']
    hours = chip_hours.of_lines(lines)
    assert hours == pytest.approx({"init": 0.8 + 0.4, "step": 7.2 + 0.1})
    # A chip of Ironwood is two devices.
    assert sum(chip_hours.of_lines([_line("a", 3240.0, kind="TPU7x")]).values()) == 4.0


def test_the_command_reads_what_a_run_writes(tmp_path, capsys):
    account = goodput.Goodput(tmp_path / "goodput.jsonl", begun=0.0, lost_steps=0)
    account.write(3)
    account.close()
    assert chip_hours.main([str(tmp_path), str(tmp_path), "--price=2"]) == 0
    *_, total = capsys.readouterr().out.splitlines()
    line = json.loads((tmp_path / "goodput.jsonl").read_text())
    hours = 2 * 8 * sum(v for k, v in line.items() if k.endswith("_seconds")) / 3600
    assert total == f"so far: {hours:.2f} chip hours, {2 * hours:.2f} dollars"
    assert chip_hours.main([str(tmp_path / "none")]) == 2
    (tmp_path / "goodput.jsonl").write_text('{"started": "a", "step_seconds": 1.0}\n')
    assert chip_hours.main([str(tmp_path)]) == 2
    assert "written by an older version" in capsys.readouterr().err


def test_a_bucket_is_read_through_gcloud(cloud, capsys, monkeypatch):
    monkeypatch.setenv("PATH", cloud.environment["PATH"])
    monkeypatch.setenv("FAKE_CLOUD", str(cloud.folder))
    cloud.rules(
        {"match": "cat", "out": _line("a", 3240.0)}, {"match": "cat", "code": 1, "err": "no"}
    )
    assert chip_hours.main(["gs://b/run/"]) == 0
    assert cloud.calls() == ["gcloud storage cat gs://b/run/goodput.jsonl"]
    assert capsys.readouterr().out.endswith("so far: 8.00 chip hours\n")
    assert chip_hours.main(["gs://b/run"]) == 2
    assert capsys.readouterr().err == "error: gs://b/run/goodput.jsonl: no\n"
