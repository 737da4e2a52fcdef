"""Encode chats with images and videos as Qwen3VLProcessor does, without torch."""

import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import transformers
from PIL import Image

from prism_jax import errors
from prism_jax.data import chat, image_settings, records
from prism_jax.data import images as vision
from prism_jax.data import videos as videos_lib

_TEXT, _IMAGE, _VIDEO = 0, 1, 2
_KINDS = {chat.IMAGE_TOKEN: "image", chat.VIDEO_TOKEN: "video"}
_PLACEHOLDER = re.compile(f"({re.escape(chat.IMAGE_TOKEN)}|{re.escape(chat.VIDEO_TOKEN)})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """An encoded chat, with images and videos in order of appearance."""

    tokens: np.ndarray  # int32[T]
    token_types: np.ndarray  # int32[T]  0 text, 1 image, 2 video; HF's mm_token_type_ids
    patches: tuple[np.ndarray, ...]  # uint8[P, C] each
    grids: np.ndarray  # int32[n, 3]  t, h, w in patches
    is_video: np.ndarray  # bool[n]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """The token ids that the model and the sampler must know."""

    image: int
    video: int
    vision_start: int
    vision_end: int
    pad: int
    ends: tuple[int, ...]  # tokens that end a response, ascending


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processor:
    """The encoder of chats and decoder of responses of a checkpoint."""

    tokenizer: transformers.PreTrainedTokenizerBase
    template: str
    image_settings: image_settings.ImageSettings
    video_settings: image_settings.VideoSettings | None
    ids: SpecialIds

    @classmethod
    def from_folder(
        cls,
        folder: str | pathlib.Path,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        place: str = "",
    ) -> "Processor":
        """Load tokenizer, chat template and settings of a Hugging Face folder.

        Args:
          min_pixels, max_pixels: bounds of an image; None: those of the folder.
          place: prefix of the two in the configuration, for messages.

        Raises InputError when a file is missing, the tokenizer does not fit `config.json`, or the
        bounds exclude each other.
        """
        folder = pathlib.Path(folder)
        if not folder.is_dir():
            raise errors.InputError(f"{folder}: no such folder")
        config = image_settings.read_json(folder / "config.json")
        tokenizer = _load_tokenizer(folder)
        for_images = image_settings.ImageSettings.from_folder(folder)
        bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        for_images = dataclasses.replace(
            for_images, **{name: value for name, value in bounds.items() if value is not None}
        )
        if for_images.min_pixels > for_images.max_pixels:
            raise errors.InputError(
                f"{place}min_pixels must be <= max_pixels, got {for_images.min_pixels} and "
                f"{for_images.max_pixels} with those of {folder}"
            )
        for_videos = None
        if image_settings.has_video(folder):
            for_videos = image_settings.VideoSettings.from_folder(folder)
            for key in ("patch_size", "merge_size", "temporal_patch_size"):
                pair = [dataclasses.asdict(settings)[key] for settings in (for_images, for_videos)]
                if pair[0] != pair[1]:
                    raise errors.InputError(
                        f"{folder}: {key} must be the same for images and videos, got {pair}"
                    )
        tower = config.get("vision_config") or {}
        if not isinstance(tower, dict):
            raise errors.InputError(f"{folder / 'config.json'}: vision_config must be an object")
        merge = tower.get("spatial_merge_size", for_images.merge_size)
        for name, wanted, got in (
            ("patch_size", tower.get("patch_size", for_images.patch_size), for_images.patch_size),
            ("merge_size", merge, for_images.merge_size),
        ):
            if wanted != got:
                raise errors.InputError(
                    f"{folder}: the processor's {name} = {got} must be the one of config.json's "
                    f"vision_config, {wanted}"
                )
        return cls(
            tokenizer=tokenizer,
            template=chat.load_template(folder),
            image_settings=for_images,
            video_settings=for_videos,
            ids=_special_ids(folder, config, tokenizer),
        )

    def encode(
        self,
        messages: Sequence[chat.Message],
        *,
        images: Sequence[Image.Image] = (),
        scales: Sequence[records.Scale | None] | None = None,
        videos: Sequence[videos_lib.Video] = (),
        add_generation_prompt: bool,
    ) -> Encoded:
        """Encode a chat; equal to Qwen3VLProcessor in ids, token types and grids.

        An image becomes h * w // merge_size**2 image tokens. A video becomes, for each of its t
        grid steps, the time "<1.5 seconds>" and the step's video tokens between a start and an end
        token; as in transformers from 5.10 on, the start and end tokens that the template writes
        around the video stay as well.

        Args:
          scales: the size that each image sets; None: no image sets one.

        Raises InputError if the numbers of placeholders and of images or videos differ, and as
        `chat.check`, `images.image_patches` and `videos.patches`.

        Source: transformers models/qwen3_vl/processing_qwen3_vl.py, processing_utils.py
        get_text_with_replacements.
        """
        media = chat.check(messages)
        _check_count("image", media.count("image"), len(images))
        _check_count("video", media.count("video"), len(videos))
        text = chat.render(
            self.tokenizer, self.template, messages, add_generation_prompt=add_generation_prompt
        )
        # Texts and placeholders alternate.
        pieces = _PLACEHOLDER.split(text)
        written = [_KINDS[token] for token in pieces[1::2]]
        if written != media:
            raise errors.InputError(
                "chat template: must write one placeholder for each image and video in order, "
                f"got {written} for {media}"
            )
        patches, repeats = [], []
        sized = zip(images, scales or [None] * len(images), strict=True)
        given = {"image": sized, "video": zip(videos, [None] * len(videos), strict=True)}
        for index, kind in enumerate(media):
            name = f"{kind} {media[: index + 1].count(kind)}"
            cut, pieces[2 * index + 1], steps = self._cut(kind, *next(given[kind]), name)
            patches.append(cut)
            # The merger makes a token of merge_size**2 patches, for images and videos alike.
            repeats += [len(cut.pixels) // self.image_settings.merge_size**2 // steps] * steps
        tokens = np.asarray(self.token_ids("".join(pieces)), np.int32)
        return self._assemble(tokens, repeats, patches, media)

    def token_ids(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text, equal to those of a call of the tokenizer.

        Unlike the call, this lets other threads run, and spends no time on options and on the
        tokens' positions in the text.
        """
        (encoded,) = self.tokenizer.backend_tokenizer.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens
        )
        return encoded.ids

    def _cut(
        self,
        kind: str,
        given: Image.Image | videos_lib.Video,
        scale: records.Scale | None,
        name: str,
    ) -> tuple[vision.Patches, str, int]:
        """Return the patches, the text that replaces the placeholder, and its placeholder count."""
        if kind == "image":
            cut = vision.image_patches(given, self.image_settings, scale=scale, name=name)
            return cut, chat.IMAGE_TOKEN, 1
        self.check_video(name)
        cut, seconds = videos_lib.patches(given, self.video_settings, name=name)
        return cut, video_text(seconds), len(seconds)

    def check_video(self, name: str) -> None:
        """Raise InputError if the checkpoint has no settings for videos."""
        if self.video_settings is None:
            raise errors.InputError(f"{name}: the checkpoint's folder has no settings for videos")

    def _assemble(
        self,
        tokens: np.ndarray,
        repeats: Sequence[int],
        patches: Sequence[vision.Patches],
        media: Sequence[str],
    ) -> Encoded:
        """Repeat each placeholder token to the number of its merged patches."""
        is_placeholder = (tokens == self.ids.image) | (tokens == self.ids.video)
        times = np.ones(len(tokens), np.int64)
        times[is_placeholder] = repeats
        tokens = np.repeat(tokens, times)
        token_types = np.full(len(tokens), _TEXT, np.int32)
        token_types[tokens == self.ids.image] = _IMAGE
        token_types[tokens == self.ids.video] = _VIDEO
        return Encoded(
            tokens=tokens,
            token_types=token_types,
            patches=tuple(cut.pixels for cut in patches),
            grids=np.asarray([cut.grid for cut in patches], np.int32).reshape(-1, 3),
            is_video=np.asarray([kind == "video" for kind in media], bool),
        )

    def decode(self, tokens: Sequence[int] | np.ndarray, *, keep_special: bool = False) -> str:
        """Return the text of tokens, by default without special tokens."""
        return self.tokenizer.decode(
            [int(token) for token in tokens],
            skip_special_tokens=not keep_special,
            clean_up_tokenization_spaces=False,
        )


