"""The report of a chain's folder: what it says, and that what was not run is never a number."""

import json
import math
import re
import subprocess

import pytest

from prism_jax import intervals, main
from prism_jax.report import examples, plots, results
from tests import html_page
from tests.commands import made_up_chain


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return made_up_chain.write(tmp_path_factory.mktemp("whole") / "chain")


@pytest.fixture(scope="module")
def partial(tmp_path_factory):
    """A chain that was stopped after SFT."""
    return made_up_chain.write(tmp_path_factory.mktemp("partial") / "chain", stages=("base", "sft"))


def _report(chain, tmp_path, *arguments) -> tuple[str, dict]:
    page, summary = tmp_path / "out" / "report.html", tmp_path / "out" / "summary.json"
    given = ["report", f"--workdir={chain}", f"--out={page}", f"--summary={summary}", *arguments]
    assert main.main(given) == 0
    return page.read_text(encoding="utf-8"), json.loads(summary.read_text())


def test_the_summary_holds_the_rates_of_every_stage_with_their_intervals(chain, tmp_path):
    _, summary = _report(chain, tmp_path)
    for stage, count in made_up_chain.RIGHT.items():
        values = [float(n < count) for n in range(made_up_chain.NUM_ROWS)]
        expected = intervals.rate(values, num_responses=1)
        assert intervals.Rate(**summary["accuracy"][stage]) == expected
    valid = {stage: rate["mean"] for stage, rate in summary["format_valid"].items()}
    assert valid == {"base": 0, "sft": 11 / 12, "align": 1, "rlvr": 1}


def test_pair_accuracy_is_that_of_the_first_and_the_last_ten_steps(chain, tmp_path):
    _, summary = _report(chain, tmp_path)
    assert summary["discriminator_pair_accuracy"] == {
        "before": {"caption": pytest.approx(0.8), "cot": pytest.approx(0.9)},
        "after": {"caption": pytest.approx(0.5), "cot": pytest.approx(0.625)},
        "warmup_held_out": {"caption": 0.75, "cot": 0.9},
        "steps_averaged": 10,
    }


def test_both_ends_of_a_short_alignment_share_no_step(tmp_path):
    rows = [{"step": n, "discriminator/cot_pair_accuracy": n / 8} for n in (1, 2, 3)]
    made_up_chain.write_metrics(tmp_path / "align", rows)
    accuracies = results.pair_accuracy(results.read(tmp_path))
    assert (accuracies["before"]["cot"], accuracies["after"]["cot"]) == (1 / 8, 3 / 8)
    assert accuracies["before"]["caption"] is None
    made_up_chain.write_metrics(tmp_path / "align", rows[:1])
    assert results.pair_accuracy(results.read(tmp_path))["before"]["cot"] is None


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (("response",), ("whole response",)),
        (
            ("caption", "cot", "response"),
            ("caption (perception)", "think and answer (reasoning)", "whole response"),
        ),
    ],
)
def test_the_segments_are_those_that_the_discriminator_read(tmp_path, names, shown):
    rows = [
        {"step": n}
        | {f"discriminator/{name}_pair_accuracy": n / 8 for name in names}
        | {f"discriminator/{name}_gap": n / 2 for name in names}
        for n in (1, 2, 3, 4)
    ]
    made_up_chain.write_metrics(tmp_path / "align", rows)
    warm = {"step": 5} | {f"eval/{name}_pair_accuracy": 0.75 for name in names}
    made_up_chain.write_metrics(tmp_path / "warmup", [warm])
    text, found = _report(tmp_path, tmp_path)
    accuracy = found["discriminator_pair_accuracy"]
    assert accuracy["before"] == dict.fromkeys(names, 1 / 8)
    assert accuracy["after"] == dict.fromkeys(names, 4 / 8)
    assert accuracy["warmup_held_out"] == dict.fromkeys(names, 0.75)
    assert all(name in text for name in shown)
    assert ("caption (perception)" in text) == ("caption" in names)
    assert "Gap in alignment: not" not in text


