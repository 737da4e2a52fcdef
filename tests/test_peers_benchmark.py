"""The records against peers: a peer's results survive it, and its batches are added up by hand."""

import json

import jax
import pytest

from benchmarks import peers, rollout_against, rollout_cases

_PEER = """
import json, sys, time
print("a library's own words")
print(json.dumps({"case": "steps", "rows": 2, "step_seconds": 0.5}), flush=True)
print("{'also': 'not a result'}")
if sys.argv[1] == "sleeps":
    time.sleep(60)
sys.exit("no more memory")
"""


@pytest.mark.parametrize(
    ("way", "limit", "why"), [("fails", 60.0, "no more memory"), ("sleeps", 1.0, "killed after 1")]
)
def test_a_peer_that_ends_early_leaves_its_results(tmp_path, monkeypatch, way, limit, why):
    (tmp_path / "peer_that_ends.py").write_text(_PEER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    results = peers.run("peer_that_ends", [way], limit_seconds=limit)
    assert results.of("steps") == [{"case": "steps", "rows": 2, "step_seconds": 0.5}]
    assert why in results.error


def test_a_batch_takes_its_prefill_and_the_steps_of_its_longest():
    # Batches of 3 and 5 tokens; the first token of each is the prefill's. Steps behind 1, 2, 3 and
    # 4 tokens take 2, 3, 4 and, beyond the last that was measured, 4 seconds.
    steps = [(0, 1.0), (3, 4.0)]
    seconds = peers.batched_seconds([3, 1, 2, 5], 2, prefill_seconds=10.0, steps=steps)
    assert seconds == (10 + 2 + 3) + (10 + 2 + 3 + 4 + 4)


def test_the_time_of_a_peer_is_told_for_every_number_of_rows():
    lines = [
        {"case": "steps", "rows": rows, "after": after, "prefill_seconds": 1.0, "step_seconds": 0.5}
        for rows in (1, 2)
        for after in (0, 100)
    ]
    lines.append({"case": "none", "rows": 4, "after": 0, "error": "no memory"})
    results = peers.Results(lines=lines, error=None)
    assert rollout_against.peer_on_ragged([3, 5], results) == [
        {"rows": 1, "seconds": 5.0, "tokens_per_second": 8 / 5.0},
        {"rows": 2, "seconds": 3.0, "tokens_per_second": 8 / 3.0},
    ]


def test_our_side_is_read_from_a_record_of_the_same_work_and_device(tmp_path):
    path = tmp_path / "ragged.json"
    device = f"{jax.devices()[0].device_kind} x {len(jax.devices())}"
    tokens = int(rollout_cases.ragged(is_tiny=True).limits.sum())
    record = {"record": "rollout_ragged", "device": device, "raw": {"tokens": tokens}}
    path.write_text(json.dumps(record))
    assert rollout_against.ragged_record(path, "tiny") == {"tokens": tokens}
    for change in ({"device": "another x 1"}, {"raw": {"tokens": tokens + 1}}):
        path.write_text(json.dumps(record | change))
        with pytest.raises(SystemExit, match="must be a record of"):
            rollout_against.ragged_record(path, "tiny")
