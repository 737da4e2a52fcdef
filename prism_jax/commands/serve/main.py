"""Serve a model: `python -m prism_jax serve --model=DIR`.

The server speaks the API of OpenAI: `/v1/chat/completions` and `/v1/models`; beside them are
`/v1/score` with a discriminator, `/health` and Prometheus' `/metrics`. It listens on this machine
alone unless `--host` says otherwise. A key that clients must send comes from a file or from the
environment variable PRISM_JAX_API_KEY. On SIGTERM the server takes no more requests, answers those
that are open, and leaves with exit code 143. See docs/serve_and_evaluate.md.
"""

import argparse
import importlib
import os
import pathlib
import sys
from collections.abc import Sequence

from prism_jax import errors
from prism_jax.checkpoints import best_step
from prism_jax.commands import loaded
from prism_jax.data import images

_KEY_VARIABLE = "PRISM_JAX_API_KEY"
_LEAST_KEY_CHARS, _MOST_KEY_BYTES = 8, 4096
_LOCAL = ("127.0.0.1", "::1", "localhost")
_PACKAGES = ("starlette", "uvicorn", "prometheus_client")


def parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    options = argparse.ArgumentParser(
        prog="python -m prism_jax serve",
        description="Serve a policy, a discriminator, or both, to clients of OpenAI's API.",
    )
    add = options.add_argument
    add("--model", type=pathlib.Path, help="checkpoint folder of a policy")
    add(
        "--step",
        type=best_step.argument,
        help="of a run's folder: a number, or best: that of best.json; default: the newest",
    )
    add("--discriminator", type=pathlib.Path, help="of a discriminator, for /v1/score")
    add("--name", help="of the model in requests; without, the folder's")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=8000, help="0 takes a free one and says which")
    add("--api_key_file", type=pathlib.Path, help=f"or the variable {_KEY_VARIABLE}")
    add("--num_slots", type=int, default=16, help="most responses that are drawn at a time")
    add("--max_queue", type=int, default=256, help="most responses that wait; beyond: status 429")
    add("--max_prompt_tokens", type=int, default=4096, help="of a prompt with its pictures")
    add("--max_new_tokens", type=int, default=2048, help="most and usual tokens of a response")
    add("--max_responses", type=int, default=16, help="most responses to a prompt (n)")
    add("--group_responses", type=int, default=1, help="of n, those that share a prompt in memory")
    add("--max_images", type=int, default=8, help="of a request")
    add("--limit_image_pixels", type=int, default=images.LIMIT_PIXELS, help="of one image")
    add("--min_pixels", type=int, help="bounds that an image is resized to; the folder's without")
    add("--max_pixels", type=int)
    add("--max_body_mebibytes", type=int, default=32, help="of a request")
    add("--body_seconds", type=int, default=60, help="in which a body must arrive")
    add("--image_host", action="append", default=[], metavar="HOST[:PORT]",
        help="fetch images from this host; none without")  # fmt: skip
    add("--chunk_tokens", type=int, default=16, help="tokens between two events of a stream")
    add("--num_threads", type=int, default=4, help="that encode prompts")
    add("--grace_seconds", type=int, default=60, help="for open requests at the end")
    add("--warm_up", choices=("all", "none"), default="all", help="compile before listening")
    add("--gate", choices=("strict", "official", "geo3k"), default="strict",
        help="format of responses that are scored")  # fmt: skip
    add("--scored_token", choices=("last", "newline", "pad"), default="last",
        help="as the discriminator was trained")  # fmt: skip
    add("--positions", choices=("mrope", "text_1d"), default="mrope",
        help="as the discriminator was trained")  # fmt: skip
    add(
        "--dtype", choices=loaded.DTYPES, default="auto", help="of the computation; auto: as stored"
    )
    add("--tensor", type=int, default=1, help="devices over which each weight is split")
    add("--attention", choices=loaded.ATTENTIONS, default="auto")
    return options