def test_captions_against_cots_are_shown_without_pictures_or_a_swap(tmp_path):
    row = {"step": 1}
    for name in ("caption", "cot"):
        row |= {f"honesty/{name}_pair_accuracy": 0.5, f"honesty/{name}_teacher_cut_fraction": 0.0}
    row["honesty/caption_against_cot_pair_accuracy"] = 0.875
    row["honesty/cot_against_caption_pair_accuracy"] = 0.125
    made_up_chain.write_metrics(tmp_path / "align", [row])
    text, _ = _report(tmp_path, tmp_path)
    line = "{}</small></th><td>–</td><td>{}</td><td>50.0 %</td>"
    for pair, share in (
        ("caption against student's cot", "87.5 %"),
        ("cot against student's caption", "12.5 %"),
    ):
        assert line.format(f"teacher's {pair}", share) in text.replace("\u00a0", " ")
    assert "Standard deviation" not in text


def test_the_summary_names_times_commands_and_seeds(chain, tmp_path):
    _, summary = _report(chain, tmp_path)
    assert summary["wall_seconds"]["sft"] == round(3.7 * 2**1.7, 1)
    assert summary["num_starts"]["align"] == 2
    assert summary["commands"]["align"] == (
        "python -m prism_jax align --workdir=$WORKDIR/align --config.seed=7"
    )
    assert set(summary["seeds"].values()) == {7}


