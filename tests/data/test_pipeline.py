"""Batches: a fixed order, each row once an epoch, and exact resume for any number of processes."""

import collections

import grain
import numpy as np
import pytest

from prism_jax import errors
from prism_jax.data import build, pipeline, sources, validate
from tests import data_files

ROWS = list(range(23))


def make(rows=None, **changes) -> pipeline.Batches:
    arguments = {
        "seed": 3,
        "batch_rows": 4,
        "transform": lambda row: row,
        "process_index": 0,
        "process_count": 1,
        "num_epochs": 2,
        "num_threads": 2,
    } | changes
    rows = ROWS if rows is None else rows
    mixture = rows if isinstance(rows[0], pipeline.Weighted) else [part("a", rows)]
    return pipeline.make(mixture, **arguments)


def part(name: str, rows, weight=None) -> pipeline.Weighted:
    return pipeline.Weighted(name=name, rows=rows, weight=weight)


def flat(batches) -> list:
    return [row for batch in batches for row in batch]


def test_an_epoch_draws_every_row_once_and_the_next_in_another_order():
    drawn = flat(make(batch_rows=1))
    assert sorted(drawn[:23]) == sorted(drawn[23:]) == ROWS
    assert drawn[:23] != drawn[23:]
    assert drawn[:23] != ROWS


def test_the_order_depends_on_the_seed_alone():
    first = flat(make(batch_rows=1))
    assert flat(make(batch_rows=1)) == first
    assert flat(make(batch_rows=1, num_threads=5)) == first
    other = flat(make(batch_rows=1, seed=4))
    assert other[:23] not in (first[:23], first[23:])
    assert flat(make(batch_rows=2)) == first


def test_without_a_seed_the_rows_keep_their_order():
    assert flat(make(seed=None, num_epochs=1)) == ROWS[:20]


def test_only_the_rows_at_the_very_end_are_dropped():
    # 2 epochs of 23 rows: 11 batches of 4 and 2 rows over.
    assert len(list(make())) == 11
    endless = make(num_epochs=None)
    assert [len(next(endless)) for _ in range(40)] == [4] * 40


def test_the_transform_sees_rows_and_its_values_are_not_stacked():
    batch = next(make(transform=lambda row: {"x": np.arange(row), "row": [row]}))
    assert isinstance(batch, list)
    assert all(len(value["x"]) == value["row"][0] for value in batch)


def test_an_error_of_the_transform_ends_the_iteration():
    def refuse(row):
        raise errors.InputError(f"row {row}")

    with pytest.raises(errors.InputError, match="row "):
        next(make(transform=refuse))


class Restartable:
    """What Grain's check needs: a fresh iterator each time."""

    def __init__(self, **arguments):
        self.arguments = arguments

    def __iter__(self):
        return make(**self.arguments)


@pytest.mark.parametrize("process_count", [1, 2])
def test_every_state_restores_exactly(process_count):
    grain.experimental.assert_equal_output_after_checkpoint(
        Restartable(process_index=process_count - 1, process_count=process_count)
    )


def test_a_mixture_restores_exactly():
    mixture = [part("a", ROWS, 2.0), part("b", [-1, -2, -3], 1.0)]
    grain.experimental.assert_equal_output_after_checkpoint(Restartable(rows=mixture))


def shares(count: int, **arguments) -> list[pipeline.Batches]:
    return [make(process_index=i, process_count=count, **arguments) for i in range(count)]