def video_text(seconds: Sequence[float]) -> str:
    """Return a video's text: the time of each grid step, then one placeholder for its tokens."""
    step = chat.VISION_START_TOKEN + chat.VIDEO_TOKEN + chat.VISION_END_TOKEN
    return "".join(f"<{time:.1f} seconds>{step}" for time in seconds)


def _check_count(kind: str, num_placeholders: int, num_given: int) -> None:
    if num_placeholders != num_given:
        raise errors.InputError(
            f"messages: number of {kind} placeholders must equal number of {kind}s, "
            f"got {num_placeholders} placeholders and {num_given} {kind}s"
        )


def _load_tokenizer(folder: pathlib.Path) -> transformers.PreTrainedTokenizerBase:
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise errors.InputError(f"{folder}: no tokenizer.json and no vocab.json")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    # The tokenizers library raises a bare Exception for a file that it cannot read.
    except Exception as error:
        raise errors.InputError(f"{folder}: the tokenizer cannot be loaded: {error}") from error
    if not isinstance(tokenizer, transformers.PreTrainedTokenizerFast):
        raise errors.InputError(
            f"{folder}: the tokenizer must be one of the tokenizers library, got "
            f"{type(tokenizer).__name__}"
        )
    if not isinstance(tokenizer.model_max_length, int | float):
        raise errors.InputError(
            f"{folder / 'tokenizer_config.json'}: model_max_length must be a number, got "
            f"{tokenizer.model_max_length!r:.100}"
        )
    # As in transformers, ignore the file's settings of truncation and padding.
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return tokenizer


