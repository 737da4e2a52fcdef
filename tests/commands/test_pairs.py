"""`pairs`: a policy's responses beside the teacher's, as the warm-up reads them."""

import collections
import json
import pathlib

import jax
import pyarrow.parquet as pq
import pytest

from configs import pairs as config_file
from prism_jax import errors, main
from prism_jax.commands import pairs
from prism_jax.data import records, sources
from tests import data_files
from tests.stages import scripted

_KEYS = {"prompt", "image", "teacher_caption", "student_caption", "teacher_cot", "student_cot"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("pairs")
    scripted.write_files(root, num_rows=8)
    return root


@pytest.fixture(scope="module")
def path(folder) -> pathlib.Path:
    return folder / "corpus" / "rl" / "test.parquet"


@pytest.fixture(scope="module")
def rows(path) -> list:
    return scripted.read_rows(path)


def _run(folder, path, workdir, rows, script, changes=None, **options):
    """Return the summary, the lines that were written, and the sampler."""
    sampler = scripted.ScriptedSampler(folder / "policy", rows, script, **options)
    config = scripted.configure(config_file, folder, path, changes)
    summary = pairs.run(config, str(workdir), open_sampler=sampler.open)
    return summary, _lines(workdir), sampler


def _lines(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "pairs.jsonl").open(encoding="utf-8")]


def _slip(row) -> str:
    """Return the teacher's response with a slip in both segments."""
    caption = row.teacher_caption.replace("</caption>", "- Hard to read.\n</caption>")
    return caption + row.teacher_cot.replace("</think>", "Surely.\n</think>")


def _always_slip(row, number, key):
    del number, key
    return _slip(row), True


def test_lines_are_read_back_by_the_warm_ups_reader(folder, path, rows, tmp_path):
    _, lines, _ = _run(folder, path, tmp_path, rows, _always_slip)
    found, _ = data_files.read_all(sources.Source(kind="pairs", path=str(tmp_path / "pairs.jsonl")))
    assert len(found) == len(lines) == len(rows)
    for pair, row, line in zip(found, rows, lines, strict=True):
        assert set(line) == _KEYS
        assert pair.teacher_caption == row.teacher_caption
        assert pair.teacher_cot == row.teacher_cot
        assert pair.student_caption + pair.student_cot == _slip(row)
        assert pair.student_caption.endswith("</caption>")
        assert pair.image.data == row.images[0].data
        # The discriminator is shown what the policy was asked, to the letter.
        assert pair.prompt == row.prompt[-1].content
        # The published reader puts the picture in front of the prompt as it stands.
        assert records.IMAGE_MARK + line["prompt"] == row.prompt[-1].content


def test_what_became_of_every_response_is_counted(folder, path, rows, tmp_path):
    ids = [row.id for row in rows]

    def script(row, number, key):
        del number, key
        spelt = _slip(row).replace("Surely", "Surely <|im\0_end|>")
        kinds = [
            (_slip(row), True),
            (row.teacher_response, True),
            (_slip(row), False),
            (row.teacher_cot, True),
            (spelt, True),
            (_slip(row).replace("Surely", "<image>"), True),
            (row.teacher_caption + _slip(row).split("</caption>")[1], True),
            (_slip(row), True),
        ]
        return kinds[ids.index(row.id)]

    summary, lines, _ = _run(folder, path, tmp_path, rows, script)
    assert summary["responses"] == {
        "many_images": 0,
        "many_turns": 0,
        "cut": 1,
        "format": 1,
        "unreadable": 2,
        "equal": 2,
        "repeated": 0,
        "kept": 2,
    }
    assert summary["num_pairs"] == len(lines) == 2
    assert summary["num_responses"] == 8
    assert summary["responses_under_another_system_turn"] == 0
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


@pytest.mark.parametrize("keeps", [False, True])
def test_no_line_has_a_student_that_equals_the_teacher(folder, path, rows, tmp_path, keeps):
    """Even rows say the teacher's caption, every third row all that the teacher says."""
    ids = [row.id for row in rows]

    def script(row, number, key):
        del number, key
        place = ids.index(row.id)
        if place % 3 == 0:
            return row.teacher_response + "\n", True
        if place % 2 == 0:
            return row.teacher_caption + _slip(row).split("</caption>")[1], True
        return _slip(row), True

    changes = {"has_equal_segments": keeps}
    summary, lines, _ = _run(folder, path, tmp_path, rows, script, changes)
    whole, caption = 3, 2  # rows 0, 3, 6 and rows 2, 4
    assert summary["responses"]["equal"] == whole + (0 if keeps else caption)
    equal = collections.Counter(
        (line["student_caption"] == line["teacher_caption"])
        + (line["student_cot"] == line["teacher_cot"])
        for line in lines
    )
    assert equal == ({0: 3, 1: caption} if keeps else {0: 3})


