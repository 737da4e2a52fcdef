"""The programs of the commands that sample from a policy: evaluate, pairs."""

from collections.abc import Mapping
from typing import Any

from prism_jax import configuration
from prism_jax.commands.ask import parts as ask_parts
from prism_jax.policy import programs as policy_programs
from prism_jax.policy import rollouts
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.setup import programs


def model_of(options: Any) -> configuration.Model:
    """Return the policy's section as that of a model."""
    policy = options.policy
    return configuration.Model(
        folder=policy.folder,
        init="pretrained",
        sizes=None,
        dtype=policy.dtype,
        param_dtype=policy.dtype,
        attention=policy.attention,
        remat="none",
        lora=configuration.NO_LORA,
        step=policy.step,
    )


def programs_of(
    options: Any,
    devices: devices_lib.Devices,
    models: Mapping[str, setup_models.Model],
    bounds: programs.Bounds,
) -> list[programs.Program]:
    """Return prefill and decoding of a batch, the weights in the form of decoding alone."""
    model = models["policy"]
    bounds = bounds.within(options.prompts.max_pixels, model.config)
    prompts = ask_parts.batch_prompts(
        options.batch_responses, num_responses=1, row_parts=devices.row_parts()
    )
    drawn = rollouts.Rollout(
        num_prompts=prompts,
        num_responses=1,
        batch_responses=None,
        tensor=None,
        max_response_tokens=options.max_tokens,
        temperature=options.sampling.temperature,
        top_k=options.sampling.top_k,
        top_p=options.sampling.top_p,
        is_cut_allowed=True,
        chunk_tokens=64,
        dump_every_steps=None,
    )
    return policy_programs.sampler(drawn, model, devices, bounds, beside={})
