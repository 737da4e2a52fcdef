"""Several data sets of prompts in one run: which rows a step takes, and how they are told apart."""

import collections
import importlib
import json

import numpy as np
import pytest

from prism_jax import configuration, errors
from prism_jax.data import packing, processor
from prism_jax.setup import prompt_mixture
from prism_jax.setup import prompts as prompts_lib
from prism_jax.stages.rlvr import config as rlvr_config
from tests import tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    tiny_checkpoint.write(folder / "model")
    for name, count in (("a", 6), ("b", 3)):
        rows = [{"id": str(n), "prompt": f"{name}{n}?", "answer": "7"} for n in range(count)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "bad.jsonl").write_text(json.dumps({"id": "x", "prompt": "", "answer": "7"}) + "\n")
    return folder


def _options(folder, *names, **changes):
    config = importlib.import_module("configs.rlvr").get_config("tiny,new")
    config.model.folder = str(folder / "model")
    config.prompts.path = tuple(str(folder / f"{name}.jsonl") for name in names)
    config.prompts.update(changes)
    return configuration.parse(rlvr_config.Config, config).prompts


def _open(folder, options, workdir=None):
    words = processor.Processor.from_folder(folder / "model")
    return prompts_lib.open_prompts(
        options.path, options, words, need_teacher=False, need_answer=True, folder=workdir
    )


def _texts(opened, *, weights, num_steps, seed=0):
    found = prompt_mixture.index_steps(
        opened,
        lambda indices: [opened.rows[index].prompt[-1].content for index in indices],
        weights=weights,
        num_prompts=3,
        num_steps=num_steps,
        seed=seed,
        num_threads=2,
    )
    return [text for step in found for text in step]


def test_rows_of_several_files_count_on_and_keep_their_sizes(folder):
    both = _open(folder, _options(folder, "a", "b"))
    alone = [_open(folder, _options(folder, name)) for name in "ab"]
    assert both.lengths == (6, 3)
    assert [both.rows[n].prompt[-1].content for n in range(9)] == [
        *(f"a{n}?" for n in range(6)),
        *(f"b{n}?" for n in range(3)),
    ]
    assert both.sizes == [*alone[0].sizes, *alone[1].sizes]
    assert len({both.digest, *(one.digest for one in alone)}) == 3
    with pytest.raises(IndexError):
        both.rows[9]


def test_without_weights_every_row_stands_once_in_an_epoch(folder):
    opened = _open(folder, _options(folder, "a", "b"))
    texts = _texts(opened, weights=(), num_steps=6)
    for epoch in (texts[:9], texts[9:]):
        assert sorted(epoch) == sorted(opened.rows[n].prompt[-1].content for n in range(9))
    assert texts[:9] != texts[9:]


def test_one_file_is_taken_in_the_order_it_always_was(folder):
    opened = _open(folder, _options(folder, "a"))
    order = [packing.epoch_order([6], [], seed=5, epoch=epoch) for epoch in range(2)]
    assert _texts(opened, weights=(), num_steps=4, seed=5) == [
        f"a{n}?" for n in np.concatenate(order)
    ]


def test_weights_share_out_the_steps_and_each_file_goes_round(folder):
    opened = _open(folder, _options(folder, "a", "b"))
    texts = _texts(opened, weights=(1.0, 2.0), num_steps=12)
    counts = collections.Counter(texts)
    # 36 prompts: 12 of the six of a, 24 of the three of b.
    assert counts == {f"a{n}?": 2 for n in range(6)} | {f"b{n}?": 8 for n in range(3)}


def test_other_weights_are_another_position(folder):
    opened = _open(folder, _options(folder, "a", "b"))

    def begun(weights):
        return prompt_mixture.index_steps(
            opened, list, weights=weights, num_prompts=3, num_steps=4, seed=0, num_threads=1
        )

    one = begun((1.0, 2.0))
    second = [next(one), next(one)][1]
    state = one.get_state()
    again = begun((1.0, 2.0))
    again.set_state(state | {"next_step": 1})
    assert next(again) == second
    with pytest.raises(errors.InputError):
        begun((1.0, 3.0)).set_state(state)
    with pytest.raises(errors.InputError):
        begun(()).set_state(state)


def test_max_rows_and_bad_rows_count_for_each_data_set(folder, tmp_path):
    assert _open(folder, _options(folder, "a", "b", max_rows=2)).lengths == (2, 2)
    with pytest.raises(errors.InputError, match=r"bad: 1 of 1 rows are wrong.*max_bad_rows is 0"):
        _open(folder, _options(folder, "a", "bad"), tmp_path)
    [line] = (tmp_path / "dropped_prompts.jsonl").read_text().splitlines()
    assert json.loads(line)["file"].endswith("bad.jsonl")


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0), (1.0, -1.0), (1.0, 1.0, 1.0)])
def test_weights_must_be_one_positive_number_a_data_set(folder, weights):
    with pytest.raises(errors.InputError, match=r"config\.prompts\.weights must be empty or hold"):
        _options(folder, "a", "b", weights=weights)


def test_a_weight_that_gives_no_row_is_refused(folder):
    opened = _open(folder, _options(folder, "a", "b"))
    with pytest.raises(errors.InputError, match=r"config\.prompts\.weights .* \[9, 0\] rows"):
        _texts(opened, weights=(99.0, 1.0), num_steps=1)


def test_fewer_prompts_than_a_step_takes_are_refused_by_both_names(folder):
    opened = _open(folder, _options(folder, "a", "b"))
    prompt_mixture.require(opened, 9, field="rollout.num_prompts")
    with pytest.raises(errors.InputError, match=r"a \+ b: config\.rollout\.num_prompts .* 9 rows"):
        prompt_mixture.require(opened, 10, field="rollout.num_prompts")
