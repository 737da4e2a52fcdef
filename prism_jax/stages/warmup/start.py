"""The initial discriminator: a trunk with a new head, or a discriminator to train further."""

import dataclasses

import jax
from flax import nnx

from prism_jax import errors, progress
from prism_jax.checkpoints import model_files, pretrained
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.training import optim, train_state


def start_of(
    model: setup_models.Model,
    optimizer: optim.Optimizer,
    devices: devices_lib.Devices,
    *,
    key: jax.Array,
) -> setup_models.Start:
    """Return the initial state.

    A folder without a score head provides only the trunk; the head is new.
    """
    start = setup_models.start_of(model, optimizer, devices, key=key)
    folder = model.source.folder
    if model.source.init == "random" or _holds_discriminator(folder):
        return start

    def make() -> train_state.TrainState:
        trunk = _open_policy(model, devices)
        params = {
            ("trunk", *path): leaf
            for path, leaf in nnx.to_flat_state(setup_models.load_params(trunk, devices))
            # A discriminator has a score head in place of the language model's.
            if path[:2] != ("text", "head")
        }
        places = dict(nnx.to_flat_state(start.shardings.params))
        path = ("score", "kernel")
        # Made directly in its shards, from the run's key.
        params[path] = jax.jit(
            lambda key: model.build(nnx.Rngs(key)).score.kernel, out_shardings=places[path]
        )(key)
        progress.say(f"trunk read from {folder}, the score head is new")
        return train_state.from_params(
            nnx.from_flat_state(sorted(params.items())), optimizer, shardings=start.shardings
        )

    return dataclasses.replace(start, make=make)


def _holds_discriminator(folder: str) -> bool:
    """Return whether there is a discriminator to train further; a run of two models has one."""
    if not model_files.is_run(folder):
        return pretrained.Source.of(folder).is_discriminator
    try:
        return pretrained.Source.of(folder, role="discriminator").is_discriminator
    except errors.InputError:
        # A run without a discriminator has a policy; anything else raises here.
        return pretrained.Source.of(folder, role="policy").is_discriminator


def _open_policy(model: setup_models.Model, devices: devices_lib.Devices) -> setup_models.Model:
    """Return the policy from which the trunk is taken."""
    build = setup_models.builder(model.config, devices, is_discriminator=False, lora=None)
    graphdef, params = train_state.abstract_params(build, param_dtype=devices.param_dtype)
    return dataclasses.replace(
        model, build=build, graphdef=graphdef, params=params, is_discriminator=False
    )
