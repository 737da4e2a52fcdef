"""The figures of `/metrics`, in the form of Prometheus."""

import prometheus_client

from prism_jax.commands.serve.sampler import Sampler

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)


class Measures:
    """The counters of one server; those of responses only with a policy."""

    def __init__(self):
        self._registry = prometheus_client.CollectorRegistry()
        # Memory, processor time and open files.
        prometheus_client.ProcessCollector(registry=self._registry)
        registry = {"registry": self._registry}
        self.requests = prometheus_client.Counter(
            "prism_jax_requests",
            "Requests by route and status; 499: the client left before the answer",
            ["route", "status"],
            **registry,
        )
        self.open_requests = prometheus_client.Gauge(
            "prism_jax_open_requests", "Requests that are not answered yet", **registry
        )
        self.request_seconds = prometheus_client.Histogram(
            "prism_jax_request_seconds",
            "From a request's head to the end of its answer",
            ["route"],
            buckets=_SECONDS,
            **registry,
        )
        self.first_token_seconds = prometheus_client.Histogram(
            "prism_jax_first_token_seconds",
            "From a request's head to the first token of a response",
            buckets=_SECONDS,
            **registry,
        )
        self.prompt_tokens = prometheus_client.Counter(
            "prism_jax_prompt_tokens", "Tokens of prompts", **registry
        )
        self.response_tokens = prometheus_client.Counter(
            "prism_jax_response_tokens", "Tokens of responses", **registry
        )

    def watch(self, sampler: Sampler) -> None:
        """Add the slots of a policy."""
        for name, text, value in (
            ("prism_jax_slots", "Slots", lambda: sampler.num_slots),
            ("prism_jax_running_responses", "Responses in slots", sampler.num_running),
            (
                "prism_jax_waiting_responses",
                "Responses that wait for a slot",
                lambda: sampler.num_live() - sampler.num_running(),
            ),
        ):
            prometheus_client.Gauge(name, text, registry=self._registry).set_function(value)

    def page(self) -> bytes:
        """Return all figures."""
        return prometheus_client.generate_latest(self._registry)
