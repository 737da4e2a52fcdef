"""The turns of a conversation in a file: roles, texts, pictures, and whether they are learned.

Beside its role and its content a turn may have

  images, image                              pictures, put in front unless the text marks them
  weight, loss, trainable, train, loss_mask  0 or false: the turn is shown and not learned

A part of its content is `{"type": "text", "text"}`, `{"type": "image"}` with a picture in a form of
`pictures`, or `{"type": "video"}` with a video in a form of `clips`. Other fields are refused by
name.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from prism_jax.data import clips, fields, pictures, records

_FLAGS = ("weight", "loss", "trainable", "train", "loss_mask")
_REASONING = ("reasoning_content", "reasoning", "thinking", "thought")
_PARTS_AS_TEXT = re.compile(r'\s*\[\s*\{\s*"type"\s*:\s*"(?:text|image|image_url|video)"')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turns:
    """The turns of a row, and a picture or video for each mark (None: the turns do not name it)."""

    messages: tuple[records.Message, ...]
    pictures: tuple[records.Image | None, ...]
    videos: tuple[records.Video | None, ...]


def read(
    value: Any, name: str, *, role_tag: str, content_tag: str, roles: Mapping[str, str]
) -> Turns:
    """Return the turns of a conversation, given as a list or as JSON text.

    Args:
      roles: from the file's role names to the project's.
    """
    if isinstance(value, str):
        value = _from_json(value, name)
    if not isinstance(value, list):
        raise records.RowError(
            "bad_type", f"{name} must be a list of turns, got {fields.show(value)}"
        )
    if not value:
        raise records.RowError("missing_field", f"{name} has no turns")
    messages, named, videos = [], [], []
    for i, turn in enumerate(value):
        where = f"{name}[{i}]"
        if not isinstance(turn, Mapping):
            raise records.RowError("bad_type", f"{where} must be a dict, got {fields.show(turn)}")
        for tag in (role_tag, content_tag):
            if turn.get(tag) is None:
                raise records.RowError("missing_field", f"{where} has no {tag!r}")
        role = turn[role_tag]
        if not isinstance(role, str) or role not in roles:
            raise records.RowError(
                "bad_role",
                f"{where}.{role_tag} must be one of {', '.join(roles)}, got {fields.show(role)}",
            )
        for key in _REASONING:
            if key not in (role_tag, content_tag) and not fields.is_blank(turn.get(key)):
                raise records.RowError(
                    "unsupported",
                    f"{where}.{key} is not read: write it into {content_tag!r}, as "
                    "<think>…</think> before the <answer>",
                )
        known = {role_tag, content_tag, "images", "image", *_FLAGS, *_REASONING}
        fields.only(turn, known, where)
        content, turn_pictures, turn_videos = _content(
            turn[content_tag],
            f"{where}.{content_tag}",
            is_response=roles[role] == "assistant",
            num_before=len(named),
        )
        content, turn_pictures = _with_pictures(turn, content, turn_pictures, where)
        named += turn_pictures
        videos += turn_videos
        messages.append(
            records.Message(
                role=roles[role],
                content=content,
                is_learned=_is_learned(turn, roles[role], where),
            )
        )
    return Turns(messages=tuple(messages), pictures=tuple(named), videos=tuple(videos))


def _from_json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise records.RowError(
            "bad_type", f"{name} must be a list of turns, got {fields.show(text)}"
        ) from error


def _content(
    value: Any, name: str, *, is_response: bool, num_before: int
) -> tuple[str, list[records.Image | None], list[records.Video | None]]:
    """Return a turn's marked text, and the picture or video of each mark, if its part names one.

    Args:
      num_before: pictures in earlier turns.
    """
    if isinstance(value, str) and not is_response and value.rstrip().endswith("]"):
        value = _from_json(value, name) if _PARTS_AS_TEXT.match(value) else value
    if not isinstance(value, list):
        text = fields.check_text(value, name)
        return text, *_unnamed(text)
    texts, named, videos = [], [], []
    for i, part in enumerate(value):
        where = f"{name}[{i}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            fields.only(part, ("type", "text"), where)
            text = fields.check_text(part.get("text"), f"{where}.text")
            for marked, unnamed in zip((named, videos), _unnamed(text), strict=True):
                marked += unnamed
        elif kind in ("image", "image_url"):
            fields.only(part, ("type", "index", *pictures.KEYS), where)
            text = records.IMAGE_MARK
            _check_index(part.get("index"), num_before + len(named), where)
            given = {key: part[key] for key in pictures.KEYS if not fields.is_blank(part.get(key))}
            named.append(pictures.read(given, where) if given else None)
        elif kind == "video":
            fields.only(part, ("type", *clips.KEYS), where)
            text = records.VIDEO_MARK
            is_named = any(not fields.is_blank(part.get(key)) for key in clips.KEYS)
            videos.append(clips.read(part, where) if is_named else None)
        else:
            raise records.RowError(
                "bad_type", f"{where} must be an image, video or text part, got {fields.show(part)}"
            )
        texts.append(text)
    return "".join(texts), named, videos


def _unnamed(text: str) -> tuple[list[None], list[None]]:
    """Return None for each mark of a picture, and for each of a video."""
    return [None] * text.count(records.IMAGE_MARK), [None] * text.count(records.VIDEO_MARK)


def _check_index(index: Any, number: int, where: str) -> None:
    """Raise RowError unless a part's index is `number`, the picture at its position."""
    if not fields.is_blank(index) and (isinstance(index, bool) or index != number):
        raise records.RowError(
            "image_mismatch",
            f"{where}.index must be {number}, the number of pictures before it, got {index!r}",
        )


