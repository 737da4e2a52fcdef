"""The end of a server; this file comes last in the folder, since one server serves all files."""

import signal
import sys

import httpx

from prism_jax import main
from tests.commands.serve import running


def test_wrong_options_are_refused_before_anything_is_loaded(server, capsys, tmp_path):
    (tmp_path / "key").write_text("short")
    (tmp_path / "two").write_text("two words of a key")
    host, port = server.address
    for options, message in (
        ([], "serve needs --model, --discriminator or both"),
        (["--model=x", "--num_slots=0"], "--num_slots must be between 1 and 65536, got 0"),
        (["--model=x", "--max_responses=999"], "--max_responses must be between 1 and 272"),
        (["--model=x", f"--api_key_file={tmp_path / 'key'}"], "between 8 and 4096 ASCII"),
        (["--model=x", f"--api_key_file={tmp_path / 'two'}"], "the key must be one word"),
        (["--model=x", f"--api_key_file={tmp_path / 'none'}"], "none: no such file"),
        (["--model=x", "--image_host=http://a"], "--image_host must be HOST or HOST:PORT"),
        (["--model=x", f"--host={host}", f"--port={port}"], "Address already in use"),
        (["--model=x", "--port=0"], "x is not a folder"),
        ([f"--model={server.folder / 'score'}", "--port=0"], "a policy is needed"),
    ):
        assert main.main(["serve", *options]) == 2, options
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
        assert "two words" not in error


def test_without_its_packages_the_command_says_how_to_install_them(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "prism_jax.commands.serve.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main.main(["serve", "--model=x"]) == 2
    assert "uvicorn: pip install 'prism-jax[serve]'" in capsys.readouterr().err


def test_sigterm_answers_what_is_open_and_leaves_with_143(server):
    with server.client() as client:
        stream = client.chat.completions.create(
            model="policy",
            messages=[{"role": "user", "content": "How many?"}],
            max_tokens=running.TOKENS,
            temperature=1.0,
            seed=0,
            n=16,
            stream=True,
        )
        events = iter(stream)
        choices = [next(events).choices[0]]
        server.process.send_signal(signal.SIGTERM)
        choices += [event.choices[0] for event in events]
    assert sorted(c.index for c in choices if c.finish_reason) == list(range(16))
    assert server.process.wait(60) == 143
    assert "Traceback" not in "".join(server.lines())
    try:
        httpx.get(f"{server.url}/health")
    except httpx.ConnectError:
        return
    raise AssertionError("the server still listens")
