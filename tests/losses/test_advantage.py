"""Advantages: recorded cases of six alignment modes, GRPO and overlong penalty; others by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from prism_jax.losses import advantage

EPS = 1e-6
WEIGHTS = ("caption_weight", "cot_weight")
# The parameters of a recorded case that each function reads; the released names of two differ.
READS = {
    "align": (*WEIGHTS, "format_penalty"),
    "acc_gating": (*WEIGHTS, "align_coef", "wrong_penalty", "format_penalty"),
    "gated_align": (*WEIGHTS, "align_coef", "wrong_penalty", "format_penalty"),
    "rlvr": (*WEIGHTS, "align_coef", "w_acc", "w_fmt"),
    "rlvr_v2": (*WEIGHTS, "align_coef", "w_acc", "w_fmt", "wrong_penalty", "format_penalty"),
    "sign_align": (*WEIGHTS, "align_coef", "w_acc", "w_fmt", "wrong_penalty", "format_penalty"),
}
NAMES = {"w_acc": "accuracy_weight", "w_fmt": "format_weight"}
FUNCTIONS = {
    "align": advantage.align,
    "acc_gating": advantage.acc_gating,
    "gated_align": advantage.gated_align,
    "rlvr": advantage.rlvr,
    "rlvr_v2": advantage.rlvr_v2,
    "sign_align": advantage.sign_align,
}
OPTIONS = {
    "caption_weight": 0.5,
    "cot_weight": 0.25,
    "align_coef": 2.0,
    "w_acc": 0.8,
    "w_fmt": 0.2,
    "wrong_penalty": 0.3,
    "format_penalty": 1.5,
}


def pad(values, num_rows, fill=0.0):
    return jnp.asarray(list(values) + [fill] * (num_rows - len(values)), jnp.float32)


def group_ids(names, num_rows):
    """Number the groups; each padding row is a group of its own."""
    order = sorted(set(names))
    ids = [order.index(name) for name in names]
    return jnp.asarray(ids + list(range(len(order), len(order) + num_rows - len(ids))), jnp.int32)


def call(mode, scores, options):
    chosen = {NAMES.get(k, k): options[k] for k in READS[mode] if k not in WEIGHTS}
    chosen["weights"] = {"caption": options["caption_weight"], "cot": options["cot_weight"]}
    num_groups = scores.prompt_id.shape[0]
    return FUNCTIONS[mode](scores, num_groups=num_groups, eps=EPS, **chosen)


def scores_of(prompt_id, caption, cot, format_ok, accuracy):
    return advantage.AlignmentScores(
        prompt_id=jnp.array(prompt_id),
        by_segment={"caption": jnp.array(caption), "cot": jnp.array(cot)},
        format_ok=jnp.array(format_ok, bool),
        accuracy=None if accuracy is None else jnp.array(accuracy),
    )


def test_every_oracle_case_gives_the_six_alignment_advantages(oracle):
    cases = oracle("align_advantage.json")
    num_rows = max(len(case["prompt_id"]) for case in cases)
    for index, case in enumerate(cases):
        size = len(case["prompt_id"])
        fields = (case["caption_score"], case["cot_score"], case["format_ok"], case["accuracy"])
        caption, cot, format_ok, accuracy = (pad(field, num_rows) for field in fields)
        scores = scores_of(
            group_ids(case["prompt_id"], num_rows), caption, cot, format_ok > 0, accuracy
        )
        assert set(case["advantage"]) == {*FUNCTIONS, "align_without_accuracy"}
        for mode, expected in case["advantage"].items():
            given = scores
            if mode == "align_without_accuracy":
                mode, given = (
                    "align",
                    scores_of(scores.prompt_id, caption, cot, format_ok > 0, None),
                )
            got = call(mode, given, case["params"])
            np.testing.assert_allclose(
                got[:size], expected, rtol=0, atol=1e-4, err_msg=f"case {index} {mode}"
            )


def test_every_oracle_case_gives_grpo_and_dr_grpo(oracle):
    cases = oracle("grpo_advantage.json")
    num_rows = max(len(case["prompt_id"]) for case in cases)
    for index, case in enumerate(cases):
        size = len(case["prompt_id"])
        ids, rewards = group_ids(case["prompt_id"], num_rows), pad(case["reward"], num_rows)
        got = {
            "std": advantage.grpo(rewards, ids, num_groups=num_rows, eps=EPS),
            "mean_only": advantage.dr_grpo(rewards, ids, num_groups=num_rows),
        }
        assert set(case["advantage"]) == set(got)
        for name, expected in case["advantage"].items():
            np.testing.assert_allclose(
                got[name][:size], expected, rtol=0, atol=1e-4, err_msg=f"case {index} {name}"
            )


def test_every_oracle_case_gives_the_overlong_penalty(oracle):
    for case in oracle("overlong_penalty.json"):
        got = advantage.overlong_penalty(
            jnp.array([case["response_tokens"]]),
            max_response_tokens=case["max_response_tokens"],
            buffer_tokens=case["buffer_tokens"],
            factor=case["factor"],
        )
        np.testing.assert_allclose(got, [case["penalty"]], rtol=1e-6)
        assert got <= 0


def test_groups_of_equal_scores_have_advantage_zero_exactly():
    # A plain float32 mean of three times 0.9 is not 0.9, and the error is near the size of eps.
    values, ids = jnp.full(7, 0.9), jnp.array([0, 1, 1, 1, 0, 1, 0])
    for got in (
        advantage.grpo(values, ids, num_groups=2, eps=EPS),
        advantage.dr_grpo(values, ids, num_groups=2),
        advantage.rloo(values, ids, num_groups=2),
    ):
        assert not got.any()


def test_a_group_of_one_keeps_its_reward():
    values, ids = jnp.array([0.8, -2.0]), jnp.array([3, 1])
    np.testing.assert_allclose(
        advantage.grpo(values, ids, num_groups=5, eps=0.0), values, rtol=1e-6
    )
    np.testing.assert_allclose(advantage.dr_grpo(values, ids, num_groups=5), values)
    np.testing.assert_allclose(advantage.rloo(values, ids, num_groups=5), values)


def test_rloo_subtracts_the_mean_of_the_others():
    got = advantage.rloo(jnp.array([1.0, 0.0, 0.5]), jnp.array([0, 0, 0]), num_groups=1)
    np.testing.assert_allclose(got, [1 - 0.25, 0 - 0.75, 0.5 - 0.5], atol=1e-6)


def test_advantages_follow_their_rows_when_the_batch_is_shuffled():
    values = jnp.array([1.0, 0.2, 0.0, 0.4, 3.0, 2.0])
    ids, order = jnp.array([0, 0, 0, 1, 1, 1]), jnp.array([3, 0, 5, 1, 4, 2])
    straight = advantage.grpo(values, ids, num_groups=2, eps=EPS)
    shuffled = advantage.grpo(values[order], ids[order], num_groups=2, eps=EPS)
    np.testing.assert_allclose(shuffled, straight[order], rtol=1e-6)


def test_reinforce_plus_plus_whitens_over_all_unmasked_tokens():
    token_rewards = jnp.array([[0.0, 1.0, jnp.nan], [0.0, 0.0, 3.0]])
    mask = jnp.array([[1, 1, 0], [1, 1, 1]], bool)
    returns = np.array([0.5, 1.0, 0.75, 1.5, 3.0])
    expected = (returns - returns.mean()) / returns.std(ddof=1)
    got = advantage.reinforce_plus_plus(token_rewards, mask, discount=0.5, eps=1e-8)
    np.testing.assert_allclose(got[mask], expected, rtol=1e-5)
    assert not got[~mask].any()


def test_an_all_invalid_group_has_only_the_penalty():
    scores = scores_of([0, 0], [5.0, -5.0], [1.0, 2.0], [0, 0], [1.0, 0.0])
    np.testing.assert_allclose(call("align", scores, OPTIONS), [-1.5, -1.5])
    np.testing.assert_allclose(call("gated_align", scores, OPTIONS), [-1.5, -1.5])


def test_an_invalid_response_is_not_penalised_as_wrong_too():
    scores = scores_of([0, 0], [1.0, 0.0], [1.0, 0.0], [1, 0], [1.0, 0.0])
    np.testing.assert_allclose(call("gated_align", scores, OPTIONS)[1], -1.5)


def test_sign_align_lowers_a_wrong_response_the_more_the_discriminator_likes_it():
    scores = scores_of([0, 0, 0], [3.0, 0.0, -1.0], [3.0, 0.0, -1.0], [1, 1, 1], [0.0, 0.0, 1.0])
    got = call("sign_align", scores, OPTIONS)
    assert got[0] < got[1]


def test_scores_of_invalid_responses_are_ignored():
    given = [
        scores_of([0, 0, 0], [1.0, 2.0, x], [0.0, 1.0, x], [1, 1, 0], [1.0, 0.0, 0.0])
        for x in (0.0, 1e4)
    ]
    for mode in FUNCTIONS:
        np.testing.assert_array_equal(*(call(mode, scores, OPTIONS) for scores in given))


def test_every_option_of_every_alignment_advantage_has_an_effect():
    scores = scores_of(
        [0, 0, 0, 0],
        [1.0, 2.0, 0.0, -1.0],
        [0.5, -1.0, 0.0, 2.0],
        [1, 1, 0, 1],
        [1.0, 0.0, 1.0, 1.0],
    )
    for mode, names in READS.items():
        base = call(mode, scores, OPTIONS)
        for name in names:
            changed = call(mode, scores, OPTIONS | {name: OPTIONS[name] + 0.7})
            assert float(jnp.abs(base - changed).max()) > 1e-3, (mode, name)


def test_a_missing_accuracy_is_refused_where_it_is_read():
    scores = scores_of([0, 0], [1.0, 2.0], [0.0, 1.0], [1, 1], None)
    for mode in set(FUNCTIONS) - {"align"}:
        with pytest.raises(ValueError, match="accuracy"):
            call(mode, scores, OPTIONS)


def test_a_whole_response_is_one_segment_and_weights_must_be_those_of_the_segments():
    scores = advantage.AlignmentScores(
        prompt_id=jnp.zeros(3, jnp.int32),
        by_segment={"response": jnp.array([1.0, 2.0, 3.0])},
        format_ok=jnp.ones(3, bool),
        accuracy=None,
    )
    shared = {"num_groups": 1, "eps": 0.0, "format_penalty": 1.5}
    got = advantage.align(scores, weights={"response": 2.0}, **shared)
    np.testing.assert_allclose(got, [-2.0, 0.0, 2.0])
    with pytest.raises(ValueError, match="response"):
        advantage.align(scores, weights={"caption": 1.0}, **shared)
