"""The pictures of a request: data URLs, and addresses on hosts that the user has named.

A picture is opened when the processor cuts it into patches, so that a request holds one decoded
picture at a time, however many it sends.
"""

import base64
import binascii
import dataclasses
import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any, overload

from PIL import Image

from prism_jax import errors
from prism_jax.commands.serve.chat_request import Picture
from prism_jax.commands.serve.refusals import Refusal
from prism_jax.data import images

_FETCH_SECONDS = 10.0  # of one picture, from the first byte to the last
_READ_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """The pictures that the server opens."""

    limit_pixels: int  # of one, before it is resized
    hosts: tuple[str, ...]  # HOST or HOST:PORT that pictures are fetched from; () for none
    limit_bytes: int  # of a picture that is fetched


class Opened(Sequence[Image.Image]):
    """The pictures of a request, each opened when it is read."""

    def __init__(self, pictures: Sequence[Picture], rules: Rules):
        self._pictures, self._rules = pictures, rules

    def __len__(self) -> int:
        return len(self._pictures)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Image.Image]: ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Opened(self._pictures[index], self._rules)
        picture = self._pictures[index]
        data = _data(picture, self._rules)
        try:
            return images.open_image(data, limit_pixels=self._rules.limit_pixels)
        except errors.InputError as error:
            raise Refusal(
                f"{picture.field}: {error}", field=picture.field, code="invalid_image"
            ) from None


def _data(picture: Picture, rules: Rules) -> bytes:
    """Return the encoded bytes of a picture."""
    scheme = picture.url.partition(":")[0].lower()
    if scheme == "data":
        return _of_data_url(picture)
    if scheme in ("http", "https"):
        return _fetch(picture, rules)
    raise _refusal(picture, "must be a data URL, data:image/…;base64,…")


def _of_data_url(picture: Picture) -> bytes:
    head, comma, text = picture.url.partition(",")
    kind, *parameters = head[len("data:") :].lower().split(";")
    if not comma or not kind.startswith("image/") or parameters[-1:] != ["base64"]:
        raise _refusal(picture, "must be a data URL, data:image/…;base64,…")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _refusal(picture, f"is not base64: {error}") from None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirection would lead to a host that nobody has named."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow none."""


def _fetch(picture: Picture, rules: Rules) -> bytes:
    """Fetch a picture from a host that the user has named."""
    try:
        host = urllib.parse.urlsplit(picture.url).netloc.lower()
    except ValueError:
        raise _refusal(picture, "is no address") from None
    if host not in rules.hosts:
        raise _refusal(
            picture, "must be a data URL: this server fetches no pictures from that host"
        )
    # Proxies of the environment are not used: the host itself is reached.
    opener = urllib.request.build_opener(_NoRedirects, urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + _FETCH_SECONDS
    data = b""
    try:
        with opener.open(picture.url, timeout=_FETCH_SECONDS) as answer:
            while part := answer.read1(_READ_BYTES):
                data += part
                if len(data) > rules.limit_bytes:
                    raise _refusal(picture, f"must have at most {rules.limit_bytes} bytes")
                if time.monotonic() > deadline:
                    raise _refusal(picture, f"did not arrive in {_FETCH_SECONDS:g} s")
    except urllib.error.HTTPError as error:
        raise _refusal(picture, f"cannot be fetched: status {error.code}") from None
    except (OSError, ValueError, http.client.HTTPException):
        raise _refusal(picture, "cannot be fetched") from None
    return data


def _refusal(picture: Picture, message: str) -> Refusal:
    return Refusal(f"{picture.field} {message}", field=picture.field, code="invalid_image")