def _with_pictures(
    turn: Mapping[str, Any], content: str, named: list[records.Image | None], where: str
) -> tuple[str, list[records.Image | None]]:
    """Return content and pictures, completed by the pictures that the turn names separately."""
    given = pictures.of_row(turn)
    if not given:
        return content, named
    if not named:
        return fields.mark_media(content, len(given), 0), list(given)
    if len(named) != len(given):
        raise records.RowError(
            "placeholders",
            f"{where} has {len(named)} {records.IMAGE_MARK}, but {len(given)} images",
        )
    return content, list(pictures.of_marks(named, given))


def _is_learned(turn: Mapping[str, Any], role: str, where: str) -> bool:
    flags = {
        key: _flag(turn[key], f"{where}.{key}")
        for key in _FLAGS
        if not fields.is_blank(turn.get(key))
    }
    if len(set(flags.values())) > 1:
        raise records.RowError("bad_type", f"{where}: {' and '.join(flags)} contradict each other")
    is_learned = next(iter(flags.values()), True)
    if flags and is_learned and role != "assistant":
        raise records.RowError(
            "unsupported",
            f"{where}.{next(iter(flags))}: only turns of the assistant are learned, this is of "
            f"{role}",
        )
    return is_learned or role != "assistant"


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, int | float) or value not in (0, 1):
        raise records.RowError(
            "unsupported", f"{name} must be 0 or 1 (false or true), got {fields.show(value)}"
        )
    return bool(value)


def with_row_flags(
    messages: tuple[records.Message, ...], row: Mapping[str, Any]
) -> tuple[records.Message, ...]:
    """Return the turns with the flags of the row's columns applied.

    `loss_mask` has a 0 or 1 for each turn; the other columns are for the whole row.
    """
    for name in ("weight", "trainable", "loss_weight", "sample_weight"):
        if not fields.is_blank(row.get(name)) and not _flag(row[name], name):
            raise records.RowError("no_response", f"{name}: the row is not to be learned")
    if row.get("loss") is False:
        raise records.RowError("no_response", "loss: the row is not to be learned")
    mask = row.get("loss_mask")
    if not fields.is_blank(mask):
        if not isinstance(mask, list) or len(mask) != len(messages):
            raise records.RowError(
                "unsupported",
                f"loss_mask must be a list of {len(messages)}, one for each turn, got "
                f"{fields.show(mask)}",
            )
        flags = [_flag(value, f"loss_mask[{i}]") for i, value in enumerate(mask)]
        for i, (flag, message) in enumerate(zip(flags, messages, strict=True)):
            if flag and message.role != "assistant":
                raise records.RowError(
                    "unsupported",
                    f"loss_mask[{i}]: only turns of the assistant are learned, this is of "
                    f"{message.role}",
                )
        messages = tuple(
            dataclasses.replace(
                message, is_learned=message.is_learned and (flag or message.role != "assistant")
            )
            for message, flag in zip(messages, flags, strict=True)
        )
    responses = [message for message in messages if message.role == "assistant"]
    if responses and not any(message.is_learned for message in responses):
        raise records.RowError("no_response", "no turn of the assistant is to be learned")
    return messages