def main(argv: Sequence[str]) -> None:
    """Serve until a signal comes."""
    args = parser().parse_args(argv)
    _check(args)
    key = _key(args.api_key_file)
    if key is None and args.host not in _LOCAL:
        _say(f"no API key: whoever reaches {args.host}:{args.port} can use this server")
    if args.name is None:
        args.name = pathlib.Path(os.path.abspath(args.model or args.discriminator)).name
    # Python escapes bytes of an argument that are not UTF-8.
    if not args.name or args.name != args.name.encode(errors="replace").decode():
        raise errors.InputError(f"--name must be a text, got {args.name!r}")
    try:
        server = importlib.import_module("prism_jax.commands.serve.server")
    except ModuleNotFoundError as error:
        if error.name not in _PACKAGES:
            raise
        raise errors.InputError(
            f"serve needs the package {error.name}: pip install 'prism-jax[serve]'"
        ) from error
    server.run(args, key, _say)


def _check(args: argparse.Namespace) -> None:
    """Refuse numbers out of range before anything is loaded."""
    if args.model is None and args.discriminator is None:
        raise errors.InputError("serve needs --model, --discriminator or both")
    if args.step is not None and args.model is None:
        raise errors.InputError(f"--step is of --model, which is missing, got {args.step}")
    largest = images.LARGEST_LIMIT_PIXELS
    for name, value, least, most in (
        ("port", args.port, 0, 65535),
        ("num_slots", args.num_slots, 1, 2**16),
        ("max_queue", args.max_queue, 0, 2**20),
        ("max_prompt_tokens", args.max_prompt_tokens, 1, 2**20),
        ("max_new_tokens", args.max_new_tokens, 1, 2**20),
        ("max_responses", args.max_responses, 1, args.num_slots + args.max_queue),
        ("group_responses", args.group_responses, 1, args.num_slots),
        ("max_images", args.max_images, 0, 1024),
        ("limit_image_pixels", args.limit_image_pixels, 1, largest),
        ("min_pixels", 1 if args.min_pixels is None else args.min_pixels, 1, largest),
        ("max_pixels", 1 if args.max_pixels is None else args.max_pixels, 1, largest),
        ("max_body_mebibytes", args.max_body_mebibytes, 1, 1024),
        ("body_seconds", args.body_seconds, 1, 3600),
        ("chunk_tokens", args.chunk_tokens, 1, 1024),
        ("num_threads", args.num_threads, 1, 256),
        ("grace_seconds", args.grace_seconds, 0, 86400),
        ("tensor", args.tensor, 1, 2**16),
    ):
        if not least <= value <= most:
            raise errors.InputError(f"--{name} must be between {least} and {most}, got {value}")
    for host in args.image_host:
        if not host or any(sign in host for sign in "/@ "):
            raise errors.InputError(f"--image_host must be HOST or HOST:PORT, got {host!r}")


def _key(path: pathlib.Path | None) -> bytes | None:
    """Return the key from the file or the environment; None if neither has one.

    No message quotes the key.
    """
    place, text = _KEY_VARIABLE, os.environ.get(_KEY_VARIABLE)
    if path is not None:
        place = f"--api_key_file={path}"
        if "\0" in str(path) or not path.is_file():
            raise errors.InputError(f"{place}: no such file")
        try:
            with path.open("rb") as file:
                text = file.read(_MOST_KEY_BYTES + 1).decode("ascii", errors="replace")
        except OSError as error:
            raise errors.InputError(f"{place}: {error.strerror}") from error
    if text is None:
        return None
    key = text.strip()
    if not _LEAST_KEY_CHARS <= len(key) <= _MOST_KEY_BYTES or not key.isascii():
        raise errors.InputError(
            f"{place}: the key must have between {_LEAST_KEY_CHARS} and {_MOST_KEY_BYTES} ASCII "
            "characters"
        )
    if not key.isprintable() or " " in key:
        raise errors.InputError(f"{place}: the key must be one word")
    return key.encode()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
