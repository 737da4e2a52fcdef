"""What a configuration leaves open and a plan has to assume: models by size, sizes of the data."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from prism_jax import errors
from prism_jax.commands.plan import opening

# Patches in a merged patch, which is one token.
_PATCHES_PER_TOKEN = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given:
    """Values by options of the command; None: from the configuration."""

    model: str | None = None
    discriminator: str | None = None
    teacher: str | None = None
    prompt_tokens: int | None = None
    prompt_patches: int | None = None
    prompt_images: int = 1
    teacher_tokens: int = 6144


def make(
    stage: str,
    config: Mapping[str, Any],
    *,
    size: str,
    machine: str,
    num_slices: int = 1,
    hbm_gigabytes: float | None = None,
    given: Given,
) -> opening.Job:
    """Return the job of a configuration whose argument begins with `size`.

    Without other words the longest prompt is as long as the configuration allows, and nothing but
    pictures, within its bound on pixels.

    Raises:
      InputError: no model is named, neither by a folder nor by the size; or one that is not there.
    """
    tokens = given.prompt_tokens
    if tokens is None:
        tokens = config.get("prompts", {}).get("max_prompt_tokens")
    if tokens is None:
        # Demonstrations and pairs: a quarter of their longest is prompt.
        tokens = config["data"].get("max_tokens", config["data"].get("row_tokens")) // 4
    patches = given.prompt_patches
    if patches is None:
        patches = _PATCHES_PER_TOKEN * tokens
    return opening.Job(
        stage=stage,
        config=config,
        machine=machine,
        num_slices=num_slices,
        hbm_gigabytes=hbm_gigabytes,
        models=_models(stage, config, size, given),
        bounds={
            "prompt_tokens": tokens,
            "prompt_patches": patches,
            "prompt_images": given.prompt_images,
            "teacher_tokens": given.teacher_tokens,
        },
    )


def _models(stage: str, config: Mapping[str, Any], size: str, given: Given) -> dict[str, str]:
    """Return the name or folder of each model."""
    named = {"policy": given.model, "discriminator": given.discriminator, "teacher": given.teacher}
    sections = opening.sections(stage, config)
    for role, model in named.items():
        if model is not None and role not in sections:
            option = "--model" if role == "policy" else f"--{role}"
            raise errors.InputError(
                f"{option}={model}: this {stage} has no {role}, only {', '.join(sections)}"
            )
    models = {}
    for role, section in sections.items():
        values: Any = config
        for name in section.split("."):
            values = values[name]
        folder = named[role] or values["folder"]
        usual = "discriminator" if role == "discriminator" else size
        if not folder and (usual not in opening.MODELS or size not in opening.MODELS):
            raise errors.InputError(
                f"config.{section}.folder names no model, and the size {size!r} is none of "
                f"{', '.join(opening.MODELS)}: give "
                f"{'--model' if role == 'policy' else f'--{role}'}"
            )
        models[role] = folder or usual
    return models
