"""The configuration of a chat endpoint: its address, its patience and its sampling."""

import dataclasses
from typing import Any, Literal

from prism_jax import configuration, errors
from prism_jax.teacher import client

Json = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint(configuration.Section):
    """A chat endpoint, and the patience with it; see `teacher.client`."""

    # To which /chat/completions is added. The same model may move to another address.
    base_url: str = configuration.free()
    model: str
    # The environment variable that holds the key; empty: send no key.
    api_key_env: str = configuration.free()
    num_concurrent: int = configuration.free()
    deadline_seconds: float = configuration.free()
    max_attempts: int = configuration.free()
    backoff_seconds: float = configuration.free()
    max_wait_seconds: float = configuration.free()

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

    def key(self, *, place: str) -> str | None:
        """Return the key from the environment; None sends no key.

        Args:
          place: of this section, for messages.

        Raises:
          InputError: the key is missing, or the configuration holds it too.
        """
        key = client.read_key(self.api_key_env, place=place)
        if key is not None and (key in self.base_url or key in self.model):
            raise errors.InputError(f"{place} must not hold the key itself")
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
    """Sampling by an endpoint's model; None leaves a choice to the endpoint."""

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
