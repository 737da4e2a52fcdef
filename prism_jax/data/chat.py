"""Chat messages, and their text under a checkpoint's chat template.

A message is `{"role": ..., "content": ...}` with content either text or a list of parts
`{"type": "text", "text": ...}`, `{"type": "image"}`, `{"type": "video"}`. Images and videos are
passed separately, in the order of their parts.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import transformers

from prism_jax import errors
from prism_jax.data import image_settings

# Source: transformers models/qwen3_vl/processing_qwen3_vl.py; ids come from the tokenizer.
IMAGE_TOKEN = "<|image_pad|>"
VIDEO_TOKEN = "<|video_pad|>"
VISION_START_TOKEN = "<|vision_start|>"
VISION_END_TOKEN = "<|vision_end|>"
# Tokens that only the template and the processor may write: in a text they would refer to an image
# that does not exist, or end the turn.
RESERVED_TOKENS = (
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    VISION_START_TOKEN,
    VISION_END_TOKEN,
    "<|vision_pad|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
)
ROLES = ("system", "user", "assistant")

Message = dict[str, Any]


def turn(role: str, text: str, *, num_images: int = 0, num_videos: int = 0) -> Message:
    """Return a message of images, then videos, then the text."""
    parts: list[dict[str, str]] = [{"type": "image"} for _ in range(num_images)]
    parts += [{"type": "video"} for _ in range(num_videos)]
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}


def check(messages: Sequence[Message]) -> list[str]:
    """Return "image" or "video" for each such part, in order of appearance.

    Raises InputError for an empty list, an unknown role or part, and a text that contains one of
    RESERVED_TOKENS.
    """
    if not messages:
        raise errors.InputError("messages: must hold at least one message, got none")
    media: list[str] = []
    for index, message in enumerate(messages):
        place = f"message {index + 1}"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            got = message.get("role") if isinstance(message, dict) else message
            raise errors.InputError(f"{place}: role must be one of {ROLES}, got {got!r}")
        extra = sorted(set(message) - {"role", "content"})
        if extra:
            raise errors.InputError(f"{place}: must hold only role and content, got {extra} too")
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise errors.InputError(
                f"{place}: content must be text or a list of parts, got {parts!r}"
            )
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in ("image", "video"):
                media.append(kind)
            elif kind == "text" and isinstance(part.get("text"), str):
                check_text(part["text"], place=place)
            else:
                raise errors.InputError(f"{place}: part must be text, image or video, got {part!r}")
    return media


def check_text(text: str, *, place: str) -> None:
    """Raise InputError if a text contains one of RESERVED_TOKENS."""
    for token in RESERVED_TOKENS:
        if token in text:
            raise errors.InputError(
                f"{place}: text must not contain the special token {token}, "
                f"found at character {text.index(token)}"
            )


def load_template(folder: str | pathlib.Path) -> str:
    """Return the folder's chat template.

    Like transformers, look into `chat_template.jinja`, `chat_template.json` and
    `tokenizer_config.json`, in this order. Raises InputError if none of them has a template.
    """
    folder = pathlib.Path(folder)
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise errors.InputError(f"{path}: must be a readable text: {error}") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = folder / name
        template = image_settings.read_json(path).get("chat_template") if path.is_file() else None
        if isinstance(template, list):
            # Several named templates.
            named = [item for item in template if isinstance(item, dict)]
            template = next((t.get("template") for t in named if t.get("name") == "default"), None)
        if isinstance(template, str):
            return _encodable(template, str(path))
    raise errors.InputError(
        f"{folder}: no chat template in chat_template.jinja, chat_template.json "
        "or tokenizer_config.json"
    )


def _encodable(text: str, place: str) -> str:
    """Return the text, or raise InputError if UTF-8 cannot encode it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise errors.InputError(
            f"{place}: the chat template holds half a surrogate pair at character {error.start}"
        ) from error
    return text


def render(
    tokenizer: transformers.PreTrainedTokenizerBase,
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
) -> str:
    """Return the text of a chat, with a placeholder token for each image and video.

    The template runs in the sandbox of transformers, without access to files or programs. No
    system turn is added. `add_generation_prompt` opens the assistant's turn at the end.

    Raises:
      InputError: the template cannot be read, or fails on these messages.
    """
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
    # A template is untrusted code: it may raise anything.
    except Exception as error:
        raise errors.InputError(
            f"chat template: cannot render the messages: {type(error).__name__}: {error}"
        ) from error
    return _encodable(text, "rendered messages")
