"""A step of RLVR as `python -m prism_jax rlvr` makes it, on forced lengths and random weights.

The configuration is `configs/rlvr.py:4b_one_gpu` with the sizes of the work. In the step are the
sampler's copy of the weights, the rollout, rewards and advantages, packing and the update; left out
are the prompts' files and the judge, which others do while the device works.
"""

import dataclasses
import json
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from benchmarks import kernel_times, sizes
from models import inputs
from prism_jax import configuration
from prism_jax.data import encode
from prism_jax.policy import batch as policy_batch
from prism_jax.policy import rollouts
from prism_jax.rollout import layout, serving
from prism_jax.rows import Continuation
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.rlvr import advantages as rlvr_advantages
from prism_jax.stages.rlvr import config as rlvr_config
from prism_jax.stages.rlvr import updates as rlvr_updates

_ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """The responses of a step, in order those of a prompt."""

    prompts: int
    responses: int  # to each prompt
    lengths: tuple[int, ...]
    side: int  # of the picture in a prompt, in patches
    row_tokens: int
    row_sequences: int


def options_of(size: str, work: Work) -> rlvr_config.Config:
    """Return the configuration of the step."""
    file = _ROOT / "configs" / "rlvr.py"
    sized = {
        "rollout.num_prompts": work.prompts,
        "rollout.num_responses": work.responses,
        "rollout.max_response_tokens": max(work.lengths),
        "rollout.batch_responses": len(work.lengths),
        "rows.row_tokens": work.row_tokens,
        "rows.row_sequences": work.row_sequences,
        "rows.num_rows": 1,
        "rows.has_shared_prompts": True,
        # Neither is read.
        "model.folder": "none",
        "prompts.path": "none",
    }
    config, _ = configuration.read(
        [
            f"--config={file}:{size if size == 'tiny' else f'{size}_one_gpu'}",
            "--workdir=none",
            *(f"--config.{name}={value}" for name, value in sized.items()),
        ],
        command="rlvr",
    )
    options = configuration.parse(rlvr_config.Config, config)
    return dataclasses.replace(options, model=dataclasses.replace(options.model, init="random"))


def _open_model(
    size: str, options: rlvr_config.Config, devices: devices_lib.Devices
) -> setup_models.Model:
    with tempfile.TemporaryDirectory() as folder:
        files = pathlib.Path(folder)
        (files / "config.json").write_text(json.dumps(sizes.config_json(sizes.SIZES[size])))
        return setup_models.open_model(options.model, devices, files=files, is_discriminator=False)


def _prompts(size: str, work: Work) -> list[inputs.Example]:
    example = sizes.example(sizes.SIZES[size], side=work.side)
    pixels = np.random.default_rng(0).integers(0, 256, example["pixels"].shape, np.uint8)
    prompt = inputs.Example(
        tokens=example["tokens"].astype(np.int32),
        token_types=example["token_types"].astype(np.int32),
        grids=[tuple(int(n) for n in example["grids"][0])],
        pixels=[pixels],
    )
    return [prompt] * work.prompts


class Step:
    """The parts of the step; everything is compiled by the first call."""

    def __init__(self, size: str, work: Work):
        """Make weights and moments on the first device."""
        options = options_of(size, work)
        self._work, self._options = work, options
        # One device, whatever else the machine has.
        mesh = dataclasses.replace(options.mesh, num_devices=1)
        self._devices = devices_lib.open_devices(mesh, options.model)
        self._model = _open_model(size, options, self._devices)
        self._prompts = _prompts(size, work)
        example = self._prompts[0]
        extent = encode.Size(tokens=len(example.tokens), patches=len(example.pixels[0]), images=1)
        optimizer = setup_models.make_optimizer(options.optim, self._model.params, num_steps=100)
        start = setup_models.start_of(
            self._model, optimizer, self._devices, key=jax.random.key(options.seed)
        )
        self._shape = rlvr_updates.shape_of(options, [extent], self._devices)
        self._update = rlvr_updates.make_update(
            options, self._devices, self._model, optimizer, start, self._shape
        )
        self._engine = rollouts.open_engine(options.rollout, self._model, self._devices, [extent])
        self._compare = rlvr_advantages.make_advantage(options.advantage, num_groups=work.prompts)
        self._state = start.make()

    def __call__(self, number: int) -> dict[str, Any]:
        """Train one step and return its seconds by part."""
        stamps = [time.perf_counter()]
        rollout = self._respond(jax.random.key(number))
        stamps.append(time.perf_counter())
        batch = self._pack(rollout)
        stamps.append(time.perf_counter())
        self._state, logged = self._update(self._state, batch, jax.random.key(number))
        jax.block_until_ready((self._state, logged))
        stamps.append(time.perf_counter())
        stats = self._devices.mesh.devices.flat[0].memory_stats() or {}
        seconds = dict(zip(("rollout", "pack", "update"), np.diff(stamps).tolist(), strict=True))
        return {
            "step": number,
            "seconds": stamps[-1] - stamps[0],
            "seconds_by_part": seconds,
            "tokens": int(rollout.lengths.sum()),
            "peak_gigabytes": stats.get("peak_bytes_in_use", 0) / 1e9,
        }

    def _respond(self, key: jax.Array) -> Any:
        devices = self._devices
        mesh = layout.mesh(devices.mesh, tensor=1)
        graphdef, params = serving.prepare(
            self._model.graphdef,
            self._state.params,
            dtype=devices.dtype,
            donate=False,
            mesh=mesh,
            rules=devices.rules,
        )
        sampler = dataclasses.replace(self._engine, graphdef=graphdef, mesh=mesh)
        rollout = sampler.generate(
            params,
            self._prompts,
            # Without end tokens a response ends at its limit alone.
            self._options.rollout.sampling(ends=()),
            key,
            num_responses=self._work.responses,
            limits=list(self._work.lengths),
        )
        if tuple(rollout.lengths.tolist()) != self._work.lengths:
            raise RuntimeError("a response did not reach its limit")
        return rollout

    def _pack(self, rollout: Any) -> policy_batch.PolicyBatch:
        """Return the batch, on the device; every second response of a group has a reward."""
        numbers = np.arange(len(rollout.lengths))
        groups = numbers // self._work.responses
        advantages = np.asarray(self._compare((numbers % 2).astype(np.float32), groups))
        batch = policy_batch.on_policy_batch(
            self._prompts,
            [
                Continuation(prompt=int(group), tokens=rollout.tokens[n, :length])
                for n, (group, length) in enumerate(zip(groups, rollout.lengths, strict=True))
            ],
            [rollout.logprobs[n, :length] for n, length in enumerate(rollout.lengths)],
            advantages,
            self._shape,
            self._model.config,
        )
        return self._devices.put(batch, num_rows=self._shape.microbatch_rows)


def steps(size: str, work: Work, *, num_steps: int) -> Iterator[dict[str, Any]]:
    """Yield the times of steps, the first of which compiles."""
    step = Step(size, work)
    for number in range(1, num_steps + 1):
        timed = step(number)
        kernel_times.report({"ours": timed})
        yield timed