def _special_ids(
    folder: pathlib.Path,
    config: dict[str, Any],
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> SpecialIds:
    """Return the ids, after checking that tokenizer and checkpoint agree on them."""
    text_config = config.get("text_config")
    vocab_size = text_config.get("vocab_size") if isinstance(text_config, dict) else None
    if not isinstance(vocab_size, int):
        raise errors.InputError(
            f"{folder / 'config.json'}: text_config.vocab_size must be a whole number, "
            f"got {vocab_size!r}"
        )
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > vocab_size:
        raise errors.InputError(
            f"{folder}: the tokenizer does not fit the checkpoint: it has {needed} tokens, "
            f"text_config.vocab_size of config.json is {vocab_size}"
        )
    ids = {}
    for name, token in (
        ("image", chat.IMAGE_TOKEN),
        ("video", chat.VIDEO_TOKEN),
        ("vision_start", chat.VISION_START_TOKEN),
        ("vision_end", chat.VISION_END_TOKEN),
    ):
        encoded = tokenizer.encode(token, add_special_tokens=False)
        wanted = config.get(f"{name}_token_id")
        if encoded != [wanted]:
            raise errors.InputError(
                f"{folder}: the tokenizer does not fit the checkpoint: {token} is "
                f"{encoded} in the tokenizer, {name}_token_id of config.json is {wanted}"
            )
        ids[name] = wanted
    ends = _end_ids(folder, config, tokenizer)
    if any(not isinstance(end, int) or not 0 <= end < vocab_size for end in ends):
        raise errors.InputError(
            f"{folder}: end tokens must be whole numbers below {vocab_size}, got {ends}"
        )
    pad = tokenizer.pad_token_id
    if pad is None:
        raise errors.InputError(f"{folder}: the tokenizer must have a padding token, got none")
    return SpecialIds(**ids, pad=pad, ends=tuple(sorted(set(ends))))


def _end_ids(
    folder: pathlib.Path,
    config: dict[str, Any],
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> list[Any]:
    """Return the end tokens of the first source that has some.

    Sources: `generation_config.json`, `config.json`, its text part, the tokenizer.
    """
    path = folder / "generation_config.json"
    generation = image_settings.read_json(path) if path.is_file() else {}
    places = (generation, config, config.get("text_config", {}))
    candidates = [place.get("eos_token_id") for place in places] + [tokenizer.eos_token_id]
    ends = next((ids for ids in candidates if ids is not None), None)
    if ends is None:
        raise errors.InputError(f"{folder}: no eos_token_id in any configuration or the tokenizer")
    return list(ends) if isinstance(ends, list) else [ends]
