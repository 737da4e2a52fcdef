"""The configuration of white-box distillation; see `stages.rlvr.distill`."""

import dataclasses

from prism_jax import configuration


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill(configuration.Section):
    """An open teacher beside the reward, or in its place."""

    # Hugging Face folder, converted folder, or workdir of a stage; None: there is no teacher.
    folder: str | None = configuration.free()
    coefficient: float | None  # of its advantages, in the first step; given exactly with `folder`
    end_coefficient: float | None  # from the step after `decay_steps` on; both or none are given
    decay_steps: int | None
    has_reward: bool  # False: the policy learns from the teacher alone

    def coefficient_at(self, step: int) -> float:
        """Return the coefficient of a step, counted from 1."""
        if self.decay_steps is None:
            return self.coefficient
        done = min(1.0, (step - 1) / self.decay_steps)
        return (1.0 - done) * self.coefficient + done * self.end_coefficient

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = configuration.at_least(self, 0, "coefficient", "end_coefficient")
        problems += configuration.at_least(self, 1, "decay_steps")
        if (self.coefficient is None) != (self.folder is None):
            problems.append(
                f"coefficient must be given exactly with folder, got {self.coefficient}"
            )
        if (self.end_coefficient is None) != (self.decay_steps is None):
            problems.append("end_coefficient and decay_steps: both or none must be given")
        if self.decay_steps is not None and self.folder is None:
            problems.append("decay_steps must be None without folder")
        if not self.has_reward and self.folder is None:
            problems.append("has_reward must be True without folder")
        return problems
