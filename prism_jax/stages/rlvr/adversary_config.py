"""The configuration of the adversarial term; see `stages.rlvr.adversary`."""

import dataclasses

from prism_jax import configuration
from prism_jax.discriminator import section as section_lib
from prism_jax.discriminator import segments
from prism_jax.losses import groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adversary(configuration.Section):
    """A discriminator beside the reward."""

    discriminator: section_lib.Discriminator
    coefficient: float  # of its advantages, in the first step
    end_coefficient: float | None  # from the step after `decay_steps` on; both or none are given
    decay_steps: int | None
    updates: int  # of the discriminator in a step
    caption_weight: float | None  # of the segments of the view; None for any other
    cot_weight: float | None
    response_weight: float | None
    eps: float
    scale: groups.Kind  # see `losses.groups`
    std_floor: float | None

    @property
    def weights(self) -> dict[str, float]:
        """Return the weights by segment."""
        weights = {
            "caption": self.caption_weight,
            "cot": self.cot_weight,
            "response": self.response_weight,
        }
        return {name: weight for name, weight in weights.items() if weight is not None}

    def coefficient_at(self, step: int) -> float:
        """Return the coefficient of a step, counted from 1."""
        if self.decay_steps is None:
            return self.coefficient
        done = min(1.0, (step - 1) / self.decay_steps)
        return (1.0 - done) * self.coefficient + done * self.end_coefficient

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = configuration.at_least(self, 0, "coefficient", "end_coefficient", "eps")
        problems += configuration.at_least(self, 1, "decay_steps", "updates")
        if (self.end_coefficient is None) != (self.decay_steps is None):
            problems.append("end_coefficient and decay_steps: both or none must be given")
        names = segments.VIEWS[self.discriminator.view]
        if set(self.weights) != set(names):
            problems.append(
                f"must have a weight for each of {', '.join(names)}, the segments of the view "
                f"{self.discriminator.view}, got {', '.join(self.weights)}"
            )
        steadying = self.discriminator.steadying
        if steadying.ema_decay is not None or steadying.replay_prompts is not None:
            problems.append(
                "discriminator.steadying: ema_decay and replay_prompts must be None in rlvr"
            )
        if self.discriminator.microbatch_pairs is not None:
            problems.append("discriminator.microbatch_pairs must be None in rlvr")
        return problems
