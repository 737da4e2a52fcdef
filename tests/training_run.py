"""A run's folder as a stage leaves it: checkpoints of parameters, and the model's small files."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import sharding
from prism_jax import small_files
from prism_jax.checkpoints import best_step, checkpoint, model_files, pretrained
from prism_jax.checkpoints import meta as checkpoint_meta
from prism_jax.training import train_state


def params_of(folder: pathlib.Path) -> nnx.State:
    """Return a checkpoint folder's parameters, float32."""
    source = pretrained.Source.of(folder)
    _, config = pretrained.config_of(source.files)
    _, params = pretrained.abstract(
        config,
        is_discriminator=source.is_discriminator,
        rules=sharding.REPLICATED,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
    )
    return source.load(params, shardings=None, param_dtype=jnp.float32)


def write(
    workdir: pathlib.Path,
    *,
    models: dict[str, pathlib.Path],
    steps: tuple[int, ...],
    finished: bool,
    config: dict | None = None,
) -> pathlib.Path:
    """Write a run that starts from these folders; every step adds 1/64 to every parameter.

    Args:
      models: the one model under "", or folders for "policy" and "discriminator".
      config: of the run; None: an empty one.
    """
    identity = checkpoint_meta.RunIdentity(
        project_version="0", stage="test", config=config or {}, model_config={}, may_differ=()
    )
    states = {name: _state(folder) for name, folder in models.items()}
    folders = {"": "model", "policy": "model", "discriminator": "discriminator"}
    for name, folder in models.items():
        model_files.copy(folder, workdir / folders[name])
    with checkpoint.Checkpointer(
        str(workdir),
        identity=identity,
        seed=0,
        save_every_steps=1,
        num_kept=len(steps),
        allow_mismatch=False,
    ) as checkpointer:
        for step in steps:
            moved = {name: _moved(state, step) for name, state in states.items()}
            checkpointer.save(step, moved.get("", moved), data_position={})
        if finished:
            checkpointer.finish({})
        checkpointer.wait()
    return workdir


def name_best(workdir: pathlib.Path, step: int) -> None:
    """Name a step in `best.json`, as `running.best` does."""
    named = {"step": step, "metric": "eval/accuracy", "value": 0.5}
    small_files.write(workdir / best_step.NAME, named | {"evaluations": [[step, 0.5]]})


def moved(params: nnx.State, step: int) -> nnx.State:
    """Return the parameters as `write` keeps them at a step."""
    return jax.tree.map(lambda x: x + np.float32(step / 64), params)


def _state(folder: pathlib.Path) -> train_state.TrainState:
    params = params_of(folder)
    moments = jax.tree.map(jnp.zeros_like, params)
    return train_state.TrainState(step=jnp.int32(0), params=params, opt_state=moments)


def _moved(state: train_state.TrainState, step: int) -> train_state.TrainState:
    return train_state.TrainState(
        step=jnp.int32(step), params=moved(state.params, step), opt_state=state.opt_state
    )
