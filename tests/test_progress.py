import io
import itertools

import pytest

from prism_jax import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def _progress(stream, monkeypatch, *, seconds_per_step):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = progress.Progress(
        stream,
        title="sft",
        first_step=0,
        num_steps=8,
        watched=("loss/total", "reward/mean"),
        line_every_steps=4,
    )
    for step in range(1, 9):
        now[0] += 100.0 if step == 1 else seconds_per_step
        shown.show(step, {"loss/total": 1 / step, "loss/hidden": 7.0})
    shown.close()


def test_elsewhere_than_on_a_terminal_a_line_is_written_every_few_steps(monkeypatch):
    stream = io.StringIO()
    _progress(stream, monkeypatch, seconds_per_step=30.0)
    assert stream.getvalue().splitlines() == [
        "sft [############............] 4/8  2m00s left  loss/total 0.25",
        "sft [########################] 8/8  0s left  loss/total 0.125",
    ]


def test_on_a_terminal_one_line_is_redrawn_and_no_old_character_stays(monkeypatch):
    stream = Terminal()
    _progress(stream, monkeypatch, seconds_per_step=30.0)
    text = stream.getvalue()
    assert text.endswith("\n")
    assert text.count("\n") == 1
    drawn = text.rstrip("\n").split("\r")[1:]
    assert len(drawn) == 8
    for before, after in itertools.pairwise(drawn):
        assert len(after) >= len(before.rstrip())


def test_no_time_is_guessed_from_the_first_step_which_compiles(monkeypatch):
    stream = Terminal()
    _progress(stream, monkeypatch, seconds_per_step=1.0)
    drawn = stream.getvalue().split("\r")
    assert "left" not in drawn[1]
    assert "6s left" in drawn[2]


def test_without_a_stream_nothing_is_shown(monkeypatch):
    _progress(None, monkeypatch, seconds_per_step=1.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.4, "7s"), (59.9, "1m00s"), (185, "3m05s"), (7449, "2h04m")]
)
def test_durations_are_short(seconds, text):
    assert progress.duration(seconds) == text
