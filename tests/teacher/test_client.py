"""The client of a chat endpoint: every way of misbehaving ends in a bounded number of attempts."""

import datetime
import json
import threading
import time

import pytest

from prism_jax import errors
from prism_jax.teacher import client, reply
from tests import fake_teacher

_KEY = "sk-secret/0123456789+abcdef"
_BODY = b'{"messages": [{"role": "user", "content": "What number 7?"}]}'


def _client(server, *, stop=None, **changes) -> client.Client:
    patience = {
        "deadline_seconds": 5.0,
        "max_attempts": 3,
        "backoff_seconds": 0.01,
        "max_wait_seconds": 2.0,
    }
    return client.Client(
        server.base_url,
        key=_KEY,
        patience=client.Patience(**(patience | changes)),
        stop=threading.Event() if stop is None else stop,
    )


def _ask(asking: client.Client) -> reply.Reply:
    return asking.ask(_BODY, unusable=lambda usage: None)


def _parse(body) -> reply.Reply:
    return reply.parse(json.dumps(body).encode())


def _then_right(*actions):
    """Return a script: these actions one after the other, then right answers."""

    def script(asked):
        if asked.number < len(actions):
            return actions[asked.number]
        return fake_teacher.right(asked)

    return script


def _always(action):
    return lambda asked: action


_EMPTY = fake_teacher.completion("", choices=[])
_PASSING = {
    "429": (fake_teacher.error(429, "slow down"), "rate_limited"),
    "500": (fake_teacher.error(500, "oops"), "server_error"),
    "503 without JSON": (fake_teacher.send(503, b"<html>"), "server_error"),
    "reset": (fake_teacher.reset, "connection"),
    "hang up": (fake_teacher.hang_up, "connection"),
    "cut off": (fake_teacher.cut_off, "connection"),
    "no JSON": (fake_teacher.send(200, b"<html>all is well</html>"), "malformed"),
    "half a JSON": (fake_teacher.send(200, b'{"choices": [{"mess'), "malformed"),
    "not UTF-8": (fake_teacher.send(200, b'{"choices": "\xff"}'), "malformed"),
    "a list": (fake_teacher.send(200, []), "malformed"),
    "deep": (fake_teacher.send(200, b"[" * 200_000), "malformed"),
    "no choices": (fake_teacher.send(200, _EMPTY), "no_choices"),
    "null choices": (fake_teacher.send(200, {"choices": None}), "no_choices"),
    "no message": (fake_teacher.send(200, {"choices": [{}]}), "no_choices"),
    "no content": (fake_teacher.say(None), "no_choices"),
    "an error as 200": (fake_teacher.error(200, "overloaded"), "no_choices"),
}


@pytest.mark.parametrize("name", _PASSING)
def test_a_transient_failure_is_retried_and_counted(name):
    action, event = _PASSING[name]
    with fake_teacher.serve(_then_right(action)) as server:
        asking = _client(server)
        received = _ask(asking)
        assert len(server.asked) == 2
    assert received.text == fake_teacher.response(7)
    assert received.usage == reply.Usage(input_tokens=100, output_tokens=50)
    assert {k: v for k, v in asking.counts().items() if v} == {event: 1, "reply": 1}


@pytest.mark.parametrize("action", [fake_teacher.hang, fake_teacher.drip])
def test_a_request_ends_at_its_deadline_whatever_trickles_in(action):
    with fake_teacher.serve(_then_right(action)) as server:
        asking = _client(server, deadline_seconds=0.4)
        begun = time.monotonic()
        _ask(asking)
        assert time.monotonic() - begun < 3
    assert asking.counts()["timeout"] == 1


@pytest.mark.parametrize("name", ["500", "reset", "no JSON", "no choices"])
def test_attempts_are_bounded(name):
    action, event = _PASSING[name]
    with fake_teacher.serve(_always(action)) as server:
        asking = _client(server)
        with pytest.raises(client.FailedError, match=event):
            _ask(asking)
        assert len(server.asked) == 3
    assert asking.counts()[event] == 3


def test_nobody_at_the_address_is_a_failure_of_connection():
    with fake_teacher.serve(fake_teacher.right) as server:
        asking = _client(server)
    with pytest.raises(client.FailedError, match="connection"):
        _ask(asking)


