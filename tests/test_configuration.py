"""Configurations: overrides, what is refused, and that all of it is told at once."""

import dataclasses
from typing import Literal

import ml_collections
import pytest

from prism_jax import configuration, errors

FILE = """
from ml_collections import ConfigDict, config_dict

def get_config(arg="small"):
    if arg != "small":
        raise ValueError(f"the size must be small, got {arg!r}")
    return ConfigDict({
        "rate": 1.0, "kind": "a", "names": (), "pairs": (),
        "inner": {"count": 2, "limit": config_dict.placeholder(int)},
    })
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner(configuration.Section):
    count: int
    limit: int | None

    def problems(self) -> list[str]:
        return configuration.at_least(self, 1, "count", "limit")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer(configuration.Section):
    rate: float
    kind: Literal["a", "b"]
    names: tuple[str, ...]
    pairs: tuple[tuple[str, float], ...]
    inner: Inner


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(FILE)
    return path


def _parse(file, *overrides: str, arg: str = "") -> Outer:
    argv = [f"--config={file}{arg}", "--workdir=w", *overrides]
    config, workdir = configuration.read(argv, command="try")
    assert workdir == "w"
    return configuration.parse(Outer, config)


def test_a_file_with_overrides_becomes_a_struct(file):
    assert _parse(file) == Outer(
        rate=1.0, kind="a", names=(), pairs=(), inner=Inner(count=2, limit=None)
    )
    changed = _parse(
        file,
        "--config.rate=3",
        "--config.names=x",
        "--config.names=y,z",
        "--config.pairs=(('p',1),)",
        "--config.inner.limit=7",
        arg=":small",
    )
    assert changed == Outer(
        rate=3.0,
        kind="a",
        names=("x", "y,z"),
        pairs=(("p", 1.0),),
        inner=Inner(count=2, limit=7),
    )
    assert type(changed.rate) is float


def test_none_empties_a_field_that_may_be_empty_and_no_other(file):
    assert _parse(file, "--config.inner.limit=7", "--config.inner.limit=None").inner.limit is None
    with pytest.raises(errors.InputError, match=r"config\.rate must be a number, got None"):
        _parse(file, "--config.rate=None")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("--config.inner.cuont=None", "cuont"),
        ("--config.inner.cuont=3", "cuont"),
        ("--config.other.count=3", "other"),
        ("--config.inner.count=many", "many"),
        ("--confgi.rate=1", "confgi.rate"),
        ("stray", "stray"),
    ],
)
def test_what_a_configuration_has_not_is_refused_by_name(file, override, told):
    with pytest.raises(errors.InputError, match=told):
        _parse(file, override)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "--config.nope=1",
            "--config.nope: config has no field 'nope'; it has inner, kind, names, pairs, rate",
        ),
        (
            "--config.inner.cuont=1",
            "--config.inner.cuont: config.inner has no field 'cuont', perhaps count is meant; "
            "it has count, limit",
        ),
        (
            "--config.nope.x=None",
            "--config.nope.x: config has no field 'nope'; it has inner, kind, names, pairs, rate",
        ),
        ("--config.rate.x=1", "--config.rate.x: config.rate is no group, it has no field 'x'"),
        (
            "--config.inner.limit.x=1",
            "--config.inner.limit.x: config.inner.limit is None, it has no field 'x'",
        ),
    ],
)
def test_a_misspelt_field_is_told_as_given_with_those_that_exist(file, override, told):
    with pytest.raises(errors.InputError) as error:
        _parse(file, "--config.rate=2", override)
    assert str(error.value) == f"try: {told}"


def test_all_misspelt_fields_are_told_at_once(file):
    with pytest.raises(errors.InputError, match=r"rate is meant.*; --config\.inner\.x: "):
        _parse(file, "--config.raet=1", "--config.inner.x", "1")


def _told(*argv: str) -> str:
    with pytest.raises(errors.InputError) as error:
        configuration.read([*argv, "--workdir=w"], command="try")
    return str(error.value)


@pytest.mark.parametrize("more", [(), ("--config.rate=1",), ("--config.rate=None",)])
@pytest.mark.parametrize("arg", ["", ":small,new"])
def test_a_configuration_file_that_is_not_there_is_named_in_one_line(
    tmp_path, monkeypatch, arg, more
):
    monkeypatch.chdir(tmp_path)
    told = f"try: --config=configs/nosuch.py{arg}: there is no file configs/nosuch.py in {tmp_path}"
    assert _told(f"--config=configs/nosuch.py{arg}", *more) == told
    assert _told("--config", f"configs/nosuch.py{arg}", *more) == told
    absolute = f"{tmp_path}/nosuch.py"
    told = f"try: --config={absolute}{arg}: there is no file {absolute}"
    assert _told(f"--config={absolute}{arg}", *more) == told


@pytest.mark.parametrize("more", [(), ("--config.rate=1",)])
@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("return {}[arg]", "KeyError: 'huge'"),
        ("raise ValueError('no such size\\nbut others')", "ValueError: no such size\nbut others"),
        ("return open('/nosuch/sizes')", "FileNotFoundError: [Errno 2] No such file or directory"),
        ("return 1 // 0", "ZeroDivisionError: integer division or modulo by zero"),
        ("import nosuch_module", "ModuleNotFoundError: No module named 'nosuch_module'"),
        ("return (", "SyntaxError: '(' was never closed"),
        ("pass", "get_config returns None, not a ConfigDict"),
    ],
)
def test_what_a_configuration_file_raises_is_told_with_its_name(tmp_path, line, told, more):
    path = tmp_path / "config.py"
    path.write_text(f"def get_config(arg):\n    {line}\n")
    assert _told(f"--config={path}:huge", *more).startswith(f"try: --config={path}:huge: {told}")


def test_a_missing_argument_file_or_size_is_named(file, tmp_path):
    with pytest.raises(errors.InputError, match="--config"):
        configuration.read(["--workdir=w"], command="try")
    with pytest.raises(errors.InputError, match="--workdir"):
        configuration.read([f"--config={file}"], command="try")
    with pytest.raises(errors.InputError, match=r"nowhere\.py"):
        configuration.read([f"--config={tmp_path}/nowhere.py", "--workdir=w"], command="try")
    with pytest.raises(errors.InputError, match=r"nowhere\.py"):
        configuration.read(
            [f"--config={tmp_path}/nowhere.py", "--workdir=w", "--config.rate=1"], command="try"
        )
    with pytest.raises(errors.InputError, match=r"size must be small, got 'huge'$"):
        _parse(file, arg=":huge")


def test_all_that_is_wrong_is_told_at_once():
    config = ml_collections.ConfigDict(
        {
            "rate": True,
            "kind": "c",
            "names": ("x", 3),
            "pears": (),
            "inner": {"count": 0, "limit": 0},
        }
    )
    with pytest.raises(errors.InputError) as error:
        configuration.parse(Outer, config)
    assert str(error.value).split("; ") == [
        "config.pears is no field",
        "config.pairs is missing",
        "config.rate must be a number, got True",
        "config.kind must be one of 'a', 'b', got 'c'",
        "config.names[1] must be a text, got 3",
        "config.inner.count must be >= 1, got 0",
        "config.inner.limit must be >= 1, got 0",
    ]


def test_the_plain_form_is_what_json_gives_back(file):
    config, _ = configuration.read(
        [f"--config={file}", "--workdir=w", "--config.names=x"], command="try"
    )
    assert configuration.plain(config) == {
        "rate": 1.0,
        "kind": "a",
        "names": ["x"],
        "pairs": [],
        "inner": {"count": 2, "limit": None},
    }
