"""The plan of the house: imports go one way, files and functions stay small, nothing unpickles."""

import ast
import pathlib
import re

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_FILES = sorted(
    path
    for folder in ("models", "prism_jax", "configs", "launch", "benchmarks")
    for path in (_ROOT / folder).rglob("*.py")
)

# Which part may import which; the longest prefix that fits decides. A part always imports itself.
_ARRAYS = {"jax", "flax", "numpy", "jaxtyping"}
_ALLOWED: dict[str, set[str]] = {
    # Architectures know no config dict, tokenizer, path or loss.
    "models": _ARRAYS,
    "models.hf": {"jax", "flax", "numpy", "jaxtyping"},
    "models.upcycle": {"jax", "flax", "numpy", "jaxtyping"},
    "configs": {"ml_collections"},
    "prism_jax.errors": set(),
    "prism_jax.version": set(),
    "prism_jax.metrics": _ARRAYS,
    "prism_jax.losses": {"jax", "jaxtyping", "prism_jax.metrics"},
    "prism_jax.rewards": {"math_verify", "sympy", "prism_jax.errors"},
    "prism_jax.rollout": {*_ARRAYS, "models"},
    "prism_jax.data": {
        *("absl", "array_record", "etils", "fsspec", "grain", "jinja2", "numpy", "PIL", "pyarrow"),
        *("sklearn", "tensorflow_datasets", "tokenizers", "transformers"),
        *("models", "prism_jax.errors", "prism_jax.version"),
    },
    # A teacher behind an address: no JAX.
    "prism_jax.teacher": {"prism_jax.errors", "prism_jax.data", "numpy"},
    "prism_jax.report": {"prism_jax.errors", "prism_jax.intervals", "prism_jax.progress"},
    "prism_jax.stages": {"absl", "jax", "flax", "ml_collections", "numpy", "models", "prism_jax"},
    "prism_jax.main": {"prism_jax", "absl", "jax", "ml_collections"},
    "prism_jax.__main__": {"prism_jax.main"},
    # The loop and what it stands on: no stage, no data, no reward.
    "prism_jax": {
        *("absl", "etils", "jax", "flax", "ml_collections", "numpy", "optax", "orbax"),
        *("tensorboardX", "wandb", "jaxtyping", "models", "safetensors"),
        *("prism_jax.checkpoint", "prism_jax.checkpoint_files", "prism_jax.checkpoint_meta"),
        *("prism_jax.checksum", "prism_jax.errors", "prism_jax.goodput", "prism_jax.mesh"),
        *("prism_jax.metric_writers", "prism_jax.metrics", "prism_jax.optim"),
        *("prism_jax.preemption", "prism_jax.progress", "prism_jax.train_state"),
        *("prism_jax.tree_paths", "prism_jax.version", "prism_jax.losses"),
    },
    "launch": {"prism_jax", "models", "configs", "jinja2", "yaml"},
    "benchmarks": {"prism_jax", "models", "benchmarks", "jax", "flax", "numpy", "torch"}
    | {"transformers", "optax", "ml_collections"},
}
_STANDARD = set(__import__("sys").stdlib_module_names)


def _module(path: pathlib.Path) -> str:
    parts = path.relative_to(_ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _rule(module: str) -> tuple[str, set[str]]:
    """Return the part that a module belongs to; `models.hf` stands for `models.hf_reader` too."""
    fits = [part for part in _ALLOWED if re.match(rf"{re.escape(part)}([._]|$)", module)]
    part = max(fits, key=len)
    return part, _ALLOWED[part]


def _imports(tree: ast.Module) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(node.lineno, name) for name in whole]
    return found


def _is_within(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".")


@pytest.mark.parametrize("path", _FILES, ids=_module)
def test_imports_go_one_way(path):
    module = _module(path)
    part, allowed = _rule(module)
    own = part.split(".")[0] if part in ("models.hf", "models.upcycle") else part
    wrong = [
        f"line {line}: {name}"
        for line, name in _imports(ast.parse(path.read_text()))
        if name.split(".")[0] not in _STANDARD
        and not any(_is_within(name, other) for other in allowed | {own})
    ]
    assert not wrong, f"{module} (part {part}) imports what it may not: {wrong}"


def test_the_loop_never_imports_a_stage_data_rewards_or_the_sampler():
    # The rule of "prism_jax" covers its own prefix, so its arrows are checked by name.
    above = ("stages", "main", "data", "rewards", "rollout", "teacher", "report")
    wrong = [
        f"{path.name}:{line} {name}"
        for path in (_ROOT / "prism_jax").glob("*.py")
        if _rule(_module(path))[0] == "prism_jax"
        for line, name in _imports(ast.parse(path.read_text()))
        if any(_is_within(name, f"prism_jax.{part}") for part in above)
    ]
    assert not wrong, wrong


def test_models_write_no_file_but_through_the_checkpoint_modules():
    for path in (_ROOT / "models").glob("*.py"):
        if path.name.startswith(("hf", "upcycle")):
            continue
        names = {name.split(".")[0] for _, name in _imports(ast.parse(path.read_text()))}
        assert not names & {"pathlib", "os", "json", "io", "shutil"}, path.name


_NUM_LINES = {"models": 300, "prism_jax": 400, "configs": 400, "launch": 400, "benchmarks": 400}


@pytest.mark.parametrize("path", _FILES, ids=_module)
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    limit = _NUM_LINES[path.relative_to(_ROOT).parts[0]]
    assert text.count("\n") <= limit, f"{path.name} has {text.count(chr(10))} lines, limit {limit}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            # The docstring is not code; neither are drawn masks.
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            length = node.end_lineno - body[0].lineno + 1 if body else 0
            assert length <= 60, f"{path.name}:{node.lineno} {node.name} has {length} lines"
            positional = len(node.args.posonlyargs + node.args.args)
            assert positional <= 8, f"{path.name}:{node.lineno} {node.name}"


@pytest.mark.parametrize("path", _FILES, ids=_module)
def test_nothing_unpickles_and_nothing_is_called_utils(path):
    names = {name.split(".")[0] for _, name in _imports(ast.parse(path.read_text()))}
    assert not names & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    if path.relative_to(_ROOT).parts[0] in ("models", "prism_jax", "configs"):
        assert "torch" not in names
    assert "utils" not in path.stem


def test_every_package_and_module_says_what_it_is():
    for path in _FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), f"{_module(path)} has no docstring"


def test_requirements_and_project_name_the_same_bounds():
    project = (_ROOT / "pyproject.toml").read_text()
    listed = re.findall(r'^  "([a-zA-Z].*)",$', project.split("[project.optional")[0], re.M)
    lines = (_ROOT / "requirements.txt").read_text().splitlines()
    required = [line for line in lines if line and not line.startswith("#")]
    assert sorted(line.replace("jax[tpu]", "jax") for line in required) == sorted(listed)
