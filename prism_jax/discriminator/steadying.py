"""Options that keep a discriminator which learns with the policy from running away."""

import dataclasses

from prism_jax import configuration
from prism_jax.discriminator import penalty as penalty_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steadying(configuration.Section):
    """The stabilisers of the discriminator's updates and of the scores that reward the policy."""

    # See `discriminator.penalty`; both or none are given. arXiv 1801.04406, 2501.08316.
    gradient_penalty: float | None
    penalty_noise: float | None
    # The policy is rewarded by a float32 mean of the discriminator's weights over its updates,
    # d · mean + (1 − d) · weights; None: by the discriminator itself. It takes the memory of a
    # float32 copy, and each step scores twice. arXiv 1806.04498.
    ema_decay: float | None
    # Prompts of earlier steps, with the responses of the policy as it was then, from which the
    # discriminator learns again in each step; both or none are given. arXiv 1612.07828 §2.3.
    replay_prompts: int | None
    replay_steps: int | None  # age of the oldest of them

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = configuration.at_least(self, 0, "gradient_penalty")
        problems += configuration.at_least(self, 1, "replay_prompts", "replay_steps")
        if (self.gradient_penalty is None) != (self.penalty_noise is None):
            problems.append("gradient_penalty and penalty_noise: both or none must be given")
        if (self.replay_prompts is None) != (self.replay_steps is None):
            problems.append("replay_prompts and replay_steps: both or none must be given")
        if self.penalty_noise is not None and not self.penalty_noise > 0:
            problems.append(f"penalty_noise must be > 0, got {self.penalty_noise}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            problems.append(f"ema_decay must be in (0, 1) or None, got {self.ema_decay}")
        return problems

    @property
    def penalty(self) -> penalty_lib.Penalty | None:
        """Return the gradient penalty; None: there is none."""
        if self.gradient_penalty is None:
            return None
        return penalty_lib.Penalty(coefficient=self.gradient_penalty, noise=self.penalty_noise)
