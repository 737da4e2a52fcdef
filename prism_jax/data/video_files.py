"""Open videos: a list of pictures, an animated picture, or a container that PyAV decodes.

Pillow reads GIF, WebP and PNG; MP4, MOV, WebM, Matroska and AVI need the extra `video`. Frames are
decoded one by one, in order, when they are read.
"""

import contextlib
import fractions
import functools
import importlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image

from prism_jax import errors
from prism_jax.data import images, records, videos

# Bounds on the decoding of one video: five minutes of 1920 x 1080 at 30 frames per second, and no
# more than half an hour of any size at 60.
LIMIT_FRAMES = 108_000
LIMIT_PIXELS = 20_000_000_000
LIMIT_BYTES = 256 << 20

_ANIMATED = ("GIF", "WEBP", "PNG")
# A frame shown for less than 20 ms has no usable time; like browsers and FFmpeg, take 100 ms.
_LEAST_MILLISECONDS = 20
_USUAL_MILLISECONDS = 100


class _Frames(Sequence[Image.Image]):
    """The frames of a file, decoded in order; reading an earlier one starts anew."""

    def __init__(self, decode: Callable[[], Iterator[Image.Image]], num_frames: int, name: str):
        self._decode, self._name = decode, name
        self._num_frames = num_frames
        self._next = num_frames + 1  # the first read starts the decoder

    def __len__(self) -> int:
        return self._num_frames

    def __getitem__(self, index: int) -> Image.Image:
        index = range(self._num_frames)[index]
        if index < self._next - 1:
            self._stream, self._next = self._decode(), 0
        while self._next <= index:
            frame = next(self._stream, None)
            # Of a folder that was changed, or another decoder: no end of the caller's iteration.
            if frame is None:
                raise errors.InputError(
                    f"video {self._name}: must have {self._num_frames} frames as when it was "
                    f"checked, got {self._next}"
                )
            self._frame = frame
            self._next += 1
        return self._frame


class _Pictures(Sequence[Image.Image]):
    """The frames of a list of pictures, each decoded when it is read."""

    def __init__(self, files: Sequence[records.Image]):
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Image.Image:
        return images.open_stored(self._files[index])


def open_stored(video: records.Video) -> videos.Video:
    """Open a validated video."""
    frames: Sequence[Image.Image] = _Pictures(video.files)
    if not video.is_list:
        name = name_of(video)
        (file,) = video.files
        limit = images.stored_limit(file)
        decode = functools.partial(_decode, file.data, name, limit_pixels=limit)
        frames = _Frames(lambda: (frame for frame, _ in decode()), video.num_frames, name)
    return videos.Video(
        frames=frames,
        frames_per_second=video.frames_per_second,
        is_sampled=video.is_sampled,
        sampled_per_second=video.sampled_per_second,
    )


def name_of(video: records.Video) -> str:
    """Return the name of a video in messages."""
    path = video.files[0].path
    return "bytes of the row" if path is None else records.shorten(path, 100)


def measure(data: bytes, name: str, *, limit_pixels: int) -> tuple[int, float, tuple[int, int]]:
    """Decode a file to its end; return the number of frames, their rate, and width and height.

    Raises InputError for a damaged file, one beyond the limits, and one with a single frame.
    """
    num_frames, seconds, size = 0, fractions.Fraction(0), None
    for frame, duration in _decode(data, name, limit_pixels=limit_pixels):
        size = size or frame.size
        if frame.size != size:
            raise errors.InputError(
                f"video {name}: frames must have one size, got {size} and {frame.size}"
            )
        num_frames, seconds = num_frames + 1, seconds + duration
        check_limits(num_frames, size, name)
    if num_frames < 2:
        raise errors.InputError(f"video {name}: must have at least 2 frames, got {num_frames}")
    return num_frames, float(num_frames / seconds), size


def check_limits(num_frames: int, size: tuple[int, int], name: str) -> None:
    """Raise InputError for a video with too many frames or pixels."""
    if num_frames > LIMIT_FRAMES:
        raise errors.InputError(f"video {name}: must have at most {LIMIT_FRAMES} frames")
    if num_frames * size[0] * size[1] > LIMIT_PIXELS:
        raise errors.InputError(
            f"video {name}: must have at most {LIMIT_PIXELS} pixels in all frames, got more in "
            f"{num_frames} frames of {size[0]} x {size[1]}"
        )


def file_format(data: bytes) -> str:
    """Return the name of a file's format, also its usual ending."""
    container = _container(data)
    return images.file_format(data).lower() if container is None else container


def _container(data: bytes) -> str | None:
    """Return PyAV's name of the container that a file begins as, None for any other file.

    These demuxers open no other file; that of a playlist would open files and addresses.
    """
    if data[4:8] == b"ftyp":
        return "mp4"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    return "avi" if data[:4] == b"RIFF" and data[8:12] == b"AVI " else None


def _decode(
    data: bytes, name: str, *, limit_pixels: int
) -> Iterator[tuple[Image.Image, fractions.Fraction]]:
    """Yield each frame as RGB, and the time in seconds for which it is shown."""
    if not data:
        raise errors.InputError(f"video {name}: the file is empty")
    container = _container(data)
    if container is None:
        yield from _decode_animation(data, name, limit_pixels)
    else:
        yield from _decode_container(data, container, name, limit_pixels)


