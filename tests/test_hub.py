"""Addresses of the hub in arguments, against a hub on this machine."""

import hashlib
import http.server
import json
import pathlib
import subprocess
import sys
import threading
from typing import ClassVar

import pytest

from prism_jax import errors, hub
from tests import data_files

_BROKEN = b"cannot be read"


class _Hub(http.server.BaseHTTPRequestHandler):
    """The parts of the hub's API that a download of a repository uses."""

    repositories: ClassVar[dict[str, dict[str, bytes]]] = {}
    commit: ClassVar[str] = "a" * 40

    def do_GET(self):
        self._answer(has_body=True)

    def do_HEAD(self):
        self._answer(has_body=False)

    def _answer(self, *, has_body):
        path = self.path.split("?")[0]
        body, headers = self._found(path)
        self.send_response(200 if body is not None else 404)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if has_body:
            self.wfile.write(body or b"")

    def _found(self, path):
        for name, files in self.repositories.items():
            kind, _, repository = name.partition("/")
            listing = [{"rfilename": file} for file in files]
            api = f"/api/{kind}/{repository}"
            if path.startswith(f"{api}/revision/"):
                info = {"id": repository, "sha": self.commit, "siblings": listing}
                return json.dumps(info).encode(), {"Content-Type": "application/json"}
            if path.startswith(f"{api}/tree/"):
                tree = [
                    {"type": "file", "path": file, "size": len(data), "oid": _etag(data)}
                    for file, data in files.items()
                ]
                return json.dumps(tree).encode(), {"Content-Type": "application/json"}
            start = "" if kind == "models" else f"/{kind}"
            resolve = f"{start}/{repository}/resolve/"
            if path.startswith(resolve):
                data = files.get(path.removeprefix(resolve).partition("/")[2])
                if data != _BROKEN and data is not None:
                    return data, {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": self.commit}
        return None, {"X-Error-Code": "RepoNotFound"}

    def log_message(self, *_):
        pass


def _etag(data):
    return hashlib.sha1(data).hexdigest()


@pytest.fixture(scope="module")
def endpoint():
    lines = "\n".join(json.dumps(data_files.sft_row(i)) for i in range(2))
    _Hub.repositories = {
        "models/owner/tiny": {"config.json": b"{}", "weights.pt": b"pickle", "a/b.txt": b"text"},
        "datasets/owner/rows": {
            "train.jsonl": lines.encode(),
            "0.png": data_files.png(0),
            "1.png": data_files.png(1),
        },
    }
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def _run(endpoint, home, *arguments, **more):
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PATH": "/usr/bin:/bin"}
    environment |= {
        "PYTHONPATH": str(pathlib.Path(__file__).parents[1]),
        "HF_HUB_DISABLE_XET": "1",
    } | more
    return subprocess.run(
        [sys.executable, "-m", "prism_jax", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_data_set_of_the_hub_is_built_with_its_pictures_and_pickles_stay_there(
    endpoint, tmp_path
):
    build = ["data", "build", "--kind=sft", f"--to={tmp_path / 'built'}"]
    done = _run(endpoint, tmp_path / "home", *build, "--from=hf://datasets/owner/rows/train.jsonl")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows_kept"] == 2
    done = _run(endpoint, tmp_path / "home", "convert", "--from=hf://owner/tiny", "--to=x")
    folder = tmp_path / "home" / "prism_jax" / "models" / "owner" / "tiny" / "main"
    assert (folder / "config.json").read_bytes() == b"{}"
    assert (folder / "a" / "b.txt").read_bytes() == b"text"
    assert not (folder / "weights.pt").exists()
    assert done.returncode == 2
    done = _run(endpoint, tmp_path / "home", *build, "--from=hf://owner/absent/rows.jsonl")
    assert done.returncode == 2
    assert done.stderr.startswith("error: hf://owner/absent: cannot be downloaded: ")
    assert done.stderr.count("\n") == 1
    # A hub that does not answer is an error, unless its user has said so.
    build[3] = f"--to={tmp_path / 'again'}"
    source = "--from=hf://datasets/owner/rows/train.jsonl"
    done = _run("http://127.0.0.1:9", tmp_path / "home", *build, source)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: hf://datasets/owner/rows: cannot be downloaded: ")
    offline = {"HF_HUB_OFFLINE": "1"}
    done = _run(endpoint, tmp_path / "home", *build, source, **offline)
    assert done.returncode == 0, done.stderr
    done = _run(endpoint, tmp_path / "other", *build, source, **offline)
    assert "HF_HUB_OFFLINE is set, and " in done.stderr


def test_a_new_commit_leaves_no_files_of_the_old_one_and_is_whole_or_not_there(
    endpoint, tmp_path, monkeypatch
):
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    folder = tmp_path / "prism_jax" / "datasets" / "owner" / "moved" / "main"

    def download(commit, files, **more):
        monkeypatch.setattr(_Hub, "commit", commit * 40)
        monkeypatch.setitem(_Hub.repositories, "datasets/owner/moved", files)
        program = "from prism_jax import hub; hub.resolved(['hf://datasets/owner/moved'])"
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment | more,
            capture_output=True,
            text=True,
            check=False,
        )
        there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        return done.stderr, {name for name in there if not name.startswith(".cache/")}

    old = {"a.jsonl": b"old", "rows/b.jsonl": b"old"}
    assert download("b", old)[1] == set(old)
    new = {"a.jsonl": b"new", "rows/c.jsonl": _BROKEN}
    assert "cannot be downloaded" in download("c", new)[0]
    assert "is not whole" in download("c", new, HF_HUB_OFFLINE="1")[0]
    new["rows/c.jsonl"] = b"new"
    assert download("c", new)[1] == set(new)
    assert (folder / "a.jsonl").read_bytes() == b"new"


def test_no_name_leads_out_of_the_folder_of_downloads():
    for address in ("hf://../..", "hf://a/..", "hf://datasets/../b", "hf://a/b@..", "hf://a/b@."):
        with pytest.raises(errors.InputError, match="a name must be more than dots"):
            hub.resolved([f"--model={address}"])


def test_an_address_is_replaced_where_a_value_is_one(monkeypatch):
    monkeypatch.setattr(hub, "_download", lambda address: f"<{address[0][5:]}>")
    for given, made in (
        ("--model=hf://a/b", "--model=<a/b>"),
        ("hf://a/b-1.5@v2/c#d", "<a/b-1.5@v2>/c#d"),
        ("--x=('hf://a/b','hf://datasets/c/d/e.json')", "--x=('<a/b>','<datasets/c/d>/e.json')"),
        ("--x=hf://datasets/c/d/e.tsv@read.py:f", "--x=<datasets/c/d>/e.tsv@read.py:f"),
        ("--x=hf://datasets/c/d@read.py:f", "--x=<datasets/c/d>@read.py:f"),
        ("--prompt=what is hf://a/b?", "--prompt=what is hf://a/b?"),
    ):
        assert hub.resolved([given]) == [made]
    for wrong in ("--model=hf://a", "--model=hf://a/b?c", "--model=hf://"):
        with pytest.raises(errors.InputError, match="an address must be hf://OWNER/NAME"):
            hub.resolved([wrong])
