"""`/v1/score`: the discriminator's own scores of the segments of a response."""

import base64

import jax
import numpy as np
import openai
import pytest
from flax import nnx

from models import inputs, sharding
from prism_jax.checkpoints import pretrained
from prism_jax.data import chat, examples, images, processor
from tests.models import cases

_CAPTION = "<caption>A chart with four bars.</caption>"
_COT = "\n<think>The tallest bar is green.</think>\n<answer>12</answer>"


def _ask(server, **fields):
    url = (
        "data:image/png;base64," + base64.b64encode((server.folder / "a.png").read_bytes()).decode()
    )
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Sum?"}]
    body = {"model": "policy-discriminator", "messages": [{"role": "user", "content": parts}]}
    return server.client().post(
        "/score", body=body | {"response": _CAPTION + _COT} | fields, cast_to=object
    )


def _expected(folder, picture):
    """Return the scores of the model itself: a row for each segment, behind its prompt."""
    source = pretrained.Source.of(folder, role="discriminator")
    _, config = pretrained.config_of(folder)
    graphdef, params = pretrained.abstract(
        config,
        is_discriminator=True,
        rules=sharding.REPLICATED,
        dtype=np.float32,
        param_dtype=np.float32,
    )
    params = source.load(params, shardings=None, param_dtype=None)
    words = processor.Processor.from_folder(folder)
    turn = chat.turn("user", "Sum?", num_images=1)
    encoded = words.encode([turn], images=[images.open_image(picture)], add_generation_prompt=True)
    prompt = examples.from_encoded(encoded, words)
    (end,) = words.tokenizer.encode("<|im_end|>", add_special_tokens=False)
    rows = [
        [inputs.continued(prompt, np.array(tokens, np.int32))]
        for tokens in (words.token_ids(_CAPTION), [*words.token_ids(_COT), end])
    ]
    batch = cases.batch(rows, config)
    last = np.array([[len(row[0].tokens) - 1] for row in rows], np.int32)

    @jax.jit
    def score(params, batch, last):
        model = nnx.merge(graphdef, params)
        return model(batch.text, batch.vision, last, implementation="xla", remat="none")[0]

    return np.asarray(score(params, batch, last))[:, 0]


def test_the_scores_are_those_of_the_model(server):
    answer = _ask(server)
    assert (answer["object"], answer["view"], answer["format_ok"]) == ("score", "caption_cot", True)
    expected = _expected(server.folder / "score", server.folder / "a.png")
    scores = [answer["scores"]["caption"], answer["scores"]["cot"]]
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    assert abs(expected[0] - expected[1]) > 1e-3
    assert _ask(server) | {"id": 0, "created": 0} == answer | {"id": 0, "created": 0}


def test_a_malformed_response_has_no_scores(server):
    answer = _ask(server, response=_CAPTION)
    assert (answer["format_ok"], answer["scores"]) == (False, None)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"view": "pieces"}, "view"),
        ({"response": 3}, "response"),
        ({"response": "a <|im_end|>"}, "response"),
        (
            {"response": _CAPTION + "<think>" + "long " * 100 + "</think><answer>1</answer>"},
            "response",
        ),
        ({"temperature": 1}, "temperature"),
        ({"messages": None}, "messages"),
    ],
)
def test_a_wrong_field_is_refused_by_its_name(server, fields, param):
    with pytest.raises(openai.BadRequestError) as refused:
        _ask(server, **fields)
    assert refused.value.param == param
