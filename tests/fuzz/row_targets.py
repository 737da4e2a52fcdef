"""Rows and the files they come in: sharegpt, JSON, parquet, dataset_info.json, built folders."""

import contextlib
import decimal
import io
import json
import os
import pathlib
import random
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prism_jax import errors
from prism_jax.data import (
    arrayrecord,
    build,
    json_tables,
    manifest,
    pairs,
    parquet_tables,
    records,
    rl_parquet,
    sharegpt,
    sources,
    validate,
)
from tests import data_files
from tests.fuzz import mutations
from tests.fuzz.target import Target, require

Json = Any
Parser = Callable[..., records.Row]

_RULES = validate.Rules(max_bad_rows=10**6, num_threads=1)
_PARTS = [{"type": "image", "image": "1.png"}, {"type": "text", "text": "q"}]
_TURNS = [
    {"role": "user", "content": _PARTS},
    {"role": "assistant", "content": "a", "weight": 1},
]
_INFO = {
    "a": {
        "file_name": "a.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user"},
    }
}


def _seeds() -> dict[str, list[Json]]:
    """Return right rows of each kind, in every form that is read."""
    shared = {"images": ["1.png"], "system": "s"}
    spoken = [{"from": "human", "value": "<image>Hi"}, {"from": "gpt", "value": "yo"}]
    prompt = data_files.prompt_row(1) | {"images": ["1.png"]}
    return {
        "sft": [
            data_files.sft_row(1),
            {"conversations": spoken, **shared},
            {"conversations": [*spoken, *spoken[1:]], "loss_mask": [0, 1, 1], "image": "1.png"},
            {"messages": _TURNS},
            {"messages": json.dumps(_TURNS), "id": 3.0, "tools": "[]", "weight": 1.0},
            {"conversations": spoken, "images": [{"image": "1.png", "max_pixels": 65536}]},
            {
                "messages": [{"role": "user", "content": "<video>q"}, _TURNS[1]],
                "videos": [{"video": ["1.png", "2.png"], "sample_fps": 4.0, "fps": 2}],
            },
        ],
        "pairs": [
            data_files.pair_row(1),
            {"question": "q", "teacher_response": "a", "student_response": "b"},
            {"prompt": _TURNS[:1], "teacher_response": "a", "student_response": "b"},
        ],
        "prompts": [
            prompt,
            {"prompt": "q?", "image": "1.png", "answer": 3},
            {"prompt": "q?", "videos": [["0.png", "1.png"], "v.gif"], "answer": 3},
            {"prompt": {"role": ["user"], "content": ["q"]}, "reward_model": '{"ground_truth": 1}'},
            {"prompt": json.dumps(_TURNS[:1]), "answer": "7", "extra_info": {"a": [1, None]}},
        ],
    }


class Rows(Target):
    """Fields of a row, whatever file they came from: parsers, checks, and what is stored."""

    weight = 4.0
    num_short = 150

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        self.seeds = _seeds()
        columns = (None, sharegpt.CONVERSATIONS, sharegpt.MESSAGES)
        self._parsers: dict[str, list[Parser]] = {
            "sft": [_sharegpt(names) for names in columns],
            "pairs": [lambda row, place: pairs.parse(row, place=place, source="s")],
            "prompts": [lambda row, place: rl_parquet.parse(row, place=place, source="s")],
        }
        self._features = {kind: arrayrecord.features(kind) for kind in self.seeds}
        for number in range(3):
            (folder / f"{number}.png").write_bytes(data_files.png(number))
        video = data_files.video("GIF", num_frames=3, frames_per_second=5)
        (folder / "v.gif").write_bytes(video)

    def make(self, rng: random.Random) -> list:
        """Return the kind and a damaged row."""
        kind = rng.choice(list(self.seeds))
        times = rng.choice((0, 1, 1, 2, 3, 6))
        return [kind, mutations.tree(rng, rng.choice(self.seeds[kind]), times=times)]

    def run(self, given: list) -> None:
        """Read the row by every parser of its kind."""
        kind, row = given
        if isinstance(row, Mapping):
            self.read(kind, row)

    def read(self, kind: str, fields: Json) -> None:
        """Check a row; a right one comes back from its stored form, a wrong one is reported."""
        place = records.Place(file="f", row=1)
        for parse in self._parsers[kind]:
            candidate = validate.Candidate(
                index=0, place=place, fields=fields, parse=parse, image_root=str(self.folder)
            )
            report = validate.Report(name="s")
            try:
                rows = [row for _, row in validate.check([candidate], _RULES, report)]
            except validate.WrongRows:
                rows = []
            require(len(rows) + len(report.dropped) == 1, "a row is neither kept nor reported")
            report.lines().encode()
            for row in rows:
                example = self._features[kind].encode_example(arrayrecord.to_example(row))
                stored = self._features[kind].serialize_example(example)
                read = self._features[kind].deserialize_example_np(stored)
                again = arrayrecord.from_example(kind, read)
                require(
                    records.digest(again) == records.digest(row), "the stored row is another one"
                )
                require(again.id == row.id, "the stored row has another id")


