"""Pictures, clips and chats on which our processor is compared with Hugging Face's."""

import dataclasses
import pathlib

import numpy as np
from PIL import Image

from prism_jax.data import chat, videos
from tests import make_tokenizer

# Frames, height and width of videos whose resize is compared.
VIDEO_SIZES = [
    (num_frames, height, width)
    for num_frames in (2, 3, 5, 9)
    for height, width in (
        (1, 1),
        (16, 50),
        (48, 80),
        (64, 64),
        (100, 333),
        (1080, 1920),
        (20, 3000),
    )
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A chat with the names of its pictures and clips in order."""

    messages: list[chat.Message]
    pictures: tuple[str, ...] = ()
    clips: tuple[str, ...] = ()
    add_generation_prompt: bool = True


def write_folder(folder: pathlib.Path) -> make_tokenizer.Ids:
    """Write a checkpoint's processor files with limits that keep the pictures small."""
    ids = make_tokenizer.write(
        folder,
        min_pixels=64 * 64,
        max_pixels=128 * 128,
        video_min_pixels=2 * 64 * 64,
        video_max_pixels=6 * 96 * 96,
    )
    make_tokenizer.write_config(folder, ids)
    return ids


def smooth(height: int, width: int, *, phase: float = 0.0) -> np.ndarray:
    """Draw one slow wave in each channel: uint8[height, width, 3]."""
    y = np.linspace(0, np.pi, height)[:, None, None]
    x = np.linspace(0, np.pi, width)[None, :, None]
    channel = np.arange(3)[None, None, :]
    return np.round(127.5 + 120 * np.sin(y + x * (1 + channel / 3) + channel + phase)).astype(
        np.uint8
    )


def noise(height: int, width: int, channels: int) -> np.ndarray:
    """Draw uint8[height, width, channels] without structure."""
    shape = (height, width, channels)
    return np.random.default_rng(height * width).integers(0, 256, shape).astype(np.uint8)


def pictures() -> dict[str, Image.Image]:
    """Draw the pictures; those named `exact` need no resize under the limits of the folder."""
    opaque = noise(96, 64, 4)
    opaque[..., 3] = 255
    return {
        "exact": Image.fromarray(noise(64, 96, 3)),
        "exact_rgba": Image.fromarray(opaque),
        "exact_grey": Image.fromarray(noise(64, 64, 1)[..., 0]),
        "smooth": Image.fromarray(smooth(100, 75)),
        "large": Image.fromarray(smooth(300, 200)),
        "wide": Image.fromarray(smooth(8, 1000)),
        "tall": Image.fromarray(smooth(2000, 10)),
        "tiny": Image.fromarray(np.full((1, 1, 3), (200, 100, 50), np.uint8)),
    }


def clips() -> dict[str, videos.Video]:
    """Draw the clips: one to be sampled, one sampled with an odd number of frames."""
    to_sample = [Image.fromarray(smooth(64, 96, phase=i / 4)) for i in range(13)]
    odd = [Image.fromarray(smooth(60, 80, phase=i / 4)) for i in range(5)]
    return {
        "to_sample": videos.Video(frames=to_sample, frames_per_second=5.0),
        "odd": videos.Video(frames=odd, frames_per_second=1.5, is_sampled=True),
    }


CASES = {
    "no_image": Case(messages=[chat.turn("user", "What is 3 + 4?")]),
    "one_image": Case(
        messages=[chat.turn("user", "It's naïve, 中文 🎉 — why?", num_images=1)],
        pictures=("exact",),
    ),
    "two_images_and_a_system_turn": Case(
        messages=[
            chat.turn("system", "You are a helpful assistant.\n"),
            chat.turn("user", "Which is larger?", num_images=2),
        ],
        pictures=("smooth", "exact_rgba"),
    ),
    "several_turns": Case(
        messages=[
            chat.turn("user", "First.", num_images=1),
            {"role": "assistant", "content": "<think>\n\nIt is 12.</think> <answer>12</answer>"},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Between "},
                    {"type": "image"},
                    {"type": "text", "text": " and "},
                    {"type": "image"},
                    {"type": "text", "text": "?"},
                ],
            },
            chat.turn("assistant", "Nothing."),
        ],
        pictures=("wide", "tiny", "exact_grey"),
        add_generation_prompt=False,
    ),
    "large_images": Case(
        messages=[chat.turn("user", "", num_images=2)], pictures=("large", "tall")
    ),
    "a_video": Case(
        messages=[chat.turn("user", "What moves?", num_videos=1)], clips=("to_sample",)
    ),
    "an_odd_video_behind_an_image": Case(
        messages=[
            chat.turn("user", "Look.", num_images=1),
            chat.turn("user", "And here?", num_videos=1),
        ],
        pictures=("exact",),
        clips=("odd",),
    ),
}