@pytest.mark.parametrize("count", [2, 4])
def test_processes_together_draw_the_batches_of_one(count):
    whole = list(make())
    together = list(zip(*shares(count), strict=True))
    assert len(together) == len(whole)
    for batch, parts in zip(whole, together, strict=True):
        assert all(len(rows) == 4 // count for rows in parts)
        assert [parts[i % count][i // count] for i in range(4)] == batch


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (2, 4), (4, 2)])
def test_a_run_continues_with_another_number_of_processes(before, after):
    whole = list(make())
    first = shares(before)
    for _ in range(5):
        states = [next(share) and share.get_state() for share in first]
    assert all(state == states[0] for state in states)
    second = shares(after)
    for share in second:
        share.set_state(states[0])
    rest = [sorted(flat(parts)) for parts in zip(*second, strict=True)]
    assert rest == [sorted(batch) for batch in whole[5:]]


def test_the_state_is_json_with_one_position():
    batches = make()
    for _ in range(3):
        next(batches)
    assert batches.get_state() == {
        "next_row": 12,
        "version": 1,
        "batch_rows": 4,
        "seed": 3,
        "sources": [["a", 23, None]],
    }


def test_the_end_is_a_state_like_any_other():
    batches = make()
    list(batches)
    again = make()
    again.set_state(batches.get_state())
    assert list(again) == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_rows": 2}, "batch_rows was 4 .* is 2"),
        ({"seed": 9}, "seed was 3 .* is 9"),
        ({"rows": ROWS[:-1]}, "sources was .*23.* is .*22"),
        ({"rows": [part("b", ROWS)]}, "sources was"),
        ({"rows": [part("a", ROWS, 1.0)]}, "sources was"),
    ],
)
def test_a_state_of_other_data_is_refused_with_both_values(changes, named):
    state = make().get_state()
    with pytest.raises(errors.InputError, match=f"cannot resume: data {named}"):
        make(**changes).set_state(state)


def test_sources_without_weights_are_joined():
    mixture = [part("a", ROWS[:10]), part("b", ROWS[10:])]
    assert sorted(flat(make(mixture, batch_rows=1, num_epochs=1))) == ROWS


@pytest.mark.parametrize("seed", [None, 0, 5])
def test_weights_hold_in_every_stretch_of_the_mixture(seed):
    mixture = [
        part("a", [("a", i) for i in range(50)], 3),
        part("b", [("b", i) for i in range(9)], 1),
    ]
    drawn = flat(make(mixture, batch_rows=1, num_epochs=10, seed=seed))
    assert len(drawn) == 590
    for start in range(0, 580, 20):
        counts = collections.Counter(name for name, _ in drawn[start : start + 20])
        assert counts == {"a": 15, "b": 5}
    # A source repeats by itself: all its rows before any comes again.
    small = [i for name, i in drawn if name == "b"]
    for start in range(0, 135, 9):
        assert sorted(small[start : start + 9]) == list(range(9))


def test_sources_of_a_mixture_are_shuffled_independently():
    mixture = [
        part("a", [("a", i) for i in range(20)], 1),
        part("b", [("b", i) for i in range(20)], 1),
    ]
    drawn = flat(make(mixture, batch_rows=1, num_epochs=1))
    orders = [[i for name, i in drawn if name == wanted] for wanted in "ab"]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_rows": 24}, "23 rows for batches of 24"),
        ({"batch_rows": 0}, "batch_rows must be >= 1"),
        ({"process_count": 3}, "multiple of the 3 processes, got 4"),
        ({"num_epochs": 0}, "num_epochs"),
        ({"seed": -1}, "seed"),
        ({"rows": [part("a", ROWS, 1.0), part("b", ROWS)]}, "weights"),
        ({"rows": [part("a", ROWS, 1.0), part("b", ROWS, 0.0)]}, "weights"),
        ({"rows": [part("a", ROWS, 1.0), part("b", [], 1.0)]}, "b: .* got 0 rows"),
    ],
)
def test_wrong_arguments_are_refused(changes, named):
    with pytest.raises(errors.InputError, match=named):
        make(**changes)


def test_no_source_is_refused():
    with pytest.raises(errors.InputError, match="at least one source"):
        pipeline.make(
            [],
            seed=0,
            batch_rows=1,
            transform=lambda row: row,
            process_index=0,
            process_count=1,
            num_epochs=1,
            num_threads=1,
        )


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_files_and_the_built_folder_give_the_same_batches(tmp_path, ending):
    rows = [data_files.sft_row(i) for i in range(9)]
    data_files.write_images(tmp_path, 9)
    path = tmp_path / f"rows.{ending}"
    if ending == "jsonl":
        data_files.write_lines(path, rows)
    else:
        data_files.write_parquet(path, rows, group_rows=2)
    raw = sources.Source(kind="sft", path=str(path))
    built = sources.Source(kind="sft", path=str(tmp_path / "built"))
    build.build(raw, built.path, validate.Rules())
    first, second = (
        list(make(sources.open_source(s, validate.Rules(), cache_dir=None).rows, num_threads=4))
        for s in (raw, built)
    )
    assert first == second
    assert len(first) == 4