def _sharegpt(columns: sharegpt.Columns | None) -> Parser:
    return lambda row, place: sharegpt.parse(row, place=place, source="s", columns=columns)


class JsonFiles(Rows):
    """Files of JSON and JSON lines: scanned, read by number, compared with the json module."""

    weight = 3.0
    num_short = 60
    _words = (
        b"[", b"]", b"{", b"}", b",", b'"', b"\\", b"\\ud800", b"\n", b"\r\n", b"\0",
        b"\xef\xbb\xbf", b"\xff", b"NaN", b"1e999", b"null", b"[[[[", b"//", b"'", b"9" * 5000,
    )  # fmt: skip

    def make(self, rng: random.Random) -> list:
        """Return the kind, the file's ending and its bytes."""
        kind = rng.choice(list(self.seeds))
        rows = [
            mutations.tree(rng, rng.choice(self.seeds[kind]), times=rng.choice((0, 0, 1, 2)))
            for _ in range(rng.choice((0, 1, 2, 4)))
        ]
        ending = rng.choice(("json", "jsonl"))
        if ending == "json":
            text = json.dumps(rows, indent=rng.choice((None, 1)), ensure_ascii=rng.random() < 0.5)
            data = text.encode("utf-8", "surrogatepass")
        else:
            ends = (b"\n", b"\r\n", b"\n\n")
            data = b"".join(json.dumps(row).encode() + rng.choice(ends) for row in rows)
        if rng.random() < 0.7:
            data = mutations.damaged(rng, data, words=self._words)
        if rng.random() < 0.001:
            data = rng.choice((b"[", b'{"a":', b'"', b"[{")) * rng.choice((1000, 100000))
        mark = b"\xef\xbb\xbf" if rng.random() < 0.1 else b""
        return [kind, ending, mark + data]

    def run(self, given: list) -> None:
        """Compare the rows with those read by number, and with the json module's."""
        kind, ending, data = given
        path = self.folder / f"table.{ending}"
        path.write_bytes(data)
        table = json_tables.JsonTable(str(path))
        entries = list(table.scan())
        require(len(entries) == len(table), "scan and len differ")
        for index, entry in enumerate(entries):
            again = table.read(index)
            same = again[0] == entry[0] and _shown(again) == _shown(entry)
            require(same, "a row read by number differs from the scanned one")
            if isinstance(entry[1], dict):
                self.read(kind, entry[1])
        if ending != "json":
            return
        try:
            whole = json.loads(data.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return
        if isinstance(whole, list):
            wanted = [json.dumps(row) if isinstance(row, dict) else None for row in whole]
            require([*map(_shown, entries)] == wanted, "rows differ from the json module's")


def _shown(entry: tuple[int, Json]) -> str | None:
    return json.dumps(entry[1]) if isinstance(entry[1], dict) else None


class DatasetInfo(Target):
    """`dataset_info.json` of LLaMA-Factory: no entry leads out of its folder."""

    weight = 2.0
    num_short = 60

    def make(self, rng: random.Random) -> bytes:
        """Return a file's bytes."""
        return mutations.json_file(rng, _INFO)

    def run(self, given: bytes) -> None:
        """Find the entry."""
        path = self.folder / "dataset_info.json"
        path.write_bytes(given)
        entry = sharegpt.find_entry(str(path), "a")
        root = os.path.realpath(self.folder)
        inside = os.path.realpath(entry.path).startswith(root + os.sep)
        require(inside, "file_name leads out of the folder")


class ParquetFiles(Rows):
    """Parquet: damaged files, and whole ones of unexpected types."""

    weight = 2.0
    num_short = 30
    _codecs = ("none", "snappy", "zstd", "gzip")
    _names = ("id", "prompt", "images", "reward_model", "extra_info", "answer", "data_source")

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        rows = [data_files.prompt_row(number) for number in range(4)]
        for row in rows:
            row["images"] = [{"bytes": b"x" * 20, "path": None}]
        self._files = []
        for codec in self._codecs:
            buffer = io.BytesIO()
            table = pa.Table.from_pylist(rows)
            pq.write_table(table, buffer, compression=codec, row_group_size=2)
            self._files.append(buffer.getvalue())

    def make(self, rng: random.Random) -> list:
        """Return the kind and a file's bytes."""
        if rng.random() < 0.4:
            return [rng.choice(records.KINDS), self._of_odd_types(rng)]
        data = rng.choice(self._files)
        if rng.random() < 0.5:
            return ["prompts", mutations.damaged(rng, data)]
        # The footer, which says where everything is.
        size = int.from_bytes(data[-8:-4], "little")
        head, footer = data[: -8 - size], data[-8 - size : -8]
        footer = mutations.damaged(rng, footer, times=rng.choice((1, 2)))
        return ["prompts", head + footer + len(footer).to_bytes(4, "little") + b"PAR1"]

    def _of_odd_types(self, rng: random.Random) -> bytes:
        names = [name for name in self._names if rng.random() < 0.7] or ["id"]
        arrays = [rng.choice(_ARRAYS)(rng) for _ in names]
        if rng.random() < 0.1:
            names[-1] = names[0]
        buffer = io.BytesIO()
        try:
            pq.write_table(pa.Table.from_arrays(arrays, names=names), buffer)
        except (pa.ArrowException, ValueError, OverflowError, OSError):
            return self._files[0]
        return buffer.getvalue()

    def run(self, given: list) -> None:
        """Scan the rows, read some by number."""
        kind, data = given
        path = self.folder / "table.parquet"
        path.write_bytes(data)
        table = parquet_tables.ParquetTable(str(path))
        for number, entry in table.scan():
            if number > 200:
                break
            if isinstance(entry, dict):
                self.read(kind, entry)
        for index in range(min(len(table), 3)):
            table.read(index)


def _not_utf8(rng: random.Random) -> pa.Array:
    raw = pa.array([b"\xff\xfe", b"a"], pa.binary())
    return pa.Array.from_buffers(pa.string(), 2, raw.buffers())


_ARRAYS: tuple[Callable[[random.Random], pa.Array], ...] = (
    lambda rng: pa.array(
        [rng.choice((0, 10**15, -(10**15), 2**62))] * 2,
        pa.timestamp(rng.choice(("s", "ms", "us", "ns")), rng.choice((None, "UTC", "+25:00"))),
    ),
    lambda rng: pa.array([rng.choice((0, 10**9, -(10**6)))] * 2, pa.date32()),
    lambda rng: pa.array([2**40, 5], pa.duration(rng.choice(("s", "ns")))),
    lambda rng: pa.array([b"\xff\xfe", b"a"], pa.binary()),
    _not_utf8,
    lambda rng: pa.array(["q?", "r"], pa.large_string()),
    lambda rng: pa.array(["q?", "r"], pa.string_view()),
    lambda rng: pa.array(["q?", "r"]).dictionary_encode(),
    lambda rng: pa.array([[("a", 1)], [("b", 2)]], pa.map_(pa.string(), pa.int64())),
    lambda rng: pa.array([[("a", 1), ("a", 2)], []], pa.map_(pa.string(), pa.int64())),
    lambda rng: pa.array([1.5, float("nan")]),
    lambda rng: pa.array([True, None]),
    lambda rng: pa.nulls(2),
    lambda rng: pa.array([{"role": "user", "content": "q"}, None]),
    lambda rng: pa.array([[{"role": "user", "content": "q"}], []]),
    lambda rng: pa.array([[{"bytes": b"x", "path": "1.png"}], []]),
    lambda rng: pa.array([decimal.Decimal("1.50")] * 2, pa.decimal128(5, 2)),
    lambda rng: pa.array([decimal.Decimal("1E+40")] * 2, pa.decimal256(70, 2)),
    lambda rng: pa.array([b"x" * 16] * 2, pa.binary(16)),
    lambda rng: pa.array([[[1]], [[2]]]),
    lambda rng: pa.array([[1.0, 2.0]] * 2, pa.list_(pa.float32(), 2)),
    lambda rng: pa.array([5, 86399], pa.time32("s")),
    lambda rng: pa.array([1.0, 2.0], pa.float16()),
    lambda rng: pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"x" * 16] * 2, pa.binary(16))),
)


