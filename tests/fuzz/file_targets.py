"""Small files that the project wrote itself and finds again, and replies of a teacher."""

import datetime
import json
import math
import pathlib
import random
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from models.hf import files as hf_files
from prism_jax import errors
from prism_jax.checkpoints import checkpoint, lock
from prism_jax.checkpoints import files as checkpoint_files
from prism_jax.checkpoints import meta as checkpoint_meta
from prism_jax.commands import report
from prism_jax.commands.ask import parts as ask_parts
from prism_jax.report import honesty, page, results
from prism_jax.running import metric_writers
from prism_jax.teacher import cache, client, reply
from tests import data_files
from tests.fuzz import mutations
from tests.fuzz.target import Target, require

Json = Any

_RATE = {"mean": 0.5, "low": 0.4, "high": 0.6}
_PASS = {
    "num_prompts": 2,
    "num_responses": 1,
    "accuracy": _RATE,
    "format_valid": _RATE,
    "response_tokens": 3.0,
    "cut": 0.0,
    "by_type": {"a": {"num_prompts": 2, "accuracy": _RATE}},
}
_RESPONSE = {
    "id": "r1",
    "draw": "greedy",
    "response_number": 0,
    "question_type": "a",
    "ground_truth": "1",
    "response": "<caption>c</caption><think>t</think><answer>1</answer>",
    "reason": "correct",
    "ended": True,
}
_STEP = {
    "name": "sft",
    "number": 1,
    "arguments": ["sft", "--config.seed=0"],
    "seconds": 1.0,
    "num_starts": 1,
    "is_finished": True,
}
_METRICS = [{"step": 1, "loss/nll": 0.5, "discriminator/cot_pair_accuracy": 0.5}, {"step": 2}]


class _Files(Target):
    """A folder of which one file is damaged for a moment."""

    def __init__(self, folder: pathlib.Path, seeds: dict[str, Json]):
        super().__init__(folder)
        self.seeds = seeds
        for name, value in seeds.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(_file(name, value))

    def make(self, rng: random.Random) -> list:
        """Return a file's name and bytes."""
        name = rng.choice(list(self.seeds))
        value = mutations.tree(rng, self.seeds[name], times=rng.choice((1, 1, 2)))
        data = _file(name, value)
        return [name, mutations.damaged(rng, data) if rng.random() < 0.4 else data]

    def run(self, given: list) -> None:
        """Read the folder with this file in the place of its own."""
        name, data = given
        path = self.folder / name
        path.write_bytes(data)
        try:
            self.read(name)
        finally:
            path.write_bytes(_file(name, self.seeds[name]))

    def read(self, name: str) -> None:
        """Read the damaged file as the commands do."""
        raise NotImplementedError


def _file(name: str, value: Json) -> bytes:
    rows = value if name.endswith(".jsonl") and isinstance(value, list) else [value]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


class RunFolders(_Files):
    """What a run leaves beside its checkpoints, and the inputs of a report."""

    weight = 4.0
    num_short = 80

    def __init__(self, folder: pathlib.Path):
        seeds = {
            "lock.json": {"host": "h", "machine": "m", "pid": 1, "ticks": "5", "folder": "1:2",
                          "since": "x", "beat": 0},
            "finished.json": {"stage": "sft", "config_hash": "x", "step": 1, "summary": {}},
            "metrics.jsonl": _METRICS,
            "evaluate_sft/summary.json": {"greedy": _PASS},
            "evaluate_sft/run.json": {
                "stage": "evaluate",
                "config": {"prompts": {"path": "p", "image_root": None}},
                "model_config": {"step": 1},
            },
            "evaluate_sft/responses.jsonl": [_RESPONSE, _RESPONSE | {"id": "r2"}],
            "steps/sft.json": _STEP,
            "sft/metrics.jsonl": _METRICS,
            "align/metrics.jsonl": _METRICS,
        }  # fmt: skip
        super().__init__(folder, seeds)
        prompts = folder / "prompts.jsonl"
        rows = [data_files.prompt_row(number) | {"images": []} for number in range(2)]
        data_files.write_lines(prompts, [row | {"prompt": "q?"} for row in rows])

    def read(self, name: str) -> None:
        """Start again behind step 1, or write the report."""
        path = self.folder / name
        match name:
            case "lock.json":
                lock._read(epath.Path(path))
            case "finished.json":
                marker = checkpoint.finished(str(self.folder))
                require(marker is None or isinstance(marker["step"], int), "a step that is none")
            case "metrics.jsonl":
                metric_writers.cut_after(path, 1)
            case _:
                if name.endswith("run.json"):
                    ask_parts.recorded_step(path.parent)
                found = results.read(self.folder)
                shown = report.choose(found, limit=3)
                page.build(found, shown, title="t", selection="s").encode("utf-8", "replace")
                json.dumps([results.summary(found), honesty.summary(found)])


