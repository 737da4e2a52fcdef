"""What the tests of a stage's fields share: tables of changes, what probes see, and a few probes.

A table says which probe sees which field: {probe: {field: (changes before, changes after)}}.
"""

import contextlib
import dataclasses
import pathlib
import subprocess
import tempfile
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx

from prism_jax import configuration, errors, progress
from prism_jax.checkpoints import checkpoint
from prism_jax.data import paths, steps
from prism_jax.policy import rollouts
from prism_jax.rewards import score, workers
from prism_jax.rollout import engine, serving
from prism_jax.running import loop, metric_writers
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models

Changes = Mapping[str, Any]
Fields = dict[str, tuple[Changes, Changes]]
Table = Mapping[Callable, Fields]

_OPTIM = {
    "schedule": {"schedule": "linear", "end_factor": 0.5},
    "peak": {"peak": 0.5},
    "warmup_steps": {"warmup_steps": 2, "warmup_fraction": None},
    "warmup_fraction": {"warmup_fraction": 0.5},
    "end_factor": ({"schedule": "linear", "end_factor": 0.5}, {"end_factor": 0.1}),
    "b1": {"b1": 0.5},
    "b2": {"b2": 0.5},
    "eps": {"eps": 0.1},
    "weight_decay": {"weight_decay": 0.5},
    "no_decay": {"no_decay": ()},
    "frozen": {"frozen": ("a/.*",)},
    "factors": {"factors": (("a/.*", 0.1),)},
    "clip_norm": {"clip_norm": 0.1},
    "mu_dtype": {"mu_dtype": "bfloat16"},
    "nu_dtype": {"nu_dtype": "bfloat16"},
    "kind": {"kind": "lion", "eps": None, "nu_dtype": None},
    "rounding": ({"mu_dtype": "bfloat16"}, {"rounding": "stochastic"}),
    "memory": {"memory": "host"},
}
# An optimizer in which each of these shows on the parameters of `moved`.
_GENTLE = {"no_decay": (".*/scale",), "peak": 0.01, "weight_decay": 0.1, "schedule": "constant"}
_GENTLE |= {"end_factor": 1.0, "warmup_fraction": 0.0}
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 32,
    "rope_theta": 5e5,
    "tie_word_embeddings": False,
    "vision_hidden_size": 64,
    "vision_intermediate_size": 32,
    "vision_num_layers": 2,
    "vision_num_heads": 2,
    "vision_num_position_embeddings": 64,
    "vision_deepstack_layers": (),
    "initializer_range": 0.1,
}


def at(prefix: str, changes: Changes) -> dict[str, Any]:
    """Return changes of the fields of a section."""
    return {prefix + name: value for name, value in changes.items()}


def each(changes: Changes, *, before: Changes | None = None) -> Fields:
    """Return every one of these changes by itself, all after the same ones."""
    start = dict(before or {})
    return {name: (start, start | {name: value}) for name, value in changes.items()}


def optim(prefix: str) -> Fields:
    """Return the fields of an optimizer, for `moved`."""
    found = {}
    for name, change in _OPTIM.items():
        before, after = change if isinstance(change, tuple) else ({}, change)
        start = at(prefix, _GENTLE | before)
        found[prefix + name] = (start, start | at(prefix, after))
    return found


def sizes(prefix: str) -> Fields:
    """Return the fields of the sizes of a new model, for `shapes`."""
    return each(at(prefix, _SIZES))


def cuts() -> Fields:
    """Return the fields that cut the vocabulary that is drawn from, for `asked_of_the_engine`."""
    changes = {"rollout.top_k": 5, "rollout.top_p": 0.5}
    return each(changes, before={"rollout.is_cut_allowed": True})


def mesh() -> Fields:
    """Return the fields of the mesh that one process can show, for `placed`."""
    two = {"mesh.num_devices": 2, "mesh.axes.data": 1, "mesh.axes.fsdp": -1}
    others = ("data", "tensor", "expert")
    found = each({f"mesh.axes.{name}": 2 for name in others}, before=two)
    rest = {"mesh.num_devices": 2, "mesh.axes.data": -1, "mesh.axes.fsdp": 1}
    found |= each({"mesh.axes.fsdp": 2}, before=rest)
    found |= each({"mesh.max_fsdp": 1}, before=rest | {"mesh.axes.fsdp": -1})
    return found | each({"mesh.num_devices": 2, "mesh.rules": (("mlp", None),)})


def model_types() -> Fields:
    """Return the fields of a trained model that say how it is computed, for `placed`."""
    found = each({"model.dtype": "bfloat16"})
    return found | each({"model.param_dtype": "bfloat16"}, before={"model.dtype": "bfloat16"})


