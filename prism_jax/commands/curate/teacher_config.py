"""The configuration of a teacher: endpoint, sampling, patience and cost."""

import dataclasses
from typing import Any

from prism_jax import configuration, errors
from prism_jax.setup import judge_processes
from prism_jax.teacher import budget, request
from prism_jax.teacher import endpoint as endpoint_lib

Json = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows(configuration.Section):
    """The prompts for the teacher: RL parquet, JSON lines, or a folder of `data build`."""

    path: str
    image_root: str | None  # of pictures given by path; None: the folder of the file

    def problems(self) -> list[str]:
        """See `Section`."""
        return configuration.not_empty(self, "path")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prices(configuration.Section):
    """The prices of a million tokens; see `teacher.budget`."""

    input_million: float
    output_million: float

    def problems(self) -> list[str]:
        """See `Section`."""
        return configuration.at_least(self, 0, "input_million", "output_million")

    def of(self) -> budget.Prices:
        """Return the prices in the form that the budget reads."""
        return budget.Prices(input_million=self.input_million, output_million=self.output_million)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher(configuration.Section):
    """The configuration of the second step of `curate`."""

    prompts: Rows | None  # None: the hard ones of the first step
    rows_cache_dir: str | None  # where a folder of prompts on gs:// is copied to
    max_rows: int | None  # use only the first N; None: all
    max_bad_rows: int
    limit_image_pixels: int  # of a picture's file; a larger one is a wrong row
    endpoint: endpoint_lib.Endpoint
    sampling: endpoint_lib.Sampling
    instruction: str  # follows the system prompt; the student never sees it
    num_tries: int  # of a prompt, until a reply is kept
    max_failed_in_row: int  # successive prompts without any reply that end the job
    prices: Prices
    budget: float | None  # limit on the cost of all replies in the cache together
    cache_dir: str | None  # of replies; None: in the workdir
    judge: judge_processes.Processes  # the rule is the strict one
    line_every_steps: int  # between progress lines where standard error is no terminal

    def problems(self) -> list[str]:
        """See `Section`."""
        names = ("max_rows", "num_tries", "max_failed_in_row", "line_every_steps")
        problems = configuration.at_least(self, 1, *names)
        problems += configuration.at_least(self, 0, "max_bad_rows", "budget")
        if self.num_tries > 1 and self.sampling.temperature == 0:
            problems.append("num_tries must be 1 when sampling.temperature is 0: all are the same")
        if self.budget is not None and self.prices.input_million + self.prices.output_million == 0:
            problems.append("prices must be given with a budget, got 0")
        return problems

    def asking(self) -> request.Settings:
        """Return the parts that all requests share."""
        return request.Settings(
            model=self.endpoint.model,
            instruction=self.instruction,
            options=self.sampling.options(),
        )


def check_rows(teacher: Teacher, *, has_difficulty: bool) -> None:
    """Raise InputError unless exactly one of the two steps provides the prompts."""
    if (teacher.prompts is None) != has_difficulty:
        raise errors.InputError(
            "config.teacher.prompts must be None after config.difficulty, which finds them, and "
            "given without it"
        )
