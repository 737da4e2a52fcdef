"""RLVR's algorithms on the closed problem: each learns, and each field of theirs does something."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prism_jax import errors
from prism_jax.losses import advantage
from prism_jax.policy import batch as policy_batch
from prism_jax.policy import loss as policy_loss
from prism_jax.policy import update as policy_update
from prism_jax.rows import Continuation
from prism_jax.stages.rlvr import advantages as rlvr_advantages
from prism_jax.stages.rlvr import config as rlvr_config
from prism_jax.stages.rlvr import feed as rlvr_feed
from prism_jax.stages.rlvr import groups as rlvr_groups
from prism_jax.stages.rlvr import reference as rlvr_reference
from prism_jax.training import train_state
from tests.stages import rl_toy
from tests.stages.rlvr import changes as changes_lib

_ALGORITHMS = ("grpo", "dapo", "gspo", "dr_grpo", "cispo", "rloo", "reinforce++")


@pytest.mark.parametrize("name", _ALGORITHMS)
def test_each_algorithm_raises_the_reward(name):
    changes = {"rollout.num_responses": 8, "groups.max_generations": 3}
    if name != "dapo":
        del changes["groups.max_generations"]
    run = rl_toy.Run(rl_toy.options_of(name, changes))
    before = rl_toy.success(run.table)
    after = rl_toy.success(run.take(20).table)
    assert before < 0.3 and after > 0.6, (before, after)


_ONCE = {"train.num_minibatches": 1, "train.num_epochs": 1, "optim.eps": 1e-3}
_TRUNCATE = {"algorithm.sampler_weights": "truncate", "algorithm.sampler_high": 1.05}
_MASK = {
    "algorithm.sampler_weights": "mask",
    "algorithm.sampler_low": 0.8,
    "algorithm.sampler_high": 1.2,
}
_NORM = {"algorithm.aggregation": "seq-mean-token-sum-norm", "algorithm.norm_tokens": 4}
_LOSS_KL = {"reference.loss_coefficient": 1.0}

# Field -> algorithm, what is set before, what is changed. Every field of these sections is here.
_CHANGES = {
    "algorithm.loss": [("", {}, "gspo"), ("", {}, "cispo")],
    "algorithm.clip_low": [("", {}, 0.05)],
    "algorithm.clip_high": [("", {}, 0.05)],
    "algorithm.dual_clip": [("", {}, 1.001)],
    "algorithm.aggregation": [
        ("", {}, "seq-mean-token-mean"),
        ("", {}, "seq-mean-token-sum"),
        ("", {}, "official"),
    ],
    "algorithm.norm_tokens": [("", _NORM, 7)],
    "algorithm.sampler_weights": [("", _TRUNCATE, {**_MASK, "algorithm.sampler_high": 1.05})],
    "algorithm.sampler_level": [("", _TRUNCATE, "sequence"), ("", _MASK, "sequence")],
    "algorithm.sampler_low": [("", _MASK, 0.95)],
    "algorithm.sampler_high": [("", _TRUNCATE, 0.9), ("", _MASK, 1.05)],
    "advantage.kind": [("dr_grpo", {}, "rloo")],
    "advantage.eps": [("", {}, 1.0), ("reinforce++", {}, 1.0)],
    "advantage.discount": [("reinforce++", {}, 0.5)],
    "advantage.credit": [("", {}, "segment"), ("rloo", _ONCE, "segment_shared")],
    "overlong.buffer_tokens": [("", changes_lib.BUFFER, 4)],
    "overlong.penalty_factor": [("", changes_lib.BUFFER, 0.3)],
    "overlong.is_filtered": [("", {}, True)],
    "groups.keep": [("", changes_lib.REFILL, "reward")],
    "groups.generation_prompts": [("", changes_lib.REFILL, 6)],
    "groups.max_generations": [("", changes_lib.REFILL, 1)],
    "groups.surplus_steps": [("", changes_lib.REFILL_MORE, 0), ("", changes_lib.REFILL_MORE, 2)],
    "reference.loss_estimator": [("", _LOSS_KL, name) for name in ("k1", "k2", "k3+", "abs")],
    "reference.loss_coefficient": [("", _LOSS_KL, 0.5)],
    "reference.reward_estimator": [
        ("", changes_lib.REWARD_KL, name) for name in ("k2", "k3", "abs")
    ],
    "reference.reward_coefficient": [("", changes_lib.REWARD_KL, 0.5)],
    "reference.reward_target": [("", changes_lib.ADAPTED, 10.0)],
    "reference.reward_horizon": [("", changes_lib.ADAPTED, 40.0)],
    "train.num_minibatches": [("", {}, 1)],
    "train.num_epochs": [("", {}, 1)],
}
# They have tests of their own, here and in test_groups.py.
_ELSEWHERE = {"groups.when_short", "reference.folder"}


@functools.cache
def _learned(arg, changes):
    """Return the table after three steps with a sampler whose log-probs are a little wrong."""
    options = rl_toy.options_of(arg, changes_lib.SEVERAL | {"train.num_steps": 3} | dict(changes))
    reference = rl_toy.first_table(seed=1) if options.reference.is_used else None
    return rl_toy.Run(options, noise=0.2, reference=reference).take(3).table


@pytest.mark.parametrize("field", _CHANGES)
def test_every_field_changes_what_is_learned(field):
    for arg, before, value in _CHANGES[field]:
        base = _learned(arg, tuple(before.items()))
        assert np.isfinite(base).all()
        change = value if isinstance(value, dict) else {field: value}
        changed = _learned(arg, tuple((before | change).items()))
        assert np.abs(base - changed).max() > 1e-5, (arg, value)


def test_the_table_of_changes_has_every_field():
    sections = {
        "algorithm": policy_loss.Algorithm,
        "advantage": rlvr_config.Advantage,
        "overlong": rlvr_config.Overlong,
        "groups": rlvr_config.Groups,
        "reference": rlvr_config.Reference,
    }
    fields = {
        f"{name}.{field.name}"
        for name, section in sections.items()
        for field in dataclasses.fields(section)
    }
    assert fields | {"train.num_minibatches", "train.num_epochs"} == set(_CHANGES) | _ELSEWHERE


def _drawn(options, step=0):
    """Return what the first step of a run draws, as (prompt letter, tokens, told log-probs)."""
    key = jax.random.split(jax.random.fold_in(jax.random.key(0), step))[0]
    sampler = rl_toy.Sampler(num_responses=options.rollout.num_responses, noise=0.0)
    prompts = [rl_toy.prompt_of(index) for index in range(4)]
    params = train_state.split_model(rl_toy.Table(rl_toy.first_table()))[1]
    return prompts, sampler.prepare(params)(prompts, key)


def _terms_of(groups, drawn_by):
    """Return (prompt letter, tokens, log-probs under the policy that drew them, advantage) each."""
    terms = []
    for group in groups:
        totals = np.array([one.reward.total for one in group.responses])
        advantages = (totals - totals.mean()) / (totals.std(ddof=1) + 1e-6)
        for one, advantage_ in zip(group.responses, advantages, strict=True):
            letter = int(group.prompt.tokens[-1])
            lasts = [letter, *one.tokens[:-1]]
            logprobs = rl_toy.log_softmax(drawn_by[group.step])
            terms.append((letter, one.tokens, logprobs[lasts, one.tokens], advantage_))
    return terms


def _adam_by_hand(state, updates, rate):
    """Take AdamW steps (eps 1, no decay) on PPO's objective with the clip [0.8, 1.2]."""
    table = np.array(state.params["logits"][...], np.float64)
    adam = state.opt_state.inner["plain"]
    moments = [np.array(one["logits"], np.float64) for one in (adam.mu, adam.nu)]
    for count, terms in enumerate(updates, start=int(adam.count) + 1):
        gradient, logprobs = np.zeros_like(table), rl_toy.log_softmax(table)
        for last, tokens, old, advantage_ in terms:
            for token, old_logprob in zip(tokens, old, strict=True):
                ratio = np.exp(logprobs[last, token] - old_logprob)
                if advantage_ * ratio <= advantage_ * np.clip(ratio, 0.8, 1.2):
                    own = -np.exp(logprobs[last])
                    own[token] += 1
                    gradient[last] -= advantage_ * ratio * own
                last = token
        gradient /= sum(len(tokens) for _, tokens, _, _ in terms)
        moments[0] = 0.9 * moments[0] + 0.1 * gradient
        moments[1] = 0.999 * moments[1] + 0.001 * gradient**2
        first, second = moments[0] / (1 - 0.9**count), moments[1] / (1 - 0.999**count)
        table -= rate * first / (np.sqrt(second) + 1.0)
    return table