def moved(options: configuration.Optim) -> Any:
    """Return where four steps of an optimizer take two parameters."""
    params = nnx.State(
        {"a": {"scale": nnx.Param(jnp.ones(3))}, "b": {"kernel": nnx.Param(jnp.ones(3))}}
    )
    optimizer = setup_models.make_optimizer(options, params, num_steps=4)
    trainable, frozen = optimizer.split(params)
    state = optimizer.init(trainable)
    for step in range(4):
        size = jnp.array([3.0, 1e-4, -1.0]) * (step + 1)
        grads = jax.tree.map(lambda x, size=size: x * size, trainable)
        trainable, state, _ = optimizer.update(
            grads,
            state,
            trainable,
            step=jnp.int32(step),
            is_finite=jnp.array(True),
            is_empty=jnp.array(False),
            key=jax.random.key(step),
        )
    return trainable, state.inner, len(nnx.to_flat_state(frozen)), optimizer.memory


def placed(devices: devices_lib.Devices) -> Any:
    """Return how everything is computed on devices."""
    shape = sorted(devices.mesh.shape.items())
    return shape, devices.mesh.size, devices.dtype, devices.param_dtype, devices.rules


def lora() -> Fields:
    """Return the fields of adapters, for `shapes`."""
    changes = {"model.lora.alpha": 1.0, "model.lora.targets": (".*text/layers/attn/q",)}
    found = each(changes, before={"model.lora.rank": 2})
    return found | each({"model.lora.rank": 2})


def shapes(model: setup_models.Model) -> Any:
    """Return the configuration and the shapes of a model, and how its adapters are scaled."""
    lora = model.source.lora
    scale = None if lora.rank is None else lora.alpha / lora.rank
    return model.config, scale, jax.tree.map(lambda x: (x.shape, str(x.dtype)), model.params)


def parsed(
    kind: type[configuration.Section], config: ml_collections.ConfigDict, changes: Changes
) -> configuration.Section:
    """Change fields of a configuration, those of another type included, and return its struct."""
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict(dict(changes))
    return configuration.parse(kind, config)


def outcome(look: Callable[[], Any], workdir: pathlib.Path) -> Any:
    """Return what a probe sees, in a form that is compared bit for bit; a refusal is its text.

    Args:
      workdir: of the probe, another one each time: no part of what a refusal says.
    """
    try:
        found = look()
    except errors.InputError as error:
        return str(error).replace(str(workdir), "WORKDIR")
    leaves, structure = jax.tree.flatten(found)
    told = [
        (str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes())
        if isinstance(leaf, np.ndarray | jax.Array)
        else repr(leaf)
        for leaf in leaves
    ]
    return told, str(structure)


def fields(kind: type[configuration.Section], prefix: str = "") -> set[str]:
    """Return the paths of all fields, those of sections that may be absent included."""
    found = set()
    for field in dataclasses.fields(kind):
        options = [field.type, *typing.get_args(field.type)]
        section = [x for x in options if isinstance(x, type) and dataclasses.is_dataclass(x)]
        path = prefix + field.name
        found |= fields(section[0], f"{path}.") if section else {path}
    return found


def cases(table: Table, *, prefix: str = "") -> list:
    """Return a test case for each field of a table: probe, before, after."""
    return [
        pytest.param(probe, *states, id=prefix + field)
        for probe, seen in table.items()
        for field, states in seen.items()
    ]


def seen(table: Table) -> set[str]:
    """Return the fields of a table."""
    return {field for own in table.values() for field in own}


def named(elsewhere: Mapping[str, tuple[str, ...]]) -> set[str]:
    """Return the fields that other tests see, each named once."""
    found = [field for own in elsewhere.values() for field in own]
    assert len(found) == len(set(found)), "a field is named twice"
    return set(found)


def assert_differs(base: Any, found: Any, *, may_refuse: bool) -> None:
    """Fail where a change shows nothing, or where a refusal is what shows by mistake."""
    assert found != base
    assert may_refuse or not isinstance(base, str), base
    assert may_refuse or not isinstance(found, str), found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given:
    """The inputs of a probe."""

    config: ml_collections.ConfigDict
    options: Any  # the same, as the struct of the stage
    folder: pathlib.Path  # of the module's files
    workdir: pathlib.Path  # empty


