"""Sample the frames of a video and cut them into patches, as Hugging Face's processor does."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from prism_jax import errors
from prism_jax.data import image_settings, images


@dataclasses.dataclass(frozen=True, kw_only=True)
class Video:
    """The frames of a video, all of them or a sample at an even rate.

    With `is_sampled` the frames are used as they are; otherwise they are sampled at
    `sampled_per_second`, by default the rate of the checkpoint's settings.
    """

    frames: Sequence[Image.Image]  # all of the same size; they may be decoded when they are read
    frames_per_second: float  # of `frames` as given
    is_sampled: bool = False
    sampled_per_second: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The frames of a video that the model sees."""

    indices: np.ndarray  # int64[frames]
    height_pixels: int
    width_pixels: int
    seconds: list[float]  # the time of each grid step
    grid: tuple[int, int, int]  # t, h, w in patches


def plan(
    num_frames: int,
    height: int,
    width: int,
    settings: image_settings.VideoSettings,
    *,
    frames_per_second: float,
    is_sampled: bool,
    sampled_per_second: float | None,
    name: str = "video",
) -> Plan:
    """Return the frames to use, their size and their times.

    A grid step covers `temporal_patch_size` frames, and its time is the mean of the first and the
    last frame's. An incomplete last step repeats the last frame.

    Args:
      height, width: of the frames as given, in pixels.

    Source: transformers models/qwen3_vl/processing_qwen3_vl.py _calculate_timestamps.
    """
    if num_frames < 1 or not 0 < frames_per_second < math.inf:
        raise errors.InputError(
            f"{name}: must have frames and a positive rate, got {num_frames} frames at "
            f"{frames_per_second} a second"
        )
    indices = np.arange(num_frames)
    if not is_sampled:
        if sampled_per_second is not None:
            settings = dataclasses.replace(settings, frames_per_second=sampled_per_second)
        indices = sample_frames(num_frames, frames_per_second=frames_per_second, settings=settings)
    height, width = frame_size(len(indices), height, width, settings, name=name)
    step, patch = settings.temporal_patch_size, settings.patch_size
    seconds = indices / frames_per_second
    seconds = np.pad(seconds, (0, -len(seconds) % step), mode="edge").reshape(-1, step)
    return Plan(
        indices=indices,
        height_pixels=height,
        width_pixels=width,
        seconds=[(s[0] + s[-1]) / 2 for s in seconds.tolist()],
        grid=(len(seconds), height // patch, width // patch),
    )


def sample_frames(
    num_frames: int, *, frames_per_second: float, settings: image_settings.VideoSettings
) -> np.ndarray:
    """Return the indices of the frames to use, int64, evenly spread from first to last.

    Source: transformers models/qwen3_vl/video_processing_qwen3_vl.py sample_frames.
    """
    wanted = int(num_frames / frames_per_second * settings.frames_per_second)
    wanted = min(max(wanted, settings.min_frames), settings.max_frames, num_frames)
    return np.linspace(0, num_frames - 1, wanted).round().astype(np.int64)


def frame_size(
    num_frames: int,
    height: int,
    width: int,
    settings: image_settings.VideoSettings,
    *,
    name: str = "video",
) -> tuple[int, int]:
    """Return the height and width to resize all frames to.

    Like `smart_resize`, but the bounds hold for frames * height * width, and a side shorter than
    a token is scaled up first. Raises InputError for fewer frames than a patch spans.

    Source: transformers models/qwen3_vl/video_processing_qwen3_vl.py smart_resize.
    """
    step, factor = settings.temporal_patch_size, settings.factor
    if num_frames < step:
        raise errors.InputError(f"{name}: must have at least {step} frames, got {num_frames}")
    max_pixels = settings.max_pixels
    if settings.max_frame_tokens is not None:
        cap = min(settings.max_frame_tokens * factor * factor, max_pixels // num_frames)
        max_pixels = max(cap, int(settings.min_pixels * 1.05)) * num_frames
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    images.check_aspect_ratio(height, width, name)
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    volume = round(num_frames / step) * step * new_height * new_width
    if volume > max_pixels:
        scale = math.sqrt(num_frames * height * width / max_pixels)
        return images.shrink(height, width, scale, factor)
    if volume < settings.min_pixels:
        scale = math.sqrt(settings.min_pixels / (num_frames * height * width))
        return images.grow(height, width, scale, factor)
    return new_height, new_width


def patches(
    video: Video, settings: image_settings.VideoSettings, *, name: str = "video"
) -> tuple[images.Patches, list[float]]:
    """Sample, resize and cut a video; return its patches and the time of each grid step in seconds.

    Raises InputError for frames of several sizes, and as `plan`.
    """
    first = video.frames[0] if video.frames else Image.new("RGB", (1, 1))
    used = plan(
        len(video.frames),
        first.height,
        first.width,
        settings,
        frames_per_second=video.frames_per_second,
        is_sampled=video.is_sampled,
        sampled_per_second=video.sampled_per_second,
        name=name,
    )
    frames = images.resize(
        _checked(video.frames, used.indices, name), used.height_pixels, used.width_pixels, name
    )
    return images.patchify(frames, settings), used.seconds


def _checked(
    frames: Sequence[Image.Image], indices: np.ndarray, name: str
) -> Iterator[Image.Image]:
    """Yield the frames one by one, so that only one is held in its full size."""
    size = frames[0].size
    for index in indices.tolist():
        frame = frames[index]
        if frame.size != size:
            raise errors.InputError(
                f"{name}: frames must have one size, got {sorted({size, frame.size})}"
            )
        yield frame
