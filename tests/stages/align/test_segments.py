"""Alignment's segments in rows: what is equal is scored once."""

import jax.numpy as jnp
import numpy as np
import pytest

from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.stages.align import advantages as align_advantages
from tests.stages import discriminator_probes as probes
from tests.stages import rl_run

_CAPTION, _OTHER = "<caption>\na 7\n</caption>\n", "<caption>\na 1\n</caption>\n"
_COT = "<think>\nso\n</think>\n<answer>\n7\n</answer>"
# Four responses to each prompt: two are equal, a third has their caption alone.
_TEXTS = (_CAPTION + _COT, _CAPTION + _COT.replace("so", "no"), _CAPTION + _COT, _OTHER + _COT)


@pytest.fixture(scope="module")
def laid(tmp_path_factory):
    folder = rl_run.write(tmp_path_factory.mktemp("align_segments"))
    options = probes.options("align", folder, {})
    workdir = tmp_path_factory.mktemp("workdir")
    *_, packed, places = probes.packed_segments(options, folder, workdir, _TEXTS)
    return options, packed, places


def test_equal_segments_of_a_prompt_share_a_place_and_no_others_do(laid):
    options, packed, places = laid
    num_prompts = options.rollout.num_prompts
    caption = places["caption"].student.reshape(num_prompts, 4)
    cot = places["cot"].student.reshape(num_prompts, 4)
    for row in range(num_prompts):
        assert caption[row, 0] == caption[row, 1] == caption[row, 2] != caption[row, 3]
        assert cot[row, 0] == cot[row, 2] == cot[row, 3] != cot[row, 1]
    used = [places[name].teacher for name in places] + [caption, cot]
    # Two captions and two cots of each prompt, and the teacher's two.
    assert len(np.unique(np.concatenate([one.ravel() for one in used]))) == 6 * num_prompts
    assert np.asarray(packed.batch.is_segment).sum() == 6 * num_prompts
    assert len(np.unique(caption)) == len(np.unique(cot)) == 2 * num_prompts


def test_equal_responses_have_equal_advantages_and_none_where_all_are_equal(laid):
    options, packed, places = laid
    scores = np.random.default_rng(0).normal(size=packed.batch.is_segment.shape)
    found = discriminator_loss.scores_at(jnp.asarray(scores, jnp.float32), places)
    size = options.rollout.num_prompts * 4
    advantages = align_advantages.make_advantages(options)(
        found, jnp.ones(size, bool), jnp.ones(size, jnp.float32)
    )
    rows = np.asarray(advantages).reshape(-1, 4)
    np.testing.assert_array_equal(rows[:, 0], rows[:, 2])
    assert (rows[:, 0] != rows[:, 1]).all()


def test_a_shared_score_is_pulled_by_all_that_share_it(laid):
    options, packed, places = laid
    rule = _rule(options)
    scores = np.random.default_rng(1).normal(size=packed.batch.is_segment.shape)
    scores = jnp.asarray(scores, jnp.float32)
    pulled, _ = discriminator_loss.gradients(scores, places, rule)
    each, _ = discriminator_loss.gradients_by_name(
        discriminator_loss.scores_at(scores, places), rule
    )
    flat = np.asarray(pulled).ravel()
    for name, one in places.items():
        for place in np.unique(one.student):
            wanted = np.asarray(each[name].student)[one.student == place].sum()
            np.testing.assert_allclose(flat[place], wanted, rtol=1e-5)


def _rule(options):
    own = options.discriminator
    return discriminator_loss.PairRule(
        score_clip=own.score_clip,
        regulariser=own.regulariser,
        router=0.0,
        length_beta=(),
        microbatch_pairs=None,
        all_invalid="none",
        score_dtype="float32",
    )
