"""The data commands on files: what they write, and one line for what is wrong."""

import json

import pytest
import transformers

from prism_jax import main
from prism_jax.data.numerals import corpus as numerals_corpus
from tests import data_files

FEW = [f"--rows={part}={count}" for part, count in (
    ("base", 2), ("public", 2), ("teacher", 2), ("align", 1), ("rl_train", 1), ("rl_test", 1)
)]  # fmt: skip


def test_the_corpus_is_written_and_what_is_built_of_it_has_all_its_rows(tmp_path, capsys):
    corpus = tmp_path / "corpus"
    assert main.main(["data", "numerals", f"--out={corpus}", "--seed=3", *FEW]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parts"]["rl_test"]["rows"] == 1
    for name, kind, num_rows in (
        ("sft/dataset_info.json#numerals_public", "sft", 2),
        ("align/train.parquet", "prompts", 1),
    ):
        built = tmp_path / f"built_{kind}"
        source = f"--from={corpus}/{name}"
        assert main.main(["data", "build", source, f"--to={built}", f"--kind={kind}"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["rows_kept"] == told["rows_read"] == num_rows
        assert (built / "build_manifest.json").exists()


def test_rates_of_slips_are_an_argument(tmp_path, capsys):
    slips = [f"--slips={name}=0" for name in ("perception", "arithmetic", "habit")]
    assert main.main(["data", "numerals", f"--out={tmp_path / 'a'}", *FEW, *slips]) == 0
    public = json.loads(capsys.readouterr().out)["parts"]["public"]
    assert public["rows_with_wrong_answer"] == 0


@pytest.mark.parametrize(
    ("argument", "told"),
    [("--rows=base", "NAME=NUMBER"), ("--rows=nope=3", "nope"), ("--slips=habit=2", "habit")],
)
def test_a_wrong_part_or_rate_is_one_line(tmp_path, capsys, argument, told):
    assert main.main(["data", "numerals", f"--out={tmp_path / 'a'}", argument]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert told in err


def test_a_build_with_a_further_split_reports_on_each(tmp_path, capsys):
    paths = {}
    for name, num_rows in (("dev", 2), ("test", 1)):
        rows = [{"prompt": f"Q{i}", "answer": str(i)} for i in range(num_rows)]
        paths[name] = data_files.write_lines(tmp_path / f"{name}.jsonl", rows)
    command = ["data", "build", f"--from={paths['dev']}", f"--to={tmp_path / 'built'}"]
    command += ["--kind=prompts", "--split=dev", f"--also=test={paths['test']}"]
    assert main.main(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert {name: report["rows_kept"] for name, report in told["splits"].items()} == {
        "dev": 2,
        "test": 1,
    }
    for wrong, message in (
        ([*command, f"--also=test={paths['dev']}"], "each name once"),
        ([*command, "--also=test"], "must be NAME=PATH"),
        ([*command[:-1], f"--also=dev={paths['test']}"], "two sources are given for the split dev"),
    ):
        assert main.main(wrong) == 2
        assert message in capsys.readouterr().err


def test_wrong_rows_are_named_and_nothing_is_written(tmp_path, capsys):
    rows = [data_files.sft_row(0), data_files.sft_row(1, images=["missing.png"])]
    data_files.write_images(tmp_path, 1)
    source = data_files.write_lines(tmp_path / "rows.jsonl", rows)
    build = ["data", "build", f"--from={source}", f"--to={tmp_path / 'built'}", "--kind=sft"]
    assert main.main(build) == 2
    told = capsys.readouterr().err
    assert "missing.png" in told
    assert "1 of 2 rows are wrong, --max_bad_rows is 0" in told
    assert not (tmp_path / "built").exists()
    assert main.main([*build, "--max_bad_rows=1"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["rows_dropped"] == 1
    assert told.err == ""  # TFDS announces a download to whoever lets it


def test_every_wrong_row_has_a_line_of_its_own_and_the_error_is_short(tmp_path, capsys):
    rows = [data_files.sft_row(i, images=[f"missing\n{i}.png"]) for i in range(130)]
    source = data_files.write_lines(tmp_path / "rows.jsonl", rows)
    build = ["data", "build", f"--from={source}", f"--to={tmp_path / 'built'}", "--kind=sft"]
    assert main.main(build) == 2
    *lines, error = capsys.readouterr().err.splitlines()
    assert len(lines) == 130
    for i, line in enumerate(lines):
        assert line.startswith(f"left out: rows.jsonl row {i + 1} ")
    assert error.startswith("error: rows: 130 of 130 rows are wrong, --max_bad_rows is 0; ")
    assert len(error) < 300


def test_an_answer_that_nothing_can_be_judged_against_is_a_wrong_row(tmp_path, capsys):
    answers = ["\\frac{1}{2", "</answer>", "42"]
    rows = [
        data_files.prompt_row(i, reward_model={"style": "rule", "ground_truth": text})
        for i, text in enumerate(answers)
    ]
    source = data_files.write_parquet(tmp_path / "rows.parquet", rows, group_rows=3)
    build = ["data", "build", f"--from={source}", f"--to={tmp_path / 'built'}", "--kind=prompts"]
    assert main.main([*build, "--need_answer", "--max_bad_rows=2"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["rows_kept"] == 1
    assert main.main([*build[:-2], f"--to={tmp_path / 'all'}", "--kind=prompts"]) == 0
    assert json.loads(capsys.readouterr().out)["rows_kept"] == 3


def test_the_help_of_a_build_says_where_long_rows_are_found(capsys):
    with pytest.raises(SystemExit):
        main.main(["data", "build", "--help"])
    assert "rows that are too long are found when a stage opens the data" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_tokenizer_of_the_corpus_is_read_by_transformers_and_reads_its_words_whole(
    tmp_path, capsys
):
    out = tmp_path / "tokenizer"
    arguments = ["data", "tokenizer", f"--out={out}", "--num_texts=400"]
    assert main.main(arguments) == 0
    ids = json.loads(capsys.readouterr().out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == ids["vocab_size"]
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == ids["image_token_id"]
    [text] = numerals_corpus.sample_texts("tiny", 7, 3)[
        2:
    ]  # a teacher's response to another picture
    tokens = tokenizer(text).input_ids
    assert tokenizer.decode(tokens) == text
    assert len(tokens) < len(text) / 2.5
    assert main.main(arguments) == 2
    assert "holds a tokenizer.json already" in capsys.readouterr().err


def test_a_tokenizer_of_nothing_is_one_line(tmp_path, capsys):
    assert main.main(["data", "tokenizer", f"--out={tmp_path / 'a'}", "--num_merges=0"]) == 2
    assert "--num_merges must be >= 1, got 0" in capsys.readouterr().err