def test_commands_are_those_that_a_shell_reads_as_the_steps_arguments():
    arguments = ("sft", "--a=$WORKDIR/x.json#y", "--b=('c d', 1)", "--to=$WORKDIR/e f", "--g=$HOME")
    step = results.Step(
        name="sft", arguments=arguments, seconds=1.0, num_starts=1, is_finished=True
    )
    assert "--a=$WORKDIR/x.json#y" in step.command
    script = step.command.replace("python -m prism_jax", "printf '%s\\n'")
    printed = subprocess.run(
        ["bash", "-c", f"WORKDIR=/w; {script}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    expected = ("sft", "--a=/w/x.json#y", "--b=('c d', 1)", "--to=/w/e f", "--g=$HOME")
    assert tuple(printed.splitlines()) == expected


def test_what_was_not_run_is_null_in_the_summary_and_said_on_the_page(partial, tmp_path):
    text, summary = _report(partial, tmp_path)
    for name in ("accuracy", "format_valid", "evaluated"):
        assert summary[name]["align"] is None
        assert summary[name]["rlvr"] is None
        assert summary[name]["sft"] is not None
    assert set(summary["discriminator_pair_accuracy"]["after"].values()) == {None}
    labels = [
        values["aria-label"] for tag, values in html_page.Page(text).tags if "aria-label" in values
    ]
    assert "Gap in alignment: not run." in labels
    assert "Reward in RLVR: not run." in labels
    (accuracy,) = (label for label in labels if label.startswith("Accuracy by stage"))
    assert "align not run; rlvr not run" in accuracy
    # Tiles, rates, types of question, the discriminator's two segments, responses.
    assert text.count("not run") > 20


def test_what_a_stage_that_ran_could_not_measure_is_not_said_to_be_not_run(tmp_path):
    rows = [{"step": n, "rollout/format_fraction": 0.0} for n in (1, 2)]
    made_up_chain.write_metrics(tmp_path / "align", rows)
    text, summary = _report(tmp_path, tmp_path)
    assert 'aria-label="Gap in alignment: not measured."' in text
    assert 'aria-label="Reward in RLVR: not run."' in text
    # Both ends of alignment, both segments.
    assert text.count('<td><span class="absent-value">not measured</span></td>') == 4
    assert summary["discriminator_pair_accuracy"]["after"]["cot"] is None


def test_the_honesty_panel_is_shown_with_a_warning_where_a_probe_explains_a_segment(
    chain, tmp_path
):
    text, summary = _report(chain, tmp_path)
    whens = [panel["when"] for panel in summary["honesty"]]
    assert whens == ["after warm-up", "alignment, step 1", "alignment, step 40"]
    # The made-up length of a cot: 0.875 of 0.9 is too far, 0.8 of 0.897 too, 0.8 of 0.775 is not.
    lines = [panel["warnings"] for panel in summary["honesty"]]
    expected = (
        "alignment, step 40: cot: length alone tells teacher from student in 80.0\u00a0% of pairs, "
        "the discriminator in 77.5\u00a0%. It may look at nothing else."
    )
    assert lines == [[], [], [expected]]
    assert text.count('<p class="warning">') == 1 and expected in text
    assert summary["honesty"][2]["values"]["router_information_bits_mean"] == 0.25
    labels = [
        values["aria-label"] for tag, values in html_page.Page(text).tags if "aria-label" in values
    ]
    (cot,) = (label for label in labels if label.startswith("Told apart: cot"))
    assert "discriminator from 0.897 at step 1 to 0.775 at step 40" in cot
    assert "10.0\u00a0% · 20.0\u00a0% · 30.0\u00a0% · 40.0\u00a0%" in text
    assert "another prompt's picture" in text
    # Only the warm-up's panel has a segment that was scored as the other.
    assert text.count("scored as the other segment") == 1
    assert "cot: scored as the other segment</small></th><td>0.625</td>" in text


def test_a_chain_without_the_panel_says_so_and_has_no_plot_of_it(partial, tmp_path):
    text, summary = _report(partial, tmp_path)
    assert summary["honesty"] == []
    assert "The honesty panel was not measured." in text
    plotted = [values for _, values in html_page.Page(text).tags if values.get("role") == "img"]
    assert len(plotted) == 5


def test_the_page_is_whole_and_asks_for_nothing(chain, tmp_path):
    text, _ = _report(chain, tmp_path, "--title=A & <b>title</b>")
    page = html_page.Page(text)
    assert "<h1>A &amp; &lt;b&gt;title&lt;/b&gt;</h1>" in text
    assert not {"script", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, values in page.tags:
        for name in ("src", "href"):
            assert values.get(name, "data:").startswith("data:")
    assert "url(" not in text
    assert "@import" not in text


def test_every_picture_and_plot_has_a_text_in_its_place(chain, tmp_path):
    tags = html_page.Page(_report(chain, tmp_path)[0]).tags
    pictures = [values for tag, values in tags if tag == "img"]
    plotted = [values for tag, values in tags if values.get("role") == "img"]
    assert len(plotted) == 7
    # One question of each of the four types of `tiny`.
    assert len(pictures) == 4
    assert all(values["alt"] for values in pictures)
    assert all(re.search(r"\d", values["aria-label"]) for values in plotted)


def test_responses_are_shown_as_text_with_segments_and_verdicts(chain, tmp_path):
    text, _ = _report(chain, tmp_path)
    assert '<span class="caption">&lt;caption&gt;' in text
    assert '<span class="answer">&lt;answer&gt;' in text
    assert "It is &lt;b&gt;7&lt;/b&gt; &amp; so on." in text
    assert '<span class="verdict good">correct</span>' in text
    assert '<span class="verdict bad">wrong format</span>' in text


def test_a_response_cannot_add_markup_or_characters_that_html_forbids():
    hostile = "<caption>\x00<img src=x onerror=alert(1)>\ud800</caption> \"'<script>"
    coloured = examples.coloured(hostile)
    assert coloured == (
        '<span class="caption">&lt;caption&gt;\ufffd&lt;img src=x onerror=alert(1)&gt;\ufffd'
        "&lt;/caption&gt;</span> &quot;&#x27;&lt;script&gt;"
    )


def test_a_missing_test_split_is_reported(chain, tmp_path):
    moved = made_up_chain.write(tmp_path / "chain", stages=("sft",))
    (moved / "corpus" / "rl" / "test.parquet").unlink()
    text, _ = _report(moved, tmp_path)
    assert "the picture is not there any more" in text
    assert "<img" not in text


def test_a_half_written_line_is_left_out_and_values_that_are_not_finite_are_counted(tmp_path):
    rows = [{"step": 1, "loss/nll": 2.0}, {"step": 2, "loss/nll": "NaN"}, {"step": 3}]
    made_up_chain.write_metrics(tmp_path / "sft", rows)
    with (tmp_path / "sft" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss/n')
    curve = results.read(tmp_path).curve("sft", "loss/nll")
    assert (curve.steps, curve.values, curve.num_not_finite) == ((1,), (2.0,), 1)
    text, _ = _report(tmp_path, tmp_path)
    assert "1 values that are not finite are left out." in text


def test_the_account_leaves_out_the_report_and_names_steps_that_did_not_finish(tmp_path):
    for number, name in enumerate(("sft", "rlvr", "report"), start=1):
        made_up_chain.write_step(tmp_path, name, number=number, seconds=60.0)
    path = tmp_path / "steps" / "rlvr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"is_finished": False}))
    text, summary = _report(tmp_path, tmp_path)
    assert summary["wall_seconds"] == {"sft": 60.0}
    assert "rlvr <small>not finished</small>" in text
    assert "2m00s in all" in text


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ((0.0, 1.0), (0, 0.25, 0.5, 0.75, 1)),
        ((-3.0, 7.0), (-5, -2.5, 0, 2.5, 5, 7.5)),
        ((2.0, 2.0), (1, 1.5, 2, 2.5, 3)),
    ],
)
def test_a_plot_has_round_ticks_around_its_values(values, ticks):
    curve = results.Curve(steps=(1, 2), values=values, num_not_finite=0)
    line = plots.Line(name="x", curve=curve, colour="a")
    drawn = plots.lines([line], title="X", unit="", has_zero=False, absent="")
    shown = re.findall(r'<text class="tick end" x="36.0"[^>]*>([^<]*)</text>', drawn)
    assert tuple(map(float, shown)) == ticks


def test_a_curve_lies_where_its_values_are():
    curve = results.Curve(steps=(0, 10), values=(0.0, 1.0), num_not_finite=0)
    line = plots.Line(name="x", curve=curve, colour="a")
    drawn = plots.lines([line], title="X", unit="", has_zero=True, absent="")
    path = re.search(r'<path class="line a" d="M(\S+) (\S+)L(\S+) (\S+)"', drawn)
    # The plot is 360 x 220 with margins of 42, 14, 22 and 34.
    assert [float(x) for x in path.groups()] == [42, 186, 346, 22]


def test_a_long_curve_is_smoothed_with_fewer_points_at_its_ends():
    steps = tuple(range(1, 41))
    curve = results.Curve(steps=steps, values=tuple(map(float, steps)), num_not_finite=0)
    assert plots.smooth_steps(curve) == 5
    line = plots.Line(name="x", curve=curve, colour="a")
    drawn = plots.lines([line], title="X", unit="", has_zero=True, absent="")
    faint, bold = (
        [float(point.split()[1]) for point in path.split("L")]
        for path in re.findall(r'<path class="(?:raw|line) a" d="M([^"]*)', drawn)
    )
    # Straight but for its ends: the first is the mean of 1, 2 and 3.
    assert math.isclose(bold[0], faint[1], abs_tol=0.11)
    assert bold[2:-2] == pytest.approx(faint[2:-2], abs=0.11)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir={}/nowhere"], "nowhere: no such folder"),
        (["--workdir={}"], "holds no stage of a chain"),
        (["--workdir={}", "--num_examples=-1"], "--num_examples must be >= 0, got -1"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, capsys, arguments, message):
    given = [argument.format(tmp_path) for argument in arguments]
    assert main.main(["report", f"--out={tmp_path}/out.html", *given]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.html").exists()


def test_a_summary_that_evaluate_did_not_write_is_named(tmp_path, capsys):
    (tmp_path / "evaluate_sft").mkdir()
    (tmp_path / "evaluate_sft" / "summary.json").write_text('{"accuracy": 0.5}')
    assert main.main(["report", f"--workdir={tmp_path}", f"--out={tmp_path}/out.html"]) == 2
    assert "evaluate_sft" in capsys.readouterr().err