class Steps(_Files):
    """The JSON items of a checkpoint: nothing but what was written is taken."""

    weight = 1.0
    num_short = 12

    def __init__(self, folder: pathlib.Path):
        meta = {
            "format": checkpoint_meta.FORMAT, "stage": "sft", "config": {"seed": 1},
            "config_hash": "x", "model_config": {}, "created_at": "", "leaves": {},
        }  # fmt: skip
        position = {"step": 1, "data": {"next_step": 1, "seed": 0}}
        self._written = {"meta": meta, "position": position}
        root = epath.Path(folder / "run" / checkpoint_files.FOLDER)
        items = self._written | {"digests": checkpoint_files.digests(self._written)}
        with ocp.CheckpointManager(root) as manager:
            saved = {name: ocp.args.JsonSave(value) for name, value in items.items()}
            manager.save(1, args=ocp.args.Composite(**saved))
        base = f"run/{checkpoint_files.FOLDER}/1"
        super().__init__(folder, {f"{base}/{name}/metadata": items[name] for name in items})

    def read(self, name: str) -> None:
        """Restore both items."""
        workdir = epath.Path(self.folder / "run")
        with checkpoint_files.opened(workdir) as manager:
            read = checkpoint_files.read_texts(manager, workdir, 1, *self._written)
        require(read == self._written, "another content is taken for what was written")


class Manifests(_Files):
    """The manifest beside exported weights: a file that differs from it is refused."""

    weight = 1.0
    num_short = 30

    def __init__(self, folder: pathlib.Path):
        files = {}
        for number in range(2):
            name = f"model-{number}.safetensors"
            (folder / name).write_bytes(bytes([number]) * 9)
            files[name] = hf_files.sha256(folder / name)
        super().__init__(folder, {"manifest.json": {"files": files}})

    def read(self, name: str) -> None:
        """Compare both files."""
        try:
            hf_files.compare_manifest(self.folder, ["model-0.safetensors", "model-1.safetensors"])
        except ValueError as error:  # `models` knows no InputError
            raise errors.InputError(str(error)) from error


_REPLY = {
    "model": "m",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hi"},
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
    "error": {"message": "no"},
}


class Replies(Target):
    """Bodies that an endpoint sends, and what the cache keeps of them."""

    weight = 4.0
    num_short = 100

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        self._cache = cache.Cache(folder / "cache")
        self._entry = folder / "cache/00/00bb.json"
        found = reply.parse(json.dumps(_REPLY).encode())
        self._cache.put("00bb", found, model="m")
        self._stored = json.loads(self._entry.read_bytes())

    def make(self, rng: random.Random) -> list:
        """Return a body, or an entry of the cache."""
        if rng.random() < 0.2:
            return ["entry", mutations.json_file(rng, self._stored)]
        return ["body", mutations.json_file(rng, _REPLY)]

    def run(self, given: list) -> None:
        """Read the reply; one that is kept comes back as it was."""
        kind, data = given
        if kind == "entry":
            self._entry.write_bytes(data)
            self._cache.get("00bb")
            return
        try:
            read = reply.parse(data)
        except reply.UnusableError as error:
            require(bool(str(error)), "an error without words")
            return
        if read.model is not None:
            read.model.encode()
        # Writing is what takes time: one reply in eight is kept.
        if len(data) % 8 == 0:
            self._cache.put("00aa", read, model="m")
            require(self._cache.get("00aa") == read, "the cache gives another reply back")


class Waits(Target):
    """`Retry-After` of any kind: a wait that a clock can show, or none."""

    weight = 6.0
    num_short = 200
    _dates = (
        "Wed, 21 Oct 2026 07:28:00 GMT", "120", "Sunday, 06-Nov-94 08:49:37 GMT",
        "Sun Nov  6 08:49:37 1994",
    )  # fmt: skip
    _pieces = (
        "9" * 25, "-", "+", "GMT", "+9999", "-99999999", ":", ",", " ", "e9", "nan", "inf", "Nov",
        "00", "\0", "é", "(", "(a(b", '"', "\\", "_", "٣", "0x1F", "1_000",
    )  # fmt: skip
    _now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)

    def make(self, rng: random.Random) -> str:
        """Return a header's value as http.client hands it on."""
        text = mutations.text(rng, rng.choice(self._dates), self._pieces)
        return text.encode("latin-1", "replace").decode("latin-1")

    def run(self, given: str) -> None:
        """Read the header."""
        seconds = client.retry_after_seconds(given, self._now)
        is_wait = seconds is None or (math.isfinite(seconds) and seconds >= 0)
        require(is_wait, f"a wait of {seconds} seconds")
