"""How the discriminator of the adversarial term is opened; see `stages.rlvr.adversary`."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from prism_jax import metrics
from prism_jax.checkpoints import model_files
from prism_jax.data import processor
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.discriminator import opening, step_scores
from prism_jax.discriminator import updates as discriminator_updates
from prism_jax.rows import RowShape
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.setup import prompts as prompts_lib
from prism_jax.stages.rlvr import adversary as rlvr_adversary
from prism_jax.stages.rlvr import config as rlvr_config

PolicyUpdate = Callable[[Any, Any, jax.Array], tuple[Any, metrics.Metrics]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """The discriminator and how it reads."""

    model: setup_models.Model
    files: pathlib.Path

    def cutter(self, options: rlvr_config.Config, words: processor.Processor) -> opening.Cutter:
        """Return the rule that cuts texts; a response has the format of the judge."""
        return opening.open_cutter(
            options.adversary.discriminator,
            self.model,
            words,
            files=self.files,
            gate=options.rewards.judge,
            place="config.adversary.discriminator",
        )


def open_model(
    options: rlvr_config.Config, devices: devices_lib.Devices, folder: pathlib.Path
) -> Opened | None:
    """Return the discriminator, nothing of it in memory yet; None where there is none."""
    if options.adversary is None:
        return None
    source = options.adversary.discriminator.model(options.model)
    files = setup_models.keep_files(
        source, folder, name=model_files.DISCRIMINATOR_FOLDER, is_discriminator=True
    )
    model = setup_models.open_model(source, devices, files=files, is_discriminator=True)
    return Opened(model=model, files=files)


def open_parts(
    options: rlvr_config.Config,
    devices: devices_lib.Devices,
    opened: Opened,
    cutter: opening.Cutter,
    prompts: prompts_lib.Opened,
    start: setup_models.Start,
    update_policy: PolicyUpdate,
    *,
    key: jax.Array,
) -> tuple[rlvr_adversary.Scoring, rlvr_adversary.Updates, setup_models.Start]:
    """Return the scoring, the updates and the beginning of the state of both models.

    Args:
      start: of the policy.
      key: of a new discriminator.
    """
    adversary, model = options.adversary, opened.model
    section = adversary.discriminator
    # From all prompts at once: every step then has one shape, and is compiled once.
    shape: RowShape = cutter.shape(
        cutter.measure(prompts),
        devices,
        num_prompts=options.rollout.num_prompts,
        num_responses=options.rollout.num_responses,
        max_response_tokens=options.rollout.max_response_tokens,
        place="config.adversary.discriminator",
    )
    settings = discriminator_updates.settings_of(section, devices)
    # The schedule counts updates, of which the discriminator may have several in a step.
    optimizer = setup_models.make_optimizer(
        section.optim, model.params, num_steps=options.train.num_steps * adversary.updates
    )
    own_start = setup_models.start_of(model, optimizer, devices, key=key)
    rule = section.rule(model)
    scorer = step_scores.Scorer(
        cutter,
        devices,
        model,
        shape=shape,
        score=discriminator_loss.make_scorer(model.graphdef, settings),
    )
    return (
        rlvr_adversary.Scoring(adversary, cutter, scorer, credit=options.advantage.credit),
        rlvr_adversary.Updates(
            policy=update_policy,
            discriminator=discriminator_updates.make_update(
                rule, settings, model, optimizer, own_start, shape
            ),
            refresh=discriminator_updates.make_refresh(rule, settings, model),
            num_updates=adversary.updates,
            # Scores are computed without dropout, so an update with it needs others.
            is_always_fresh=section.head_dropout > 0,
        ),
        setup_models.together({"policy": start, "discriminator": own_start}),
    )
