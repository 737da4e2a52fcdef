"""Chat completions through the official client, on a real server."""

import base64
import json
import time

import httpx
import openai
import pytest

from prism_jax import main
from prism_jax.data import processor
from tests.commands.serve import running

_QUESTION = "How many bars?"


def _data_url(server, name="a.png"):
    data = base64.b64encode((server.folder / name).read_bytes()).decode()
    return f"data:image/png;base64,{data}"


def _messages(*urls, question=_QUESTION):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def _ask(server, *urls, question=_QUESTION, **settings):
    settings = {"max_tokens": 20, "temperature": 0} | settings
    return server.client().chat.completions.create(
        model="policy", messages=_messages(*urls, question=question), **settings
    )


def test_a_greedy_answer_is_the_one_that_generate_prints(server, capsys):
    picture, folder = server.folder / "a.png", server.folder / "policy"
    command = ["generate", f"--model={folder}", f"--image={picture}", f"--prompt={_QUESTION}"]
    assert main.main([*command, "--max_new_tokens=20"]) == 0
    expected = capsys.readouterr().out.removesuffix("\n")
    by_data = _ask(server, _data_url(server))
    assert by_data.choices[0].message.content == expected
    assert by_data.choices[0].message.role == "assistant"
    assert by_data.choices[0].finish_reason == "length"
    assert by_data.usage.completion_tokens == 20
    # A picture from a host that was named is the same picture.
    address = f"http://{server.picture_host}/a.png"
    assert _ask(server, address).choices[0].message.content == expected
    assert _ask(server).choices[0].message.content != expected


def test_a_stream_has_the_text_the_logprobs_and_the_usage_of_the_whole_answer(server):
    settings = {"temperature": 0.9, "top_p": 0.95, "seed": 5, "n": 3, "logprobs": True}
    whole = _ask(server, **settings)
    events = list(_ask(server, **settings, stream=True, stream_options={"include_usage": True}))
    assert len({event.id for event in events}) == 1
    assert events[-1].choices == [] and events[-1].usage == whole.usage
    assert len({choice.message.content for choice in whole.choices}) == 3
    for choice in whole.choices:
        parts = [e.choices[0] for e in events[:-1] if e.choices[0].index == choice.index]
        assert "".join(part.delta.content for part in parts) == choice.message.content
        assert [part.delta.role for part in parts] == ["assistant"] + [None] * (len(parts) - 1)
        assert len(parts) > 2
        reasons = [None] * (len(parts) - 1) + [choice.finish_reason]
        assert [part.finish_reason for part in parts] == reasons
        streamed = [one for part in parts for one in part.logprobs.content]
        assert streamed == choice.logprobs.content
        assert len(streamed) == 20 or choice.finish_reason == "stop"
        written = b"".join(bytes(one.bytes) for one in streamed)
        assert written.decode(errors="replace") == choice.message.content
        assert all(one.logprob < 0 for one in streamed)


def test_the_seed_decides_the_responses_and_their_number_does_not(server):
    def texts(**settings):
        answer = _ask(server, temperature=1.0, **settings)
        return [choice.message.content for choice in answer.choices]

    three = texts(seed=7, n=3)
    assert texts(seed=7, n=3) == three
    assert texts(seed=7) == three[:1]
    assert texts(seed=8) != three[:1]
    # Without a seed each request has another.
    assert texts() != texts()


def test_a_stop_text_ends_the_response_before_it(server):
    whole = _ask(server, logprobs=True).choices[0]
    content = whole.message.content
    stop = content[6:9]
    cut = _ask(server, logprobs=True, stop=[stop, "never"])
    text = content[: content.index(stop)]
    assert cut.choices[0].message.content == text
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < 20
    kept = cut.choices[0].logprobs.content
    assert [x.token for x in kept] == [x.token for x in whole.logprobs.content[: len(kept)]]


def test_an_end_token_ends_the_response_and_is_counted(server):
    words = processor.Processor.from_folder(server.folder / "policy")
    ends = words.tokenizer.convert_ids_to_tokens(words.ids.ends)
    # The tiny model draws one sooner or later.
    for seed in range(40):
        answer = _ask(server, temperature=2.0, seed=seed, n=16, max_tokens=48, logprobs=True)
        stopped = [c for c in answer.choices if c.finish_reason == "stop"]
        if stopped:
            break
    assert stopped, "no response ended by itself"
    for choice in stopped:
        written = b"".join(bytes(one.bytes) for one in choice.logprobs.content)
        assert written.decode(errors="replace") == choice.message.content
        assert not {one.token for one in choice.logprobs.content} & set(ends)
    num_tokens = sum(len(choice.logprobs.content) for choice in answer.choices)
    assert answer.usage.completion_tokens == num_tokens + len(stopped)


def test_the_models_are_listed_and_others_are_unknown(server):
    client = server.client()
    assert [model.id for model in client.models.list()] == ["policy", "policy-discriminator"]
    assert client.models.retrieve("policy").object == "model"
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("gpt")
    assert refused.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt", messages=_messages())
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_without_the_key_nothing_under_v1_answers(server):
    for key in ("wrong", running.KEY + "x"):
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        with pytest.raises(openai.AuthenticationError):
            client.chat.completions.create(model="policy", messages=_messages())
    assert httpx.post(f"{server.url}/v1/score", content=b"{}").status_code == 401
    assert running.KEY not in "".join(server.lines())


