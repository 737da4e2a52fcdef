"""Requests that get an error, in the form of OpenAI's API."""

from typing import Any

_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """An answer that is an error: its status, its message and the field that it is about."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        field: str | None = None,
        code: str | None = None,
        retry_seconds: int | None = None,
    ):
        super().__init__(message)
        self.status, self.field, self.code = status, field, code
        self.retry_seconds = retry_seconds  # the client may try again after them; None: never

    def body(self) -> dict[str, Any]:
        """Return the JSON object of the answer."""
        usual = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": _KINDS.get(self.status, usual)}
        return {"error": error | {"param": self.field, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Return the headers that this status asks for."""
        headers = {}
        if self.retry_seconds is not None:
            headers["retry-after"] = str(self.retry_seconds)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def too_busy(message: str, retry_seconds: int) -> Refusal:
    """Return the refusal of a request for which there is no room now."""
    return Refusal(message, status=429, code="queue_full", retry_seconds=retry_seconds)