class BuiltFolders(Target):
    """A folder of `data build` with one of its files damaged."""

    weight = 2.0
    num_short = 25

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        seeds = folder / "files"
        data_files.write_images(seeds, 4)
        (seeds / "train.json").write_text(json.dumps([data_files.sft_row(i) for i in range(4)]))
        self._built = folder / "built"
        source = sources.Source(kind="sft", path=str(seeds / "train.json"))
        build.build(source, str(self._built), validate.Rules())
        self._files = {path.name: path.read_bytes() for path in self._built.iterdir()}

    def make(self, rng: random.Random) -> list:
        """Return a file's name, whether the manifest is made to agree, and the bytes."""
        name = rng.choice(list(self._files))
        data = self._files[name]
        if name.endswith(".json") and rng.random() < 0.8:
            return [name, rng.random() < 0.7, mutations.json_file(rng, json.loads(data))]
        return [name, rng.random() < 0.7, mutations.damaged(rng, data)]

    def run(self, given: list) -> None:
        """Open the folder and read every row."""
        name, agrees, data = given
        try:
            (self._built / name).write_bytes(data)
            if agrees and name != manifest.FILE:  # sizes are compared before anything is opened
                content = json.loads(self._files[manifest.FILE])
                content["files"][name]["bytes"] = len(data)
                (self._built / manifest.FILE).write_text(json.dumps(content))
            rows = manifest.open_folder(str(self._built), kind="sft", split=None, cache_dir=None)
            for index in range(len(rows)):
                with contextlib.suppress(errors.InputError):
                    rows[index]
        finally:
            for restored in (name, manifest.FILE):
                (self._built / restored).write_bytes(self._files[restored])
