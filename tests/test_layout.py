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

# Which folder or file may import which, a line each: parts of the project, then libraries. The
# longest name that fits a module decides; a folder always imports itself, and a name includes what
# lies in it. Arrows between these parts run one way.
_BASE = (
    "errors version small_files intervals tree_paths metrics progress row_layout configuration mesh"
    " batches"
)
_RUN = f"{_BASE} rows first_fit losses training checkpoints data rewards rollout setup"
_PARTS: dict[str, tuple[str, str]] = {
    "models": ("models.hf", "jax flax numpy jaxtyping"),
    "models.hf": ("models", "jax flax numpy jaxtyping"),
    "configs": ("", "ml_collections"),
    "prism_jax.errors": ("", ""),
    "prism_jax.version": ("", ""),
    "prism_jax.user_functions": ("errors", ""),
    "prism_jax.hub": ("errors", "huggingface_hub"),
    "prism_jax.small_files": ("errors", ""),
    "prism_jax.intervals": ("", "numpy scipy"),
    "prism_jax.tree_paths": ("", "jax flax"),
    "prism_jax.metrics": ("", "jax numpy"),
    "prism_jax.progress": ("", ""),
    "prism_jax.config_usage": ("errors", "absl ml_collections"),
    "prism_jax.row_layout": ("", ""),
    "prism_jax.config_values": ("config_usage", ""),
    "prism_jax.configuration": (
        "errors config_usage config_values row_layout",
        "absl ml_collections",
    ),
    "prism_jax.mesh": ("errors tree_paths models", "jax flax numpy"),
    "prism_jax.batches": ("models", "jax numpy"),
    "prism_jax.shared_rows": ("models", "numpy"),
    "prism_jax.first_fit": ("", "numpy"),
    "prism_jax.rows": ("errors batches first_fit shared_rows models", "jax numpy"),
    "prism_jax.losses": ("metrics", "jax jaxtyping"),
    "prism_jax.training": ("errors metrics tree_paths losses", "jax flax numpy optax"),
    "prism_jax.checkpoints": (
        "errors small_files tree_paths mesh training models",
        "jax flax numpy etils fsspec orbax safetensors",
    ),
    "prism_jax.rewards": ("errors user_functions", "latex2sympy2_extended math_verify sympy"),
    "prism_jax.rollout": ("models", "jax flax numpy jaxtyping"),
    "prism_jax.data": (
        "errors version small_files user_functions models",
        "absl array_record etils fsspec grain jinja2 numpy PIL pyarrow tensorflow_datasets"
        " tokenizers transformers",
    ),
    # What a benchmark's scorer must know is written by its reader.
    "prism_jax.data.benchmarks": ("errors data rewards", "etils"),
    # A teacher behind an address: no JAX.
    "prism_jax.teacher": ("errors small_files configuration data", "numpy"),
    "prism_jax.report": ("errors small_files intervals progress", ""),
    "prism_jax.setup": (
        f"{_BASE} user_functions rows training checkpoints data rewards models",
        "jax flax numpy",
    ),
    "prism_jax.policy": (f"{_RUN} models", "jax flax numpy"),
    "prism_jax.discriminator": (f"{_RUN} policy models", "jax flax numpy"),
    "prism_jax.honesty": (f"{_RUN} discriminator models", "jax flax numpy"),
    "prism_jax.running": (
        f"{_BASE} checkpoints data rewards setup",
        "jax etils ml_collections numpy PIL tensorboardX wandb",
    ),
    # The stages import nothing of one another.
    "prism_jax.stages.sft": (f"{_RUN} running models", "jax flax numpy"),
    "prism_jax.stages.warmup": (f"{_RUN} discriminator honesty running", "jax flax numpy"),
    "prism_jax.stages.align": (
        f"{_RUN} policy discriminator honesty running models",
        "jax flax numpy",
    ),
    "prism_jax.stages.rlvr": (f"{_RUN} policy discriminator running models", "jax flax numpy"),
    "prism_jax.stages": ("", ""),
    "prism_jax.commands.ask": (f"{_RUN} running models", "jax flax ml_collections"),
    "prism_jax.commands.curate": (
        f"{_RUN} policy running teacher commands.ask",
        "jax ml_collections",
    ),
    "prism_jax.commands.audit": (
        "errors small_files intervals data rewards report setup",
        "numpy",
    ),
    "prism_jax.commands.pipeline": (
        "errors small_files progress configuration checkpoints report",
        "",
    ),
    # It names every stage, whose programs it lists.
    "prism_jax.commands.plan": (
        f"{_BASE} checkpoints setup policy commands.ask models",
        "jax ml_collections",
    ),
    "prism_jax.commands.benchmarks": (
        f"{_RUN} policy running teacher",
        "jax ml_collections",
    ),
    "prism_jax.commands.serve": (
        f"{_RUN} discriminator commands.loaded models",
        "jax numpy flax PIL prometheus_client starlette uvicorn",
    ),
    "prism_jax.commands": (
        f"{_RUN} policy running report commands.ask commands.benchmarks models",
        "jax flax numpy ml_collections",
    ),
    # Commands and stages are found by name, and only the one that runs is imported.
    "prism_jax.main": ("errors", ""),
    "prism_jax.__main__": ("main setup", ""),
    "prism_jax": ("", ""),
    "launch": ("prism_jax models configs", "jinja2 yaml"),
    "benchmarks": (
        "prism_jax models",
        "jax flax numpy torch transformers optax ml_collections peft httpx PIL vllm lmms_eval "
        "tokamax absl datasets tokenizers trl",
    ),
}
_STANDARD = set(__import__("sys").stdlib_module_names)


