"""Encode rows for the model: marks become pictures and videos, and response tokens are marked."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
import transformers

from models import inputs
from prism_jax import errors
from prism_jax.data import chat, examples, images, processor, records, video_files
from prism_jax.data import videos as videos_lib

Media = Sequence[records.Image | records.Video]
_MARKS = re.compile(f"({records.IMAGE_MARK}|{records.VIDEO_MARK})")
_END = "<|im_end|>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """The sizes of a sequence, which count against its row's limits."""

    tokens: int
    patches: int
    images: int  # each grid step of a video is one


def messages(turns: Sequence[records.Message]) -> list[chat.Message]:
    """Return chat messages, with a part in place of each mark of a picture or video."""
    chat_messages = []
    for turn in turns:
        # Texts and marks alternate.
        pieces = _MARKS.split(turn.content)
        content: str | list[dict[str, str]] = turn.content
        if len(pieces) > 1:
            content = []
            for number, piece in enumerate(pieces):
                if number % 2:
                    content.append({"type": piece.strip("<>")})
                elif piece:
                    content.append({"type": "text", "text": piece})
        chat_messages.append({"role": turn.role, "content": content})
    return chat_messages


def example(
    turns: Sequence[records.Message],
    media: Media,
    words: processor.Processor,
    *,
    add_generation_prompt: bool,
) -> inputs.Example:
    """Encode the turns of a validated row.

    Args:
      media: pictures and videos, each kind in the order of its marks, see `records.get_media`.

    Raises:
      InputError: as `Processor.encode` and `images.open_image`.
    """
    pictures, videos = _by_kind(media)
    encoded = words.encode(
        messages(turns),
        images=[images.open_stored(picture) for picture in pictures],
        scales=[picture.scale for picture in pictures],
        videos=[video_files.open_stored(video) for video in videos],
        add_generation_prompt=add_generation_prompt,
    )
    return examples.from_encoded(encoded, words)


def _by_kind(media: Media) -> tuple[list[records.Image], list[records.Video]]:
    return (
        [item for item in media if isinstance(item, records.Image)],
        [item for item in media if isinstance(item, records.Video)],
    )


def measure(
    turns: Sequence[records.Message],
    media: Media,
    words: processor.Processor,
    *,
    add_generation_prompt: bool,
) -> Size:
    """Return the size of `example` for the same arguments, without decoding a picture."""
    text = chat.render(
        words.tokenizer,
        words.template,
        messages(turns),
        add_generation_prompt=add_generation_prompt,
    )
    pictures, videos = _by_kind(media)
    plans = [_plan(video, words) for video in videos]
    first, *rest = text.split(chat.VIDEO_TOKEN)
    if len(rest) != len(plans):
        raise errors.InputError(
            f"chat template: must write one placeholder for each video, got {len(rest)} for "
            f"{len(plans)}"
        )
    texts = (processor.video_text(plan.seconds) for plan in plans)
    text = first + "".join(map("".join, zip(texts, rest, strict=True)))
    grids = [(1, *_grid_of(picture, words)) for picture in pictures]
    grids += [plan.grid for plan in plans]
    num_patches = sum(t * h * w for t, h, w in grids)
    num_images = sum(t for t, _, _ in grids)
    # Each picture, and each grid step of a video, has a single placeholder in the text.
    num_tokens = len(words.token_ids(text)) - num_images
    num_tokens += num_patches // words.image_settings.merge_size**2
    return Size(tokens=num_tokens, patches=num_patches, images=num_images)


def _grid_of(picture: records.Image, words: processor.Processor) -> tuple[int, int]:
    """Return the rows and columns of a picture's patches."""
    settings = words.image_settings
    height, width = images.fit(
        picture.height_pixels,
        picture.width_pixels,
        settings,
        picture.scale,
        name=f"image {picture.path or 'of the row'}",
    )
    return height // settings.patch_size, width // settings.patch_size


def _plan(video: records.Video, words: processor.Processor) -> videos_lib.Plan:
    name = f"video {video_files.name_of(video)}"
    words.check_video(name)
    return videos_lib.plan(
        video.num_frames,
        video.files[0].height_pixels,
        video.files[0].width_pixels,
        words.video_settings,
        frames_per_second=video.frames_per_second,
        is_sampled=video.is_sampled,
        sampled_per_second=video.sampled_per_second,
        name=name,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TurnTokens:
    """The token ids before and after a response."""

    start: tuple[int, ...]  # <|im_start|>assistant; the next token is the line break
    end: int  # <|im_end|>

    @classmethod
    def of(cls, tokenizer: transformers.PreTrainedTokenizerBase) -> "TurnTokens":
        """Return a tokenizer's ids; InputError if it has no token for the end of a turn."""
        start = tokenizer.encode("<|im_start|>assistant", add_special_tokens=False)
        end = tokenizer.encode(_END, add_special_tokens=False)
        if len(end) != 1:
            raise errors.InputError(f"the tokenizer has no token {_END}, it gives {end}")
        return cls(start=tuple(start), end=end[0])

    def is_response(self, tokens: np.ndarray, turns: Sequence[records.Message]) -> np.ndarray:
        r"""Return bool[T]: the token is part of a learned response, its end token included.

            <|im_start|> assistant \n  So  7  .  <|im_end|> \n
                 0           0     0   1   1  1      1      0

        A line break at the start of a response forms a single token with the template's line break.
        A sampler's prompt never ends with that token, so it is not part of the response.

        Raises:
          InputError: some turns are not learned, and the template omits turns of the assistant.
        """
        is_learned = [turn.is_learned for turn in turns if turn.role == "assistant"]
        is_response = np.zeros(len(tokens), bool)
        starts = np.flatnonzero(tokens == self.start[0])
        for number, token in enumerate(self.start[1:], start=1):
            starts = starts[starts + number < len(tokens)]
            starts = starts[tokens[starts + number] == token]
        (ends,) = np.nonzero(tokens == self.end)
        if len(starts) != len(is_learned):
            if not all(is_learned):
                raise errors.InputError(
                    f"the chat template writes {len(starts)} turns of the assistant for "
                    f"{len(is_learned)}: it is not known which of them are learned"
                )
            is_learned = [True] * len(starts)
        for first in (starts + len(self.start) + 1)[np.array(is_learned, bool)]:
            place = np.searchsorted(ends, first)
            last = ends[place] + 1 if place < len(ends) else len(tokens)
            is_response[first:last] = True
        return is_response


def encode_prompts(
    rows: Sequence[records.PromptRow], words: processor.Processor
) -> list[inputs.Example]:
    """Return the prompts of rows as examples for the sampler."""
    return [
        example(row.prompt, records.get_media(row), words, add_generation_prompt=True)
        for row in rows
    ]
