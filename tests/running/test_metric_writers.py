import hashlib
import json
import math
import struct

import pytest
from tensorboardX.proto import event_pb2

from prism_jax import errors
from prism_jax.data import records
from prism_jax.rewards import tags
from prism_jax.running import dump, metric_writers
from prism_jax.setup import agreement
from tests import data_files


def _lines(path, last_step, rows):
    writer = metric_writers.JsonLines(path, last_step=last_step)
    for step, values in rows:
        writer.write(step, values)
    writer.close()
    return writer


def _steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def _events(folder):
    """Read TensorBoard records: length, its checksum, the event, its checksum."""
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            yield event_pb2.Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]


def test_a_row_is_on_one_line_and_there_at_once(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    writer = metric_writers.JsonLines(path, last_step=0)
    writer.write(1, {"loss/total": 0.5})
    assert path.read_text() == '{"step": 1, "loss/total": 0.5}\n'
    writer.close()


def test_rows_after_the_restored_step_are_cut_off_and_counted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    _lines(path, 0, [(step, {"x": 1.0}) for step in range(1, 6)])
    writer = _lines(path, 3, [(4, {"x": 2.0})])
    assert _steps(path) == [1, 2, 3, 4]
    assert writer.num_dropped == 2


def test_a_half_written_last_line_is_repaired(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "x"')
    _lines(path, 2, [(2, {"x": 1.0})])
    assert _steps(path) == [1, 2]


@pytest.mark.parametrize("damage", [b"\0" * 40, b"{}", b"\xff", b'{"step": true}', b"[]"])
def test_damage_before_the_restored_step_is_refused_and_behind_it_dropped(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
    with pytest.raises(
        errors.InputError, match=r"metrics\.jsonl: line 2: damaged.*remove the line"
    ):
        metric_writers.cut_after(path, 3)
    assert metric_writers.cut_after(path, 1) == 2
    assert path.read_bytes() == b'{"step": 1}\n'


def test_a_whole_file_is_not_rewritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    _lines(path, 0, [(1, {}), (2, {})])
    before = path.stat().st_ino
    assert metric_writers.cut_after(path, 2) == 0
    assert path.stat().st_ino == before


def test_numbers_json_does_not_have_come_back_through_float(tmp_path):
    path = tmp_path / "metrics.jsonl"
    _lines(path, 0, [(1, {"a": math.nan, "b": math.inf, "c": -math.inf})])
    row = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert math.isnan(float(row["a"]))
    assert (float(row["b"]), float(row["c"])) == (math.inf, -math.inf)


def test_tensorboard_holds_the_finite_points_of_each_curve(tmp_path):
    writer = metric_writers.TensorBoard(tmp_path, last_step=0)
    writer.write(1, {"loss/total": 0.5, "loss/bad": math.nan})
    writer.write(2, {"loss/total": 0.25})
    writer.close()
    points = [(e.step, v.tag, v.simple_value) for e in _events(tmp_path) for v in e.summary.value]
    assert points == [(1, "loss/total", 0.5), (2, "loss/total", 0.25)]


def test_tensorboard_of_a_restart_hides_the_steps_that_run_again(tmp_path):
    metric_writers.TensorBoard(tmp_path, last_step=7).close()
    starts = [e.step for e in _events(tmp_path) if e.session_log.status == e.session_log.START]
    assert starts == [8]


def test_missing_wandb_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(metric_writers.importlib.import_module("sys").modules, "wandb", None)
    with pytest.raises(errors.InputError, match=r"pip install 'prism-jax\[wandb\]'"):
        metric_writers.WeightsAndBiases(
            tmp_path, project="p", name="n", tables=metric_writers.Tables()
        )


def test_responses_are_shown_with_their_pictures_beside_the_numbers_of_their_step(
    tmp_path, monkeypatch
):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("DATA", "CACHE", "CONFIG", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))
    picture = records.Image(path="a.png", data=data_files.png(7, size=(640, 480)))
    frames = (records.Image(path=None, data=data_files.png(9)),) * 2
    video = records.Video(files=frames, is_list=True, frames_per_second=2.0)
    rows = [
        records.PromptRow(
            id=name,
            source="s",
            prompt=(),
            images=images,
            videos=videos,
            teacher_response=None,
            teacher_caption=None,
            teacher_cot=None,
            data_source=None,
            ground_truth="1",
            equivalent_answers=(),
            extra_info={},
        )
        for name, images, videos in (("p", (picture,), ()), ("v", (), (video,)), ("t", (), ()))
    ]
    segments = [
        tags.Segments(
            text=f"r{i}",
            format_ok=True,
            ended=True,
            caption_chars=1,
            caption_tokens=1,
            cot_tokens=1,
            response_tokens=2,
        )
        for i in range(6)
    ]
    tables = metric_writers.Tables()
    writer = metric_writers.WeightsAndBiases(tmp_path, project="p", name="n", tables=tables)
    dumped = dump.Dump(tmp_path, 2, inputs=agreement.Inputs(), tables=tables)
    for step in (1, 2, 3):
        values = {"reward": [0.5, None, 1, 2, 3, 4], "mixed": [0.5, "x", None, [1], True, {}]}
        dumped.write(step, rows, segments, values)
    for step in (1, 2, 3):
        writer.write(step, {"loss/total": 0.5})
    writer.close()
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/table/rollout/responses_*.json"))
    staged = [path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()]
    table, *_ = (json.loads(data) for data in staged if b'"_type": "table"' in data[:100])
    column = table["columns"].index
    assert {row[column("step")] for row in table["data"]} == {2}
    assert [row[column("text")] for row in table["data"]] == [f"r{i}" for i in range(6)]
    assert [row[column("reward")] for row in table["data"]] == [0.5, None, 1, 2, 3, 4]
    mixed = [row[column("mixed")] for row in table["data"]]
    assert mixed == ["0.5", '"x"', None, "[1]", "true", "{}"]
    shown = [row[column("picture")] for row in table["data"]]
    assert shown[4:] == [None, None]
    assert [(one["width"], one["height"]) for one in shown[:4]] == [(320, 240)] * 2 + [(40, 30)] * 2
    pictures = {hashlib.sha256(data).hexdigest() for data in staged if data.startswith(b"\x89PNG")}
    assert {one["sha256"] for one in shown[:4]} == pictures


def test_every_writer_gets_every_row(tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    writers = metric_writers.Writers(metric_writers.JsonLines(p, last_step=0) for p in paths)
    writers.write(1, {"x": 1.0})
    writers.sync()
    writers.close()
    assert [_steps(path) for path in paths] == [[1], [1]]


def test_a_dump_holds_any_rows_and_a_repeated_step_replaces_it(tmp_path):
    metric_writers.write_dump(tmp_path / "rollouts", 12, [{"text": "old"}, {"text": "old"}])
    rows = [{"text": "π = 3\n", "segments": [[0, 5]], "reward": 0.2}]
    metric_writers.write_dump(tmp_path / "rollouts", 12, rows)
    assert [p.name for p in (tmp_path / "rollouts").iterdir()] == ["00000012.jsonl"]
    text = (tmp_path / "rollouts" / "00000012.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == rows


def test_a_dump_that_fails_leaves_the_old_file(tmp_path):
    metric_writers.write_dump(tmp_path, 1, [{"x": 1}])
    with pytest.raises(TypeError):
        metric_writers.write_dump(tmp_path, 1, [{"x": 2}, {"x": object()}])
    assert json.loads((tmp_path / "00000001.jsonl").read_text()) == {"x": 1}