@pytest.mark.parametrize(("num_minibatches", "num_epochs", "rate"), [(1, 1, 20.0), (2, 2, 6.0)])
def test_updates_by_hand_have_the_ratio_to_the_policy_that_drew_each_group(
    monkeypatch, num_minibatches, num_epochs, rate
):
    changes = (
        changes_lib.SEVERAL
        | changes_lib.REFILL
        | {
            "groups.generation_prompts": 8,
            "optim.clip_norm": None,
            "optim.peak": rate,
            "train.num_minibatches": num_minibatches,
            "train.num_epochs": num_epochs,
        }
    )
    run = rl_toy.Run(rl_toy.options_of("", changes))
    fill, filled = rlvr_groups.fill, []
    monkeypatch.setattr(
        rlvr_groups, "fill", lambda *a, **k: filled.append(fill(*a, **k)) or filled[-1]
    )
    drawn_by, shares, bound = {}, [], []
    for step in range(1, 5):
        drawn_by[step], state = run.table, jax.device_get(run.state)
        run.take(1)
        groups = filled[-1].groups
        size = len(groups) // num_minibatches
        parts = [groups[number * size : (number + 1) * size] for number in range(num_minibatches)]
        updates = [_terms_of(part, drawn_by) for part in parts] * num_epochs
        np.testing.assert_allclose(run.table, _adam_by_hand(state, updates, rate), atol=1e-4)
        shares.append(run.rows[-1]["rollout/older_prompts_fraction"])
        bound.append(run.rows[-1]["policy/clip_fraction"])
        # This sampler's log-probs are exact; older responses, of another policy, do not count.
        assert run.rows[-1].get("policy/sampler_logprob_difference_max", 0.0) < 1e-5
    assert shares[0] == 0 and any(0 < share < 1 for share in shares), shares
    # Only what an older policy drew can be out of bounds before an update.
    assert max(bound) > 0.02
    assert num_epochs > 1 or all(
        share > 0 for share, part in zip(shares, bound, strict=True) if part
    )