def _check_frame(width: int, height: int, name: str, limit_pixels: int) -> None:
    if width * height > limit_pixels:
        raise errors.InputError(
            f"video {name}: frames must have at most {limit_pixels} pixels, got {width} x {height}"
        )


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Suppress Pillow's warnings: the limits here are lower, and damage is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _decode_animation(
    data: bytes, name: str, limit_pixels: int
) -> Iterator[tuple[Image.Image, fractions.Fraction]]:
    try:
        with _no_warnings():
            opened = Image.open(io.BytesIO(data), formats=_ANIMATED)
        with opened as image:
            _check_frame(*image.size, name, limit_pixels)
            with _no_warnings():
                num_frames = image.n_frames
            # The picture of a PNG for readers that know no animations is no frame.
            first = 1 if image.info.get("default_image") else 0
            for number in range(first, num_frames):
                with _no_warnings():
                    image.seek(number)
                _check_frame(*image.size, name, limit_pixels)  # a GIF's frame may be larger
                image.load()
                shown = image.info.get("duration") or 0
                shown = shown if shown >= _LEAST_MILLISECONDS else _USUAL_MILLISECONDS
                # PNG gives fractions of a second, which Pillow turns into floats.
                seconds = fractions.Fraction(shown).limit_denominator(10_000) / 1000
                yield images.to_rgb(image.copy(), name=name), seconds
    except errors.InputError:
        raise
    except Image.UnidentifiedImageError as error:
        raise errors.InputError(
            f"video {name}: not a video (GIF, WebP or PNG; with the extra `video`: MP4, MOV, WebM, "
            "Matroska, AVI)"
        ) from error
    except images.DECODE_ERRORS as error:
        raise errors.InputError(f"video {name}: cannot be decoded: {error}") from error


def _decode_container(
    data: bytes, container: str, name: str, limit_pixels: int
) -> Iterator[tuple[Image.Image, fractions.Fraction]]:
    """Yield the frames of the first video stream, at its average rate, not rotated.

    Source: transformers video_utils.py read_video_pyav.
    """
    av = _pyav(name)
    declared = _declared_bytes(data, container)
    if declared > len(data):
        raise errors.InputError(
            f"video {name}: the file is cut: it has {len(data)} bytes of {declared}"
        )
    try:
        with contextlib.ExitStack() as stack:
            opened = stack.enter_context(av.open(io.BytesIO(data), format=container))
            if not opened.streams.video:
                raise errors.InputError(f"video {name}: has no video stream")
            stream = opened.streams.video[0]
            if stream.codec_context is None:
                raise errors.InputError(f"video {name}: cannot be decoded: its codec is not known")
            _check_frame(stream.width, stream.height, name, limit_pixels)
            rate = stream.average_rate
            if not rate or rate <= 0:
                raise errors.InputError(f"video {name}: has no frame rate")
            for packet in opened.demux(stream):
                for frame in packet.decode():
                    if packet.is_corrupt or frame.is_corrupt:
                        raise errors.InputError(f"video {name}: cannot be decoded: it is damaged")
                    _check_frame(frame.width, frame.height, name, limit_pixels)
                    yield frame.to_image(), 1 / rate
    except errors.InputError:
        raise
    # Besides its own errors PyAV raises Python's for values out of range.
    except (av.error.FFmpegError, *images.DECODE_ERRORS) as error:
        raise errors.InputError(f"video {name}: cannot be decoded: {error}") from error


def _pyav(name: str) -> Any:
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise errors.InputError(
            f"video {name}: reading MP4, MOV, WebM, Matroska and AVI needs the extra `video`: "
            "pip install 'prism-jax[video]'; GIF, WebP, PNG and lists of pictures need no extra"
        ) from error


def _declared_bytes(data: bytes, container: str) -> int:
    """Return the size that a container states for itself; a cut file has less."""
    if container == "avi":
        return 8 + int.from_bytes(data[4:8], "little")
    return _mp4_bytes(data) if container == "mp4" else _matroska_bytes(data)


def _mp4_bytes(data: bytes) -> int:
    """Return the end of the last box: of each the size, the type, and a size of 8 bytes after 1."""
    place = 0
    while place + 8 <= len(data):
        num_bytes = int.from_bytes(data[place : place + 4], "big")
        if num_bytes == 1:
            num_bytes = int.from_bytes(data[place + 8 : place + 16], "big")
        if num_bytes < 8:
            return len(data)  # 0: up to the end of the file
        place += num_bytes
    return place


def _matroska_bytes(data: bytes) -> int:
    """Return the end of the second element, the segment; its size may be unknown."""
    place = 0
    for _ in range(2):
        first = data[place : place + 1]
        if not first or not first[0]:
            return len(data)
        place += 9 - first[0].bit_length()  # the id
        first = data[place : place + 1]
        if not first or not first[0]:
            return len(data)
        length = 9 - first[0].bit_length()
        ones = (1 << 7 * length) - 1
        num_bytes = int.from_bytes(data[place : place + length], "big") & ones
        if num_bytes == ones:
            return len(data)
        place += length + num_bytes
    return place
