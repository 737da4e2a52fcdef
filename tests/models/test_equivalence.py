"""The model against itself: packing, remat, experts, prefill and decoding give the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import inputs
from tests.models import cases, ours

_ALL = [
    e for name in ("rows_of_different_length", "a_video", "text_alone") for e in cases.ROWS[name]
]


def _hidden(case: str, batch: cases.Batch, **options) -> np.ndarray:
    graphdef, params = ours.model(case, **options)

    @jax.jit
    def run(params, batch):
        built = nnx.merge(graphdef, params)
        return built(batch.text, batch.vision, implementation="xla", remat="none")[0]

    return np.asarray(run(params, batch))


def _config(case: str):
    graphdef, params = ours.model(case)
    return nnx.merge(graphdef, params).config


@pytest.mark.parametrize("case", ["dense_untied_3_levels_head72", "moe_untied"])
def test_packed_rows_equal_unpacked_rows(case):
    config = _config(case)
    alone = _hidden(case, cases.batch([[e] for e in _ALL], config))
    packed_rows = [_ALL[:3], _ALL[3:]]
    packed = _hidden(case, cases.batch(packed_rows, config, row_tokens=100))
    number = 0
    for row, examples in enumerate(packed_rows):
        start = 0
        for example in examples:
            length = len(example.tokens)
            np.testing.assert_allclose(
                packed[row, start : start + length], alone[number, :length], atol=2e-5
            )
            start += length
            number += 1


def test_two_vision_rows_equal_one():
    case = "dense_tied_2_levels_head64"
    config = _config(case)
    rows = [[e] for e in cases.ROWS["rows_of_different_length"] + cases.ROWS["one_image"]]
    one = cases.batch(rows, config)
    options = {"config": config, "num_vision_rows": 2}
    two = cases.Batch(
        text=inputs.pack_text(rows, row_tokens=one.text.tokens.shape[1], max_segments=8, **options),
        vision=inputs.pack_vision(rows, row_patches=80, max_segments=8, **options),
    )
    assert two.vision.pixels.shape[0] == 2
    shown = one.text.segments.ids > 0
    np.testing.assert_allclose(_hidden(case, two)[shown], _hidden(case, one)[shown], atol=2e-5)


def test_uint8_pixels_equal_the_normalised_ones():
    case = "dense_tied_2_levels_head64"
    config = _config(case)
    raw = np.random.default_rng(0).integers(0, 256, (24, 96), dtype=np.uint8)
    example = cases.ROWS["one_image"][0]
    found = []
    for pixels in (raw, ((raw / 255 - 0.5) / 0.5).astype(np.float32)):
        row = [[cases.dataclasses.replace(example, pixels=[pixels])]]
        found.append(_hidden(case, cases.batch(row, config)))
    np.testing.assert_allclose(found[0], found[1], atol=2e-5)


@pytest.mark.parametrize("remat", ["full", "save_attention", "save_attention_and_dots"])
def test_remat_changes_no_gradient(remat):
    case, rows = "dense_untied_3_levels_head72", cases.ROWS["rows_of_different_length"]
    kept = ours.forward(case, rows, "remat")
    again = ours.forward(case, rows, "remat", remat=remat)
    for name, value in kept["gradients"].items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(again["gradients"][name], value, atol=1e-5 * scale, err_msg=name)


def test_ragged_experts_equal_dense_experts_with_gradients():
    case, rows = "moe_tied_8_experts", cases.ROWS["rows_of_different_length"]
    dense = ours.forward(case, rows, "moe")
    ragged = ours.forward(case, rows, "moe", moe_implementation="ragged")
    np.testing.assert_allclose(ragged["logits"], dense["logits"], atol=1e-4)
    for name, value in dense["gradients"].items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(
            ragged["gradients"][name], value, atol=1e-4 * scale, err_msg=name
        )


def test_a_padded_place_never_reaches_a_token():
    case = "dense_tied_2_levels_head64"
    config = _config(case)
    rows = [[e] for e in cases.ROWS["rows_of_different_length"]]
    short = cases.batch(rows, config)
    long = cases.batch(rows, config, row_tokens=64)
    shown = np.asarray(short.text.segments.ids > 0)
    length = short.text.tokens.shape[1]
    np.testing.assert_allclose(
        _hidden(case, long)[:, :length][shown], _hidden(case, short)[shown], atol=2e-5
    )


@pytest.mark.parametrize("case", ["dense_untied_3_levels_head72", "moe_untied"])
def test_cached_decoding_equals_the_full_forward(case):
    config = _config(case)
    graphdef, params = ours.model(case)
    built = nnx.merge(graphdef, params)
    extra = np.random.default_rng(1).integers(1, 180, (3, 5)).astype(np.int32)
    prompts = cases.ROWS["rows_of_different_length"]
    extra[1, 2] = cases.IMAGE  # a placeholder's id in a response is a word like any other
    whole = [inputs.continued(e, more) for e, more in zip(prompts, extra, strict=True)]
    full = _hidden(case, cases.batch([[e] for e in whole], config))
    batch = cases.batch([[e] for e in prompts], config)
    built.text.unstack()

    @jax.jit
    def prefill(built, batch):
        images = built.encode_images(batch.vision, implementation="xla", remat=False)
        return built.prefill(batch.text, images, implementation="xla", cache_length=48)

    step = jax.jit(lambda built, *a: built.decode_step(*a, implementation="xla"))
    hidden, cache = prefill(built, batch)
    for number in range(5):
        for row, prompt in enumerate(prompts):
            np.testing.assert_allclose(
                hidden[row], full[row, len(prompt.tokens) - 1 + number], atol=3e-5
            )
        hidden, cache = step(built, jnp.asarray(extra[:, number]), cache)
    assert step._cache_size() == 1