class _Waits(threading.Event):
    """Note waits instead of waiting."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def wait(self, timeout=None):
        self.seconds.append(timeout)
        return False


def test_waits_double_up_to_the_longest_and_are_spread():
    waits = _Waits()
    with fake_teacher.serve(_always(fake_teacher.error(500, "oops"))) as server:
        asking = _client(
            server, stop=waits, max_attempts=6, backoff_seconds=1.0, max_wait_seconds=6.0
        )
        with pytest.raises(client.FailedError):
            _ask(asking)
    received = [seconds for seconds in waits.seconds if seconds > 0]
    assert len(received) == 5  # none after the last attempt
    for seconds, longest in zip(received, (1, 2, 4, 6, 6), strict=True):
        assert longest / 2 <= seconds <= longest
    assert received[3] != received[4]


def test_every_thread_waits_as_long_as_the_endpoint_asks():
    limited = fake_teacher.error(429, "slow down", {"Retry-After": "1"})
    with fake_teacher.serve(_then_right(limited)) as server:
        asking = _client(server)
        first = threading.Thread(target=_ask, args=(asking,))
        first.start()
        while asking.counts()["rate_limited"] == 0:
            time.sleep(0.005)
        _ask(asking)
        first.join()
        times = [asked.seconds for asked in server.asked]
    assert len(times) == 3
    assert min(times[1:]) - times[0] >= 1


def test_a_wait_beyond_the_longest_ends_the_job():
    limited = fake_teacher.error(429, "daily quota", {"Retry-After": "86400"})
    with fake_teacher.serve(_always(limited)) as server:
        with pytest.raises(client.FatalError, match=r"daily quota: .* 86400 s"):
            _ask(_client(server))
        assert len(server.asked) == 1


def test_a_wait_ends_when_the_job_stops():
    stop = threading.Event()
    with fake_teacher.serve(_always(fake_teacher.error(500, "oops"))) as server:
        asking = _client(server, stop=stop, backoff_seconds=60.0, max_wait_seconds=60.0)
        threading.Timer(0.2, stop.set).start()
        begun = time.monotonic()
        with pytest.raises(client.StoppedError):
            _ask(asking)
        assert time.monotonic() - begun < 10


_NOW = datetime.datetime(2026, 5, 1, 12, 0, 0, tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        ("Fri, 01 May 2026 12:00:30 GMT", 30.0),
        ("Fri, 01 May 2026 11:00:00 GMT", 0.0),
        ("soon", None),
        ("nan", None),
        ("1e999", None),
        ("Mon, 99999999999999999999 Nov 1994 08:49:37 GMT", None),
        ("Sun, 06 Nov 0001 08:49:37 +9999", None),
        ("Fri, 31 Dec 9999 23:59:59 -9959", None),
        (", , ,", None),
        ("\0", None),
        (None, None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value, seconds):
    assert client.retry_after_seconds(value, _NOW) == seconds


def test_an_address_that_is_no_hosts_is_fatal():
    address = "http://a..b/v1"
    patience = client.Patience(
        deadline_seconds=5.0, max_attempts=3, backoff_seconds=0.01, max_wait_seconds=2.0
    )
    asked = client.Client(address, key=None, patience=patience, stop=threading.Event())
    with pytest.raises(client.FatalError):
        _ask(asked)


def test_lone_surrogates_are_marked_and_invalid_counts_left_out():
    usage = {"prompt_tokens": 10**400, "completion_tokens": 2}
    received = _parse(fake_teacher.completion("x", model="m\ud800", usage=False) | {"usage": usage})
    assert (received.model, received.usage) == ("m?", None)
    assert reply.message_of({"error": {"message": "no \udfff"}}) == "no ?"


@pytest.mark.parametrize("status", [400, 403, 413, 422])
def test_a_refused_request_is_not_repeated(status):
    with fake_teacher.serve(_always(fake_teacher.error(status, "too large"))) as server:
        asking = _client(server)
        with pytest.raises(client.RefusedError, match=str(status)):
            _ask(asking)
        assert len(server.asked) == 1
    assert asking.counts()["refused"] == 1


@pytest.mark.parametrize("status", [301, 307, 401, 402, 404])
def test_what_no_request_can_pass_is_fatal_and_redirections_are_not_followed(status):
    with fake_teacher.serve(fake_teacher.right) as other:
        action = fake_teacher.error(status, "no", {"Location": other.base_url})
        with fake_teacher.serve(_always(action)) as server:
            with pytest.raises(client.FatalError, match=str(status)):
                _ask(_client(server))
            assert len(server.asked) == 1
        assert other.asked == []


@pytest.mark.parametrize("status", [400, 401, 403, 429, 500])
def test_no_error_repeats_the_key_that_an_endpoint_echoes(status):
    with fake_teacher.serve(_always(fake_teacher.echo_key(status))) as server:
        with pytest.raises(Exception, match=str(status)) as caught:
            _ask(_client(server))
        assert server.asked[0].headers["Authorization"] == f"Bearer {_KEY}"
    texts = "".join(map(str, (caught.value, caught.value.__cause__)))
    assert _KEY not in texts
    assert "sk-secret" not in texts


def test_a_reply_that_repeats_the_key_is_blanked_out():
    text = fake_teacher.response(7, think=f"The key is {_KEY}.")
    with fake_teacher.serve(_always(fake_teacher.say(text, model=_KEY))) as server:
        received = _ask(_client(server))
    assert received.text == fake_teacher.response(7, think="The key is [key].")
    assert received.model == "[key]"


def test_the_usage_of_a_reply_without_text_is_reported():
    paid = []
    with fake_teacher.serve(_then_right(fake_teacher.send(200, _EMPTY))) as server:
        _client(server).ask(_BODY, unusable=paid.append)
    assert paid == [reply.Usage(input_tokens=100, output_tokens=50)]


def test_the_key_is_read_from_the_environment_and_is_in_no_message(monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", f" {_KEY}\n")
    assert client.read_key("TEACHER_KEY", place="config.teacher.endpoint") == _KEY
    assert client.read_key("", place="config.teacher.endpoint") is None
    monkeypatch.setenv("TEACHER_KEY", "two words-of-a-key")
    # The last one is a key in place of a name.
    for variable in ("TEACHER_KEY", "NO_SUCH_VARIABLE", "sk-secret"):
        with pytest.raises(errors.InputError) as caught:
            client.read_key(variable, place="config.teacher.endpoint")
        assert "words-of-a-key" not in str(caught.value)
        assert "sk-secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("base_url", "message"),
    [
        ("api.example.com/v1", "http"),
        ("file:///etc/passwd", "http"),
        ("https://user:sk-secret@api.example.com", "user"),
        ("https://api.example.com/v1?key=sk-secret", "query"),
        ("http://api.example.com/v1", "https://"),
        ("https://api.example.com:99999/v1", "PORT"),
    ],
)
def test_addresses_that_would_leak_a_key_are_refused_without_repeating_them(base_url, message):
    problem = client.problem_of(base_url, has_key=True)
    assert message in problem
    assert "sk-secret" not in problem


def test_plain_http_is_for_this_machine_or_without_a_key():
    assert client.problem_of("http://127.0.0.1:8000/v1", has_key=True) is None
    assert client.problem_of("http://node7:8000/v1", has_key=False) is None
    assert client.problem_of("https://api.example.com/v1", has_key=True) is None


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}, (5, 7)),
        # Hidden reasoning that only the total counts.
        ({"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 40}, (5, 35)),
        ({"prompt_tokens": 5, "completion_tokens": 7}, (5, 7)),
        ({"prompt_tokens": 5}, None),
        ({"prompt_tokens": -5, "completion_tokens": True}, None),
        (None, None),
    ],
)
def test_hidden_reasoning_is_part_of_the_output(usage, expected):
    body = fake_teacher.completion("text") | {"usage": usage}
    counted = _parse(body).usage
    assert (None if counted is None else (counted.input_tokens, counted.output_tokens)) == expected


def test_text_in_parts_is_joined_and_withheld_replies_are_recognised():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert _parse(fake_teacher.completion(parts)).text == "ab"
    assert _parse(fake_teacher.completion(None, finish="content_filter")).finish == "filter"
    assert _parse(fake_teacher.completion(None, finish="length")).finish == "length"
    assert _parse(fake_teacher.completion("a", finish="STOP")).finish == "stop"