def asked_of_the_loop(main: Callable[[list[str]], None], given: Given) -> list[Any]:
    """Return what the command of a training stage asks of checkpoints, logs and the loop.

    These are left out; their effects are tested in tests/checkpoints and tests/running, and in
    test_progress.py.
    """
    asked = []

    def told(name, result=None):
        def tell(*_, **options):
            # An identity repeats the whole configuration: it would differ whatever a stage does.
            rest = {key: value for key, value in options.items() if key in _ASKED}
            asked.append((name, sorted(rest.items())))
            return result

        return tell

    saver = types.SimpleNamespace(finish=lambda summary: None)
    writer = types.SimpleNamespace(close=lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        read = (given.config, str(given.workdir))
        patch.setattr(configuration, "read", lambda argv, command: read)
        opened = told("save", contextlib.nullcontext(saver))
        patch.setattr(checkpoint, "Checkpointer", opened)
        patch.setattr(loop, "restore_or_make", told("restore", (None, 0)))
        patch.setattr(metric_writers, "WeightsAndBiases", told("publish", writer))
        patch.setattr(progress, "Progress", told("show", writer))
        patch.setattr(
            loop,
            "run",
            lambda *_, key, limits, save_every_minutes, **__: asked.append(
                (limits, save_every_minutes, jax.random.key_data(key))
            ),
        )
        main([])
    return asked


_ASKED = ("seed", "save_every_steps", "num_kept", "allow_mismatch", "step", "project", "num_steps")
_ASKED += ("line_every_steps",)
OF_THE_LOOP = each(
    {
        "seed": 1,
        "train.num_steps": 3,
        "train.max_skipped_in_row": 7,
        "checkpoint.save_every_steps": 5,
        "checkpoint.save_every_minutes": 3.0,
        "checkpoint.num_kept": 9,
        "resume.step": 1,
        "resume.allow_mismatch": True,
        "log.line_every_steps": 4,
        "log.wandb_project": "a project",
    }
)


@contextlib.contextmanager
def a_store(folder: pathlib.Path) -> Iterator[None]:
    """Let the folder `store` play an object store, from which rows are not read in place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "is_remote", lambda name: name == str(folder / "store"))
        yield


HELD_OUT = tuple(
    f"held_out.{name}"
    for name in ("path", "every_steps", "num_prompts", "num_responses", "temperature")
)
HELD_OUT += ("held_out.is_best_kept", "held_out.patience")
_TWO_DEVICES = {"mesh.num_devices": 2}
ROLLOUT_MESH = {"rollout.tensor": (_TWO_DEVICES, _TWO_DEVICES | {"rollout.tensor": 2})}


def asked_of_the_engine(sampler: rollouts.Sampler, num_prompts: int) -> Any:
    """Return what a step of a sampler asks of the engine."""
    found = []

    def generate(self, params, prompts, sampling, key, *, num_responses):
        found.append((self.chunk_tokens, self.num_slots, dict(self.mesh.shape)))
        found.append((sampling, num_responses, len(prompts)))
        empty = np.zeros((0, 1))
        return engine.Rollout(tokens=empty, logprobs=empty, lengths=empty[:, 0], ended=empty[:, 0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Engine, "generate", generate)
        patch.setattr(serving, "prepare", lambda graphdef, params, **_: (graphdef, params))
        sampler(nnx.State({}), [None] * num_prompts, jax.random.key(0))
    return found


def judged(open_judge: Callable[[], workers.JudgePool], tasks: Sequence[score.Task]) -> Any:
    """Return what a judge says of tasks that need no mathematics, and the processes it starts."""
    started = []
    start = subprocess.Popen

    def popen(command, **options):
        started.append(command[-2:])  # seconds and bytes
        return start(command, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", popen)
        with open_judge() as judge:
            return judge.grade(tasks), started


def threads_ahead(look: Callable[[], Any]) -> list[int]:
    """Return how many threads make the steps ahead that are opened meanwhile."""
    found = []
    make = steps.Steps

    def opened(*args, num_threads, **options):
        found.append(num_threads)
        return make(*args, num_threads=num_threads, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "Steps", opened)
        look()
    return found


class Seen:
    """Compare what a probe sees before and after a change; what it saw before is remembered."""

    def __init__(
        self,
        kind: type[configuration.Section],
        configure: Callable[[pathlib.Path], ml_collections.ConfigDict],
        folder: pathlib.Path,
        *,
        refusing: Collection[str],
    ):
        """Look at the configurations that `configure` makes of a folder, with changes.

        Args:
          refusing: fields that may show by what is refused.
        """
        self._kind, self._configure, self._folder = kind, configure, folder
        self._refusing = frozenset(refusing)
        self._known: dict[Any, Any] = {}

    def look(self, probe: Callable[[Given], Any], changes: Changes) -> Any:
        """Return what a probe sees; a text that begins with "@" is a path in the folder."""
        workdir = pathlib.Path(tempfile.mkdtemp(dir=self._folder))
        config = self._configure(self._folder)
        changes = {name: self._placed(value) for name, value in changes.items()}
        options = parsed(self._kind, config, changes)
        given = Given(config=config, options=options, folder=self._folder, workdir=workdir)
        return outcome(lambda: probe(given), workdir)

    def base(self, probe: Callable[[Given], Any], changes: Changes) -> Any:
        """Return what a probe sees, from memory where it saw it before."""
        known = probe, repr(sorted(changes.items()))
        if known not in self._known:
            self._known[known] = self.look(probe, changes)
        return self._known[known]

    def assert_change_shows(
        self, probe: Callable[[Given], Any], before: Changes, after: Changes
    ) -> None:
        """Fail when the change shows nothing, or shows as a refusal of something else."""
        may_refuse = bool(self._refusing & {*before, *after})
        base, found = self.base(probe, before), self.look(probe, after)
        assert_differs(base, found, may_refuse=may_refuse)

    def _placed(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self._placed(one) for one in value)
        is_path = isinstance(value, str) and value.startswith("@")
        return str(self._folder / value[1:]) if is_path else value