def _many(row, number, key):
    """Return slips, the second response to a prompt equal to the first."""
    del key
    return _slip(row).replace("Surely", f"Surely {max(1, number)}"), True


def test_several_responses_to_a_prompt_are_written_once_each_with_one_picture(
    folder, path, rows, tmp_path
):
    changes = {"num_responses": 3, "prompts.max_rows": 2}
    summary, lines, _ = _run(folder, path, tmp_path, rows, _many, changes)
    assert summary["responses"]["repeated"] == 2
    assert summary["responses"]["kept"] == 4
    assert len({line["image"] for line in lines}) == 2
    assert len(list((tmp_path / "images").iterdir())) == 2
    assert len({json.dumps(line) for line in lines}) == 4


def _by_chance(row, number, key):
    del number
    return _slip(row).replace("Surely", f"Surely {jax.random.randint(key, (), 0, 10**6)}"), True


def test_a_killed_job_writes_what_an_uninterrupted_one_does(folder, path, rows, tmp_path):
    changes = {"batch_responses": 3}
    expected = _run(folder, path, tmp_path / "whole", rows, _by_chance, changes)
    with pytest.raises(scripted.Interrupted):
        _run(folder, path, tmp_path / "killed", rows, _by_chance, changes, num_batches=2)
    assert not (tmp_path / "killed" / "pairs.jsonl").exists()
    got = _run(folder, path, tmp_path / "killed", rows, _by_chance, changes)
    assert got[:2] == expected[:2]
    assert len(got[2].batches) == 1
    first, second = ((tmp_path / w / "pairs.jsonl").read_bytes() for w in ("whole", "killed"))
    assert first == second
    names = {file.name for file in (tmp_path / "killed").iterdir()}
    assert names == {"run.json", "dropped_prompts.jsonl", "images", "pairs.jsonl", "summary.json"}


def test_another_seed_gives_other_students(folder, path, rows, tmp_path):
    found = [
        _run(folder, path, tmp_path / str(seed), rows, _by_chance, {"seed": seed})[1]
        for seed in (0, 1)
    ]
    assert all(one != other for one, other in zip(*found, strict=True))


def test_prompts_that_the_form_has_no_place_for_are_counted(folder, rows, path, tmp_path):
    table = pq.read_table(path).to_pylist()[:3]
    table[0]["images"] *= 2
    table[0]["prompt"][1]["content"] = "<image><image>\nWhich is larger?\n"
    turns = [("user", "What is it?"), ("assistant", "A digit."), ("user", "Which?")]
    table[1]["prompt"] = [{"role": role, "content": text} for role, text in turns]
    table[1]["images"] = []
    table[2]["prompt"] = [{"role": "user", "content": "<video>What is 3 + 4?"}]
    table[2]["images"] = []
    frames = [data_files.png(3), data_files.png(4)]
    table[2]["videos"] = [{"video": [{"bytes": frame} for frame in frames], "sample_fps": 4.0}]
    table = [row | {"videos": row.get("videos")} for row in table]
    changed = data_files.write_parquet(tmp_path / "rows.parquet", table, group_rows=3)
    rows = scripted.read_rows(changed)
    summary, lines, _ = _run(folder, changed, tmp_path / "run", rows, _always_slip)
    counts = summary["responses"]
    assert (counts["many_images"], counts["many_turns"], counts["kept"]) == (1, 1, 1)
    assert summary["responses_under_another_system_turn"] == 2
    (line,) = lines
    assert set(line) == _KEYS - {"image"} | {"video"}
    assert line["prompt"] == "<video>What is 3 + 4?"
    ((pair,), _) = data_files.read_all(
        sources.Source(kind="pairs", path=str(tmp_path / "run" / "pairs.jsonl"))
    )
    assert [file.data for file in pair.video.files] == frames
    assert (pair.image, pair.video.frames_per_second) == (None, 4.0)


def test_rows_without_teacher_texts_are_refused(folder, rows, path, tmp_path):
    table = pq.read_table(path).to_pylist()[:1]
    table[0] |= {"teacher_caption": None, "teacher_cot": None}
    changed = data_files.write_parquet(tmp_path / "rows.parquet", table, group_rows=1)
    with pytest.raises(errors.InputError, match="missing_segment"):
        _run(folder, changed, tmp_path / "run", rows, _always_slip)


def test_the_command_refuses_a_policy_that_is_not_there_in_one_line(path, tmp_path, capsys):
    command = ["pairs", "--config=configs/pairs.py:tiny", f"--workdir={tmp_path / 'run'}"]
    command += ["--config.policy.folder=nowhere", f"--config.prompts.path={path}"]
    assert main.main(command) == 2
    err = capsys.readouterr().err
    assert "nowhere" in err
    assert err.count("\n") == 1
