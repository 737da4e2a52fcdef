"""The lines of docs/serve_and_evaluate.md, run as they stand but for names, address and key."""

import json
import pathlib
import re
import subprocess

from prism_jax.commands.serve import main
from tests.commands.serve import running

_PAGE = pathlib.Path(__file__).parents[3] / "docs" / "serve_and_evaluate.md"


def _blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", _PAGE.read_text(), re.S)


def test_the_curl_lines_of_the_page_are_answered(server):
    answers = []
    for block in _blocks("bash"):
        if "curl" not in block:
            continue
        line = block[block.index("curl") :].replace("NAME", "policy")
        line = line.replace("http://127.0.0.1:8000", server.url)
        line = line.replace("curl -s", f"curl -s -H 'authorization: Bearer {running.KEY}'")
        line = line.replace('"max_tokens": 64', '"max_tokens": 4')
        done = subprocess.run(
            ["bash", "-c", line], cwd=server.folder, capture_output=True, check=True, timeout=120
        )
        answers.append(json.loads(done.stdout))
    chat, score = answers
    assert chat["usage"]["completion_tokens"] == 4
    assert score["format_ok"] and set(score["scores"]) == {"caption", "cot"}


def test_the_python_lines_of_the_page_stream_two_responses(server, capsys):
    (block,) = _blocks("python")
    block = block.replace("http://127.0.0.1:8000", server.url).replace("NAME", "policy")
    exec(block.replace('api_key="none"', f"api_key={running.KEY!r}"), {})
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines if line[:2] in ("0 ", "1 ")} == {"0", "1"}


def test_the_page_names_options_as_they_are_and_their_defaults():
    options = {a.option_strings[-1]: a for a in main.parser()._actions if a.option_strings}
    page = _PAGE.read_text().split("### Throughput")[0]
    for name, value in re.findall(r"(--[a-z_]+)(?:=([0-9.]+)\b)?", page):
        assert name in options, name
        if value and name != "--tensor":
            assert str(options[name].default) == value, name
