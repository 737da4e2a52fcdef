"""The configuration of a teacher: endpoint, sampling, patience and cost."""

import dataclasses
from typing import Any, Literal

from prism_jax import configuration, errors
from prism_jax.setup import judge_processes
from prism_jax.teacher import budget, client, request

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
class Endpoint(configuration.Section):
    """The endpoint, and the patience with it; see `teacher.client`."""

    base_url: str  # to which /chat/completions is added
    model: str
    api_key_env: str  # the environment variable that holds the key; empty: send no key
    num_concurrent: int
    deadline_seconds: float
    max_attempts: int
    backoff_seconds: float
    max_wait_seconds: float

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = configuration.not_empty(self, "base_url", "model")
        problems += configuration.at_least(self, 1, "num_concurrent", "max_attempts")
        problems += configuration.at_least(self, 0, "backoff_seconds", "max_wait_seconds")
        if self.max_attempts > 100:
            problems.append(f"max_attempts must be <= 100, got {self.max_attempts}")
        if self.deadline_seconds <= 0:
            problems.append(f"deadline_seconds must be > 0, got {self.deadline_seconds:g}")
        problem = client.problem_of(self.base_url, has_key=bool(self.api_key_env))
        if self.base_url and problem is not None:
            problems.append(f"base_url {problem}")
        return problems

    def key(self) -> str | None:
        """Return the key from the environment; None sends no key.

        Raises:
          InputError: the key is missing, or the configuration holds it too.
        """
        key = client.read_key(self.api_key_env)
        if key is not None and (key in self.base_url or key in self.model):
            raise errors.InputError("config.teacher.endpoint must not hold the key itself")
        return key

    def patience(self) -> client.Patience:
        """Return the limits in the form that the client reads."""
        return client.Patience(
            deadline_seconds=self.deadline_seconds,
            max_attempts=self.max_attempts,
            backoff_seconds=self.backoff_seconds,
            max_wait_seconds=self.max_wait_seconds,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(configuration.Section):
    """Sampling by the teacher; None leaves a choice to the endpoint."""

    max_tokens: int  # of a reply
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"]  # endpoints differ
    temperature: float | None
    top_p: float | None
    reasoning_effort: str | None

    def problems(self) -> list[str]:
        """See `Section`."""
        return configuration.at_least(self, 1, "max_tokens") + configuration.at_least(
            self, 0, "temperature", "top_p"
        )

    def options(self) -> dict[str, Json]:
        """Return the fields of a request."""
        named = {
            self.max_tokens_field: self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "reasoning_effort": self.reasoning_effort,
        }
        return {name: value for name, value in named.items() if value is not None}


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
    endpoint: Endpoint
    sampling: Sampling
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
