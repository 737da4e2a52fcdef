"""The sections `train` and `evaluate`, as far as stages share them."""

import dataclasses

from prism_jax import configuration


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(configuration.Section):
    """The part of the section `train` that every stage has."""

    num_steps: int | None
    max_skipped_in_row: int  # updates that are not finite before the run ends

    def problems(self) -> list[str]:
        """See `Section`."""
        return configuration.at_least(self, 1, "num_steps", "max_skipped_in_row")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOnData(Train):
    """The length of a supervised run, in steps or in epochs."""

    num_epochs: int | None  # exactly one of `num_steps` and this is given

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = super().problems() + configuration.at_least(self, 1, "num_epochs")
        if (self.num_steps is None) == (self.num_epochs is None):
            problems.append("num_steps and num_epochs: exactly one must be given")
        return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(configuration.Section):
    """The evaluation on held-out data."""

    every_steps: int | None  # None: never
    num_batches: int | None  # None: all

    def problems(self) -> list[str]:
        """See `Section`."""
        return configuration.at_least(self, 1, "every_steps", "num_batches")
