"""The panel beside a warm-up: each evaluation and each panel after its own steps."""

import types

from prism_jax.honesty import panel as honesty_panel
from prism_jax.stages.warmup import honesty as warmup_honesty
from tests.honesty import constructed


class _Feed:
    """A feed whose held-out pairs are told apart by their length."""

    names = constructed.SEGMENTS

    def __init__(self):
        self.asked = []

    def held_out_pairs(self, num_rows):
        self.asked.append(("held out", num_rows))
        return constructed.pairs(longer=1)

    def probe_pairs(self, num_rows):
        self.asked.append(("learned from", num_rows))
        pairs = constructed.pairs(longer=1)
        return {name: pairs.at(pairs.of(name)).probed() for name in constructed.SEGMENTS}


class _Scoring:
    def discriminator(self, params):
        assert params == "params"
        return constructed.discriminator(constructed.length)


def _beside(feed, *, evaluate_every_steps, every_steps, evaluate=lambda state, step: {"eval/x": 1}):
    return warmup_honesty.beside(
        evaluate,
        feed,
        _Scoring(),
        honesty_panel.Options(every_steps=every_steps, num_pairs=5),
        evaluate_every_steps=evaluate_every_steps,
        num_steps=10,
    )


def test_the_warm_up_evaluates_and_measures_each_after_its_own_steps(capsys):
    feed, state = _Feed(), types.SimpleNamespace(params="params")
    both = _beside(feed, evaluate_every_steps=4, every_steps=6)
    assert warmup_honesty.every_steps(4, 6) == 2
    found = {step: both(state, step) for step in (2, 4, 6, 8, 10)}
    assert [step for step, told in found.items() if "eval/x" in told] == [4, 8, 10]
    assert [step for step, told in found.items() if "honesty/num_pairs" in told] == [6, 10]
    # Probes are fitted once, on pairs that are learned from; num_pairs are asked about.
    assert [what for what, _ in feed.asked] == ["learned from", "held out", "held out"]
    assert feed.asked[1] == ("held out", 5) and found[6]["honesty/num_pairs"] == 5
    assert capsys.readouterr().err.count("WARNING: caption: the length alone") == 2


def test_a_panel_that_is_off_reads_nothing_and_leaves_the_evaluation_as_it_is(capsys):
    feed = _Feed()

    def evaluate(state, step):
        return {}

    off = _beside(feed, evaluate_every_steps=4, every_steps=None, evaluate=evaluate)
    assert off is evaluate and feed.asked == []
    assert warmup_honesty.every_steps(4, None) == 4
    assert warmup_honesty.every_steps(None, 6) == 6
    assert warmup_honesty.every_steps(None, None) is None
    assert _beside(feed, evaluate_every_steps=4, every_steps=6, evaluate=None) is None
    assert "no pairs are held out" in capsys.readouterr().err