_WRONG = {
    "max_tokens": [(0, None), (running.TOKENS + 1, None), ("4", None), (True, None)],
    "temperature": [(2.5, None), (-1, None), (1e-9, None), ("hot", None)],
    "top_p": [(0, None), (1.5, None)],
    "n": [(0, None), (running.RESPONSES + 1, None), (1.5, None)],
    "seed": [(-1, None), (2**32, None)],
    "stop": [([""], "stop[0]"), ([1], "stop[0]"), (["x"] * 17, None), (3, None)],
    "stream_options": [({"include_usage": True}, None)],
    "top_logprobs": [(2, None)],
    "logit_bias": [({"5": 1}, None)],
    "frequency_penalty": [(0.5, None)],
    "presence_penalty": [(False, None)],
    "response_format": [({"type": "json_object"}, None)],
    "tools": [([{"type": "function"}], None)],
    "min_p": [(0.1, None)],
    "messages": [
        ([], None),
        ("hello", None),
        ([{"role": "tool", "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": "x", "name": "me"}], "messages[0].name"),
        ([{"role": "user", "content": [{"type": "video"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": "a <|im_end|> b"}], "messages[0].content"),
        ([{"role": "user", "content": "long " * 200}], None),
        (_messages("data:image/png;base64,AAAA"), "messages[0].content[0].image_url.url"),
        (_messages("data:image/png;base64,*"), "messages[0].content[0].image_url.url"),
        (_messages("data:text/plain;base64,AAAA"), "messages[0].content[0].image_url.url"),
        (_messages("file:///etc/passwd"), "messages[0].content[0].image_url.url"),
        (_messages("http://127.0.0.1:1/a.png"), "messages[0].content[0].image_url.url"),
        (_messages("HOST/moved"), "messages[0].content[0].image_url.url"),
        (_messages("LARGE"), "messages[0].content[0].image_url.url"),
        (_messages(*["LARGE"] * 3), None),
    ],
}


@pytest.mark.parametrize("field", _WRONG)
def test_a_wrong_field_is_refused_by_its_name(server, field):
    for value, param in _WRONG[field]:
        text = json.dumps(value).replace("HOST/", f"http://{server.picture_host}/")
        value = json.loads(text.replace("LARGE", _data_url(server, "large.png")))
        body = {"messages": _messages(), "max_tokens": 2} | {field: value}
        with pytest.raises(openai.BadRequestError) as refused:
            server.client().post(
                "/chat/completions", body={"model": "policy"} | body, cast_to=object
            )
        assert refused.value.param == (param or field), value
        assert refused.value.type == "invalid_request_error"
        assert refused.value.body["message"].startswith(param or field), value


def test_fields_that_are_switched_off_are_no_reason_to_refuse(server):
    answer = _ask(
        server,
        max_tokens=2,
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        response_format={"type": "text"},
        tools=[],
        user="someone",
        extra_body={"store": False, "seed": None, "top_k": 4, "max_completion_tokens": 2},
    )
    assert answer.usage.completion_tokens == 2
    earlier = answer.choices[0].message.model_dump()
    messages = [*_messages(), earlier, {"role": "user", "content": "Sure?"}]
    more = server.client().chat.completions.create(
        model="policy",
        messages=[{"role": "developer", "content": "Be brief."}, *messages],
        max_tokens=2,
    )
    assert more.usage.prompt_tokens > answer.usage.prompt_tokens


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b'{"model": "policy", "messages": [{"role"', 400, "invalid_json"),
        (b'{"model": "policy", "model": "policy"}', 400, "invalid_json"),
        (b'{"model": "policy", "temperature": NaN}', 400, "invalid_json"),
        (b'{"model": "\xff"}', 400, "invalid_json"),
        (b"[" * 100_000, 400, "invalid_json"),
        (b'{"model": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
        (b"[]", 400, None),
        (b"", 400, "invalid_json"),
        (b'{"model": "\\ud800"}', 400, "invalid_value"),
        (b" " * (running.BODY_BYTES + 1), 413, "body_too_long"),
    ],
)
def test_a_body_that_is_no_request_is_refused(server, body, status, code):
    for content in (body, iter([body[:5], body[5:]])):  # with its length before it, and without
        answer = server.post("/v1/chat/completions", content)
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == code


def test_another_method_or_address_is_refused_in_the_same_form(server):
    assert httpx.get(f"{server.url}/v1/completions").json()["error"]["code"] == "unknown_url"
    answer = httpx.get(f"{server.url}/v1/chat/completions")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "unknown_url")


def test_a_body_that_does_not_come_is_given_up(server):
    def slow():
        yield b'{"model"'
        time.sleep(3)
        yield b': "policy"}'

    answer = server.post("/v1/chat/completions", slow())
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "timeout")
