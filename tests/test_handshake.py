"""The comparison of an export's texts in other programs: its rows, its counts, and the page."""

import json
import pathlib

import pytest

from benchmarks import handshake, handshake_peers
from prism_jax import errors
from prism_jax.data.numerals import corpus as numerals_corpus
from prism_jax.data.numerals import examples as numerals_examples

_ROOT = pathlib.Path(__file__).parents[1]
_PAGE = _ROOT / "docs" / "serve_and_evaluate.md"
_RECORD = _ROOT / "benchmarks" / "results" / "handshake.json"


def _peer(program, texts, dtype="float32"):
    return {"program": program, "dtype": dtype, "versions": {"torch": "2"}, "texts": texts}


def test_a_row_is_a_question_and_a_picture_under_the_system_turn_of_training(tmp_path):
    rows = dict.fromkeys(numerals_examples.STREAMS, 0) | {"rl_test": 3}
    numerals_corpus.write(
        tmp_path / "corpus",
        level="tiny",
        seed=0,
        rows=numerals_corpus.rows_of("tiny", rows),
        slips=numerals_corpus.slips_of("tiny", {}),
        num_processes=1,
    )
    expected = list(numerals_corpus.stream(level="tiny", seed=0, name="rl_test", rows=3))
    prompts = tmp_path / "corpus" / "rl" / "test.parquet"
    written = handshake.write_rows(prompts, tmp_path)
    assert json.loads((tmp_path / "rows.json").read_text()) == written
    # As `evaluate` names them.
    assert [row["id"] for row in written] == [f"test.parquet:{number}" for number in (1, 2, 3)]
    assert [row["question"] for row in written] == [f"\n{row.question.text}\n" for row in expected]
    for row in written:
        assert pathlib.Path(row["picture"]).read_bytes().startswith(b"\x89PNG")


def test_the_claim_holds_when_every_program_has_every_text_in_float32():
    ours = {"a": "1", "b": "2", "c": "3", "d": "4"}
    peers = [_peer(program, dict(ours)) for program in handshake.PROGRAMS]
    made = handshake.record(ours, peers, "command")
    assert made["is_met"]
    assert made["command"] == "command"
    # A text that differs in another type is counted, and is no part of the claim.
    narrow = _peer("lmms_simple", ours | {"b": "2."}, "bfloat16")
    made = handshake.record(ours, [*peers, narrow], "command")
    assert made["is_met"]
    assert "| lmms-eval, `qwen3_vl`, `--force_simple` | torch 2 | bfloat16 | 3 of 4 |" in (
        handshake.table(made)
    )
    assert made["raw"]["counts"][-1]["different"] == [{"id": "b", "ours": "2", "theirs": "2."}]
    one_off = [*peers[:-1], _peer("vllm", ours | {"d": "5"})]
    made = handshake.record(ours, one_off, "command")
    assert (made["is_met"], made["ratio"]["vllm"]) == (False, 0.75)
    # A program that was not run does not agree.
    made = handshake.record(ours, peers[:-1], "command")
    assert (made["is_met"], made["ratio"]["vllm"]) == (False, None)
    with pytest.raises(errors.InputError, match="vllm: texts of other rows"):
        handshake.record(ours, [_peer("vllm", {"a": "1"})], "command")


def test_a_response_is_read_from_the_log_before_its_reasoning_was_removed(tmp_path):
    samples = [
        {"doc_id": 1, "filtered_resps": "b"},
        {"doc_id": 2, "resps": ["<think>c</think> d"], "filtered_resps": "d"},
        {"doc_id": 0, "resps": "<think>a</think>", "filtered_resps": ""},
    ]
    log = tmp_path / "samples.jsonl"
    log.write_text("".join(f"{json.dumps(sample)}\n" for sample in samples))
    assert handshake_peers.logged(log, 3) == ["<think>a</think>", "b", "<think>c</think> d"]


def test_the_page_has_the_table_of_the_record(tmp_path):
    copy = tmp_path / "page.md"
    copy.write_text(_PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    handshake.main(["page", f"--out={_RECORD}", f"--page={copy}"])
    assert copy.read_text(encoding="utf-8") == _PAGE.read_text(encoding="utf-8")
    assert handshake.table(json.loads(_RECORD.read_text(encoding="utf-8"))) in copy.read_text()
