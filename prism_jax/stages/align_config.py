"""The configuration of alignment."""

import dataclasses
from typing import Literal

from prism_jax import configuration, discriminator_update, policy_update
from prism_jax.rewards import tags
from prism_jax.stages import policy_rows, rollouts, sampled, setup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Discriminator(configuration.Section):
    """Say which discriminator scores, what it sees, and how it learns.

    Types and attention are those of `config.model`.
    """

    folder: str  # workdir of `warmup` or `align`, or a folder with a score head
    init: Literal["pretrained", "random"]
    sizes: configuration.Sizes | None  # exactly when init is "random"
    remat: Literal["none", "full", "save_attention", "save_attention_and_dots"]
    sees_images: bool  # False: prompts are read without their pictures
    min_pixels: int | None  # of a picture, others are scaled; None: as its folder says
    max_pixels: int | None
    score_clip: float | None
    regulariser: float
    router: float  # coefficient of the router's load balance; of no effect without experts
    rows: rollouts.Rows
    optim: configuration.Optim

    def problems(self) -> list[str]:
        """See `Section`."""
        found = configuration.not_empty(self, "folder")
        found += configuration.at_least(self, 0, "regulariser", "router")
        if (self.sizes is not None) != (self.init == "random"):
            found.append("sizes must be given exactly when init is 'random'")
        if self.score_clip is not None and not self.score_clip > 0:
            found.append(f"score_clip must be > 0 or None, got {self.score_clip}")
        return found

    def model(self, policy: configuration.Model) -> configuration.Model:
        """Return the section of the model, computed as the policy is."""
        return dataclasses.replace(
            policy, folder=self.folder, init=self.init, sizes=self.sizes, remat=self.remat
        )

    def rule(self, model: setup.Model) -> discriminator_update.PairRule:
        """Return the numbers of the pair loss for this discriminator."""
        return discriminator_update.PairRule(
            score_clip=self.score_clip,
            regulariser=self.regulariser,
            router=self.router if model.config.text.moe is not None else 0.0,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advantage(configuration.Section):
    """Weigh the scores; see `losses.advantage.align`."""

    caption_weight: float
    cot_weight: float
    format_penalty: float
    eps: float

    def problems(self) -> list[str]:
        """See `Section`."""
        return configuration.at_least(
            self, 0, "caption_weight", "cot_weight", "format_penalty", "eps"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(configuration.Section):
    """Hold the configuration of the stage."""

    seed: int
    model: configuration.Model  # the policy
    discriminator: Discriminator
    prompts: sampled.Prompts
    gate: tags.Gate  # the format that a response must have
    rollout: rollouts.Rollout
    advantage: Advantage
    algorithm: policy_update.Algorithm
    rows: rollouts.Rows
    train: policy_rows.Train
    optim: configuration.Optim
    mesh: configuration.Mesh
    checkpoint: configuration.Checkpoint
    resume: configuration.Resume
    log: configuration.Log

    def problems(self) -> list[str]:
        """See `Section`."""
        return configuration.at_least(self, 0, "seed")
