"""Published benchmarks become prompts for `evaluate`; anything else in their files is refused."""

import contextlib
import json
import re
import shutil

import pytest

from prism_jax import errors, main
from prism_jax.data import records, sources
from prism_jax.data.benchmarks import catalog, files
from prism_jax.rewards.benchmarks import facts as facts_lib
from prism_jax.rewards.benchmarks import rules
from tests import data_files, published_benchmarks
from tests.rewards import oracle_files


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return each benchmark's rows by protocol, read back from the folder that was written."""
    root = tmp_path_factory.mktemp("benchmarks")
    found = {}
    for name in published_benchmarks.PUBLISHED:
        folder = published_benchmarks.write(root / "hub" / name, name)
        for protocol in facts_lib.PROTOCOLS:
            target = root / protocol / name
            command = ["data", "benchmark", name, f"--from={folder}", f"--to={target}"]
            assert main.main([*command, f"--scorer={protocol}"]) == 0
            source = sources.Source(kind="prompts", path=str(target))
            found[name, protocol] = data_files.read_all(source)[0]
    return root, found


def test_the_catalog_has_a_layout_and_a_rule_for_each_benchmark_of_the_paper():
    assert set(catalog.LAYOUTS) == set(published_benchmarks.PUBLISHED) == set(rules.RULES)


def test_the_oracle_prompts_are_those_of_the_published_evaluations(built):
    _, found = built
    for case in oracle_files.read("benchmark_prompts.json"):
        row = found[case["benchmark"], case["protocol"]][case["row"]]
        system = {turn.role: turn.content for turn in row.prompt}.get("system")
        # A task without a system turn of its own has that of PRISM's template, or none.
        if case["system"] is not None:
            assert system == case["system"]
        elif case["protocol"] == "prism":
            assert system.startswith("You are a helpful scientific assistant.")
            assert system.endswith("</answer>")
        else:
            assert system is None
        text = row.prompt[-1].content
        for image in row.images:
            text = text.replace(records.IMAGE_MARK, f"<{image.path}>", 1)
        assert text == "".join(case["user"])


def test_rows_hold_what_the_scorer_needs(built):
    _, found = built
    for (name, protocol), rows in found.items():
        published = published_benchmarks.rows(name)
        assert len(rows) == len(published)
        for row, given in zip(rows, published, strict=True):
            facts = facts_lib.read(row.extra_info, place="")
            assert (facts.name, facts.protocol) == (name, protocol)
            assert facts.answer == row.ground_truth == (given.get("answer") or given["gt_answer"])
            assert facts.max_tokens == catalog.LAYOUTS[name].max_tokens[protocol]
            assert row.extra_info["question_type"]
    kinds = [row.extra_info["question_type"] for row in found["mmmu", "prism"]]
    assert kinds == ["Physics", "Art_Theory"]
    facts = facts_lib.read(found["mathvista", "prism"][3].extra_info, place="")
    assert (facts.answer_type, facts.precision) == ("float", 2)
    group = facts_lib.read(found["wemath", "prism"][-1].extra_info, place="").group
    assert group == {"problem": "1", "key": "3steps_multi"}


def test_json_lines_with_pictures_as_files_are_read_alike(built, tmp_path):
    _, found = built
    rows = published_benchmarks.rows("mathvision")
    for row in rows:
        picture = row["decoded_image"]
        (tmp_path / picture["path"]).write_bytes(picture["bytes"])
        row["decoded_image"] = picture["path"]
    data_files.write_lines(tmp_path / "testmini.jsonl", rows)
    command = ["data", "benchmark", "mathvision", f"--from={tmp_path}", f"--to={tmp_path / 'out'}"]
    assert main.main(command) == 0
    source = sources.Source(kind="prompts", path=str(tmp_path / "out"))
    again = data_files.read_all(source)[0]
    expected = found["mathvision", "prism"]
    assert [records.digest(row) for row in again] == [records.digest(row) for row in expected]


def _changed(name, number, **changes):
    rows = published_benchmarks.rows(name)
    rows[number] |= changes
    return rows