def _module(path: pathlib.Path) -> str:
    parts = path.relative_to(_ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _part(module: str) -> str:
    """Return the name in the table that a module belongs to."""
    fits = [part for part in _PARTS if _is_within(module, part)]
    return max(fits, key=len)


def _allowed(part: str) -> set[str]:
    """Return the names that a part may import, each with all that lies in it."""
    inside, libraries = (names.split() for names in _PARTS[part])
    is_ours = ("models", "models.hf", "prism_jax")
    return {*libraries, *(n if n in is_ours else f"prism_jax.{n}" for n in inside)}


def _is_within(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".")


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


@pytest.mark.parametrize("path", _FILES, ids=_module)
def test_imports_go_one_way(path):
    module = _module(path)
    part = _part(module)
    wrong = [
        f"line {line}: {name}"
        for line, name in _imports(ast.parse(path.read_text()))
        if name.split(".")[0] not in _STANDARD
        and not any(_is_within(name, other) for other in _allowed(part) | {part})
    ]
    assert not wrong, f"{module} (part {part}) imports what it may not: {wrong}"


def test_no_two_parts_import_each_other():
    arrows = {part: set() for part in _PARTS}
    for path in _FILES:
        part = _part(_module(path))
        for _, name in _imports(ast.parse(path.read_text())):
            if name.split(".")[0] in ("models", "prism_jax"):
                arrows[part].add(_part(name))
    # Presets and files of Hugging Face are one part of models in two folders.
    arrows["models"].discard("models.hf")
    done: set[str] = set()
    while len(done) < len(arrows):
        free = {part for part in arrows if arrows[part] - {part} <= done} - done
        assert free, f"a circle among {sorted(set(arrows) - done)}"
        done |= free


def test_private_modules_of_jax_are_loaded_only_where_a_run_needs_them():
    private = {"models.cudnn_attention", "prism_jax.setup.coordination"}
    for path in _FILES:
        if path.relative_to(_ROOT).parts[0] == "benchmarks":
            continue
        tree = ast.parse(path.read_text())
        if any(name.startswith("jax._src") for _, name in _imports(tree)):
            assert _module(path) in private
        # Functions may load them, the head of a module may not.
        head = ast.Module(body=[node for node in tree.body if not hasattr(node, "body")])
        assert not {name for _, name in _imports(head)} & private, path.name


def test_models_write_no_file_but_through_the_checkpoint_modules():
    for path in (_ROOT / "models").glob("*.py"):
        if path.name == "upcycle.py":
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


def test_no_code_is_taken_from_a_folder_of_weights_or_rows():
    for path in _FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            where = f"{path.name}:{node.lineno}"
            # What TFDS finds in a folder names the classes that it imports.
            assert not node.func.attr.startswith("builder_from_director"), where
            if node.func.attr == "from_pretrained":
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert given.get("trust_remote_code") == "False", where


def test_every_package_and_module_says_what_it_is():
    for path in _FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), f"{_module(path)} has no docstring"


def test_requirements_and_project_name_the_same_bounds():
    project = (_ROOT / "pyproject.toml").read_text()
    listed = re.findall(r'^  "([a-zA-Z].*)",$', project.split("[project.optional")[0], re.M)
    lines = (_ROOT / "requirements.txt").read_text().splitlines()
    required = [line for line in lines if line and not line.startswith("#")]
    assert sorted(line.replace("jax[tpu]", "jax") for line in required) == sorted(listed)