def test_one_update_is_bit_for_bit_that_of_rows_with_advantages_and_asks_no_other_forward():
    options = rl_toy.options_of("", {})
    run = rl_toy.Run(options)
    prompts, drawn = _drawn(options)
    totals = np.float32([rl_toy.reward_of(s.text, s.ended).total for s in drawn.segments])
    prompt_id = np.repeat(np.arange(4, dtype=np.int32), 4)
    advantages = jax.jit(lambda r, p: advantage.grpo(r, p, num_groups=4, eps=1e-6))
    batch = policy_update.on_policy_batch(
        prompts, drawn, np.asarray(advantages(totals, prompt_id)), run.shape, run.model
    )
    update = policy_update.make_update(
        options.algorithm,
        policy_update.settings(options.train, options.rollout, options.model, rl_toy.devices()),
        run.model,
        run.optimizer,
        rl_toy.START,
        run.shape,
    )
    state, _ = update(run.state, batch, jax.random.key(0))
    other = rl_toy.Run(options)
    other.experience.packer._logprobs = None  # would fail if it were called
    other.take(1)
    np.testing.assert_array_equal(other.table, np.asarray(state.params["logits"][...]))
    assert other.rows[0]["policy/approx_kl"] == 0
    assert other.rows[0]["policy/clip_fraction"] == 0


def test_the_first_of_several_updates_has_ratio_one_and_skips_are_counted_once():
    run = rl_toy.Run(rl_toy.options_of("", {"train.num_epochs": 2, "optim.peak": 1e-9})).take(2)
    for row in run.rows:
        assert abs(row["policy/approx_kl"]) < 1e-6
        assert row["optim/skipped_updates"] == row["optim/skipped_in_row"] == 0
    assert int(run.state.step) == 4