@pytest.mark.parametrize(
    ("name", "number", "changes", "message"),
    [
        ("mathvista", 2, {"answer_type": "essay"}, r"row 3\b.*answer_type must be one of integer"),
        ("mathvista", 0, {"answer": "9/11"}, "answer '9/11' is none of the choices"),
        ("mathvista", 2, {"precision": 3.0}, "precision must be 1 or 2 for a float, got float 3"),
        ("mathvision", 0, {"answer": "E"}, r"row 1\b.*answer must be one of A, B, C, got 'E'"),
        ("mathvision", 1, {"answer": "AB", "options": ["x", "y"]}, "must be one of A, B, got 'AB'"),
        ("mathvision", 0, {"hint": "x"}, "column 'hint' is not one of MathLLMs/MathVision"),
        ("mathverse", 1, {"problem_version": "4D"}, "problem_version must be one of .* got '4D'"),
        ("wemath", 1, {"key": "4steps_1"}, "key must be one of 2steps_1, .* got '4steps_1'"),
        ("wemath", 1, {"answer": "Z"}, r"row 2\b.*answer must be one of A, B"),
        ("mmmu", 0, {"options": "A or B"}, "options must be a list as text, got 'A or B'"),
        ("mmmu", 0, {"image_3": None}, "the text names <image 3>, not in 'image_3'"),
        ("mmmu", 1, {"id": "2"}, "id must be SPLIT_SUBJECT_NUMBER, got '2'"),
        ("mmmu_pro_standard", 0, {"question": "<image>?"}, "a question holds <image>"),
        ("mmmu_pro_vision", 0, {"image": None}, "column 'image' has no picture"),
        ("hallusion", 4, {"gt_answer": "2"}, r"row 5\b.*gt_answer must be one of 0, 1, got '2'"),
        ("hallusion", 0, {"category": "VX"}, "category must be one of VD, VS, got 'VX'"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_with_file_row_and_value(
    tmp_path, capsys, name, number, changes, message
):
    folder = published_benchmarks.write(tmp_path, name, _changed(name, number, **changes))
    command = ["data", "benchmark", name, f"--from={folder}", f"--to={tmp_path / 'out'}"]
    assert main.main(command) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    file = published_benchmarks.PUBLISHED[name][1][0].split("/")[-1]
    assert file in last
    assert re.search(message, last), last
    assert not (tmp_path / "out").exists()


_ODD = (
    None,
    "",
    "x",
    " ",
    7,
    -1.5,
    float("nan"),
    True,
    b"x",
    [],
    ["a"] * 30,
    [1],
    {},
    {"a": 1},
    "[1",
    "['a'",
)


@pytest.mark.parametrize("name", published_benchmarks.PUBLISHED)
def test_no_value_of_a_column_is_a_bug(name):
    for row in published_benchmarks.rows(name):
        for column in row:
            for value in _ODD:
                with contextlib.suppress(records.RowError):
                    place = records.Place(file="f", row=1)
                    catalog.LAYOUTS[name].parse(
                        row | {column: value}, place=place, protocol="prism"
                    )
            rest = {other: value for other, value in row.items() if other != column}
            with contextlib.suppress(records.RowError):
                catalog.LAYOUTS[name].parse(rest, place=place, protocol="upstream")


def test_a_problem_without_one_of_its_steps_is_refused(tmp_path, capsys):
    rows = published_benchmarks.rows("wemath")
    del rows[1]
    folder = published_benchmarks.write(tmp_path, "wemath", rows)
    command = ["data", "benchmark", "wemath", f"--from={folder}", f"--to={tmp_path / 'out'}"]
    assert main.main(command) == 2
    assert "problem 1 must have 2steps_1, 2steps_2, 2steps_multi" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_are_found_as_the_hub_lays_them_and_a_missing_shard_is_named(tmp_path):
    folder = published_benchmarks.write(tmp_path / "wemath", "wemath")
    wanted = catalog.LAYOUTS["wemath"]
    assert [path.name for path in files.find(folder, wanted)] == [
        "testmini-00000-of-00002.parquet",
        "testmini-00001-of-00002.parquet",
    ]
    (folder / "data" / "testmini-00001-of-00002.parquet").unlink()
    with pytest.raises(errors.InputError, match="must hold 2 numbered files"):
        files.find(folder, wanted)
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.InputError, match=r"holds no testmini\*.parquet, as We-Math/We-Math"):
        files.find(tmp_path / "empty", wanted)
    # The split may lie in the folder itself, and parts of it by version beside it.
    verse = published_benchmarks.write(tmp_path / "verse", "mathverse")
    shutil.copytree(verse / "testmini", verse / "testmini_version_split")
    assert len(files.find(verse, catalog.LAYOUTS["mathverse"])) == 1
    (verse / "testmini" / "testmini-00000-of-00001.parquet").rename(verse / "testmini.parquet")
    found = files.find(verse, catalog.LAYOUTS["mathverse"])
    assert [path.name for path in found] == ["testmini.parquet"]
    pro = published_benchmarks.write(tmp_path / "pro", "mmmu_pro_standard")
    published_benchmarks.write(pro, "mmmu_pro_vision")
    found = files.find(pro, catalog.LAYOUTS["mmmu_pro_vision"])
    assert [path.parent.name for path in found] == ["vision"]
    shutil.copytree(pro / "vision", pro / "copy" / "vision")
    with pytest.raises(errors.InputError, match="in several places, name one"):
        files.find(pro, catalog.LAYOUTS["mmmu_pro_vision"])


def test_a_suite_is_a_folder_of_built_data_sets_and_nothing_else(built, tmp_path):
    root, _ = built
    assert list(files.suite(str(root / "prism"))) == sorted(published_benchmarks.PUBLISHED)
    assert files.suite(str(root / "prism" / "mmmu")) == {}
    assert files.suite(str(root / "hub")) == {}
    shutil.copytree(root / "prism" / "mmmu", tmp_path / "mmmu")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(errors.InputError, match=r"holds data sets, but also notes\.txt"):
        files.suite(str(tmp_path))


def test_the_summary_of_a_benchmark_is_json(tmp_path, capsys):
    folder = published_benchmarks.write(tmp_path / "hub", "hallusion")
    command = ["data", "benchmark", "hallusion", f"--from={folder}", f"--to={tmp_path / 'out'}"]
    assert main.main(command) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["rows_kept"] == 5 and summary["scorer"] == "prism"