def test_the_counts_of_skipped_updates_are_the_last_and_the_largest():
    changes = {"train.num_epochs": 3, "reference.loss_coefficient": 1.0}
    broken = np.full((rl_toy.NUM_TOKENS,) * 2, np.nan, np.float32)
    run = rl_toy.Run(rl_toy.options_of("", changes), reference=broken).take(2)
    counts = [(r["optim/skipped_updates"], r["optim/skipped_in_row"]) for r in run.rows]
    assert counts == [(3, 3), (6, 6)]


def test_released_means_are_those_of_each_row_weighted_by_its_responses():
    options = rl_toy.options_of("", {"algorithm.aggregation": "official"})
    run = rl_toy.Run(options, table=rl_toy.first_table())
    _, drawn = _drawn(options)
    lengths = drawn.rollout.lengths
    places = policy_batch.packed_responses(
        [rl_toy.prompt_of(index) for index in range(4)],
        [
            Continuation(prompt=number // 4, tokens=drawn.rollout.tokens[number, :length])
            for number, length in enumerate(lengths)
        ],
        [drawn.rollout.logprobs[number, :length] for number, length in enumerate(lengths)],
        run.shape,
        run.model.config,
    ).places
    rows = np.array([place.row for place in places])
    assert len(set(rows)) > 1
    totals = np.float32([rl_toy.reward_of(s.text, s.ended).total for s in drawn.segments])
    prompt_id = jnp.repeat(jnp.arange(4), 4)
    values = np.asarray(advantage.grpo(jnp.asarray(totals), prompt_id, num_groups=4, eps=1e-6))
    expected = 0.0
    for row in set(rows):
        own = rows == row
        mean = -(values * lengths)[own].sum() / lengths[own].sum()
        expected += mean * own.sum() / len(rows)
    np.testing.assert_allclose(run.take(1).rows[0]["policy/loss"], expected, rtol=1e-4)


def test_without_a_coefficient_no_reference_is_loaded_and_the_loss_has_no_term():
    options = rl_toy.options_of("", {}).reference
    assert rlvr_reference.open_reference(options, None, None, None) is None
    assert set(policy_loss.coefficients(options.loss)) == {policy_loss.TERM}
    run = rl_toy.Run(rl_toy.options_of("", {}))
    parts, _ = run.experience(run.state, next(run.feed), jax.random.key(0))
    assert [(part.reference_logprobs, part.old_logprobs) for part in parts] == [(None, None)]


def test_against_the_policy_itself_both_kls_are_zero_and_change_nothing_but_rounding():
    plain = rl_toy.Run(rl_toy.options_of("", {})).take(1)
    changes = _LOSS_KL | {"reference.reward_coefficient": 1.0}
    run = rl_toy.Run(rl_toy.options_of("", changes), reference=rl_toy.first_table()).take(1)
    assert abs(run.rows[0]["policy/reference_kl"]) < 1e-6
    assert abs(run.rows[0]["reward/reference_kl"]) < 1e-6
    np.testing.assert_allclose(run.table, plain.table, atol=1e-3)


def test_the_kl_in_the_reward_is_taken_off_token_by_token():
    options = rl_toy.options_of("", changes_lib.ADAPTED)
    old = np.log(np.float32([[0.5, 0.25, 1.0], [0.5, 1.0, 1.0], [0.25, 0.5, 0.5]]))
    reference = np.log(np.float32([[0.25, 0.25, 1.0], [0.25, 1.0, 1.0], [0.25, 0.5, 0.25]]))
    lengths = np.int32([2, 1, 3])
    compare = rlvr_advantages.Comparison(
        dataclasses.replace(options.advantage, kind="dr_grpo", eps=None),
        options.reference,
        options.overlong,
        num_groups=1,
        max_response_tokens=3,
    )
    compared = compare(
        np.float32([1.0, 0.0, 0.5]),
        np.int32([0, 0, 0]),
        lengths,
        distance=rlvr_advantages.Distance(
            old_logprobs=old, reference_logprobs=reference, coefficient=0.5
        ),
    )
    log2 = np.log(2.0)
    penalised = np.array([1.0 - 0.5 * log2, -0.5 * log2, 0.5 - 0.5 * log2])
    np.testing.assert_allclose(compared.advantages, penalised - penalised.mean(), atol=1e-6)
    mean_kl = (log2 / 2 + log2 + log2 / 3) / 3
    assert compared.metrics["reward/reference_kl"].value == pytest.approx(mean_kl, rel=1e-5)
    # mean_kl / 0.01 - 1 is clipped at 0.2; three responses of a horizon of 20.
    assert compared.next_coefficient == pytest.approx(0.5 * (1 + 0.2 * 3 / 20), rel=1e-6)


def test_reinforce_plus_plus_has_one_advantage_a_response_without_discount():
    options = rl_toy.options_of("reinforce++", {})
    compare = rlvr_advantages.Comparison(
        options.advantage,
        options.reference,
        options.overlong,
        num_groups=2,
        max_response_tokens=3,
    )
    compared = compare(np.float32([1.0, 0.0]), np.int32([0, 1]), np.int32([1, 3]), distance=None)
    # Over four tokens: mean 0.25, variance with ddof 1 is 0.25.
    np.testing.assert_allclose(compared.advantages, [[1.5, 0, 0], [-0.5, -0.5, -0.5]], atol=1e-5)


def test_filtered_responses_teach_nothing_but_are_compared():
    changes = {"overlong.is_filtered": True}
    run = rl_toy.Run(rl_toy.options_of("", changes))
    (part,), told = run.experience(run.state, next(run.feed), jax.random.key(1))
    plain = rl_toy.Run(rl_toy.options_of("", {}))
    (whole,), _ = plain.experience(plain.state, next(plain.feed), jax.random.key(1))
    is_kept, is_there = np.asarray(part.lengths) > 0, np.asarray(whole.lengths) > 0
    share = 1 - is_kept.sum() / is_there.sum()
    assert 0 < share < 1
    assert told["rollout/filtered_fraction"].value == pytest.approx(share)
    np.testing.assert_array_equal(np.asarray(part.advantages), np.asarray(whole.advantages))
    np.testing.assert_array_equal(
        np.asarray(part.lengths)[is_kept], np.asarray(whole.lengths)[is_kept]
    )


def test_a_resumed_run_refuses_another_reference_policy():
    def feed(reference):
        return rlvr_feed.Feed(
            rl_toy.Prompts(4),
            num_prompts=4,
            is_refilled=False,
            coefficient=None,
            is_adapted=False,
            reference=reference,
            decode=rl_toy.decode,
        )

    saved = feed("a").get_state()
    feed("a").set_state(saved)
    for other in ("b", None):
        with pytest.raises(errors.InputError, match="the reference policy was a"):
            feed(other).set_state(saved)


@pytest.mark.parametrize(
    ("arg", "changes", "told"),
    [
        ("rloo", {"train.num_epochs": 2}, "must have a ratio"),
        ("", {"train.num_minibatches": 3}, "must divide into train.num_minibatches = 3"),
        ("", {"groups.keep": "accuracy"}, "generation_prompts must be None exactly when"),
        ("", {"groups.surplus_steps": 1}, "surplus_steps must be None exactly when"),
        ("", {"overlong.buffer_tokens": 2}, "both or none must be given"),
        (
            "",
            changes_lib.BUFFER | {"overlong.buffer_tokens": 5},
            "overlong.buffer_tokens must be <=",
        ),
        ("", {"reference.folder": "x"}, "folder must be None without a coefficient"),
        ("", {"reference.reward_target": 0.1}, "reward_target and reward_horizon"),
        ("", {"advantage.discount": 1.0}, "discount must be given for reinforce"),
        ("", {"algorithm.sampler_high": 2.0}, "sampler_high must be given for"),
        ("", {"algorithm.sampler_low": 0.5}, "sampler_low must be given for"),
        ("", {"algorithm.dual_clip": 1.0}, "dual_clip must be > 1"),
        ("", changes_lib.REFILL | {"rollout.num_responses": 1}, "num_responses must be >= 2"),
        ("rloo", changes_lib.REFILL, "surplus_steps must be 0 or None for the loss reinforce"),
    ],
)
def test_what_does_not_fit_together_is_refused(arg, changes, told):
    with pytest.raises(errors.InputError, match=told):
        rl_toy.options_of(arg, changes)
