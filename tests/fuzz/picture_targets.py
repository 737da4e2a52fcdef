"""Damaged pictures and videos of every format that is read."""

import io
import pathlib
import random

from PIL import Image

from prism_jax.data import images, video_files
from tests import data_files
from tests.fuzz import mutations
from tests.fuzz.target import Target, require

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_MODES = ("RGB", "L", "P", "RGBA", "LA", "1", "I;16", "CMYK")
_COMPRESSIONS = ("tiff_lzw", "tiff_deflate", "jpeg", "packbits")
_LIMIT_PIXELS = 1_000_000
_ORIENTATION = 0x0112
# Of this size and larger the sizes in a header are read from the first bytes.
_HEAD_BYTES = 64


class Pictures(Target):
    """Bytes to an upright RGB picture within the limit of pixels, or one line."""

    weight = 3.0
    num_short = 80

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        rng = random.Random(0)
        noise = Image.frombytes("RGB", (48, 40), bytes(rng.randrange(256) for _ in range(5760)))
        self._files = []
        for name in _FORMATS:
            for mode in _MODES:
                given = noise.convert("L").convert(mode) if mode == "I;16" else noise.convert(mode)
                self._add(given, name)
        for compression in _COMPRESSIONS:
            self._add(noise, "TIFF", compression=compression)
        exif = noise.getexif()
        exif[_ORIENTATION] = 6
        self._add(noise, "JPEG", exif=exif)
        self._add(noise, "GIF", save_all=True, append_images=[noise.rotate(90)])

    def _add(self, image: Image.Image, name: str, **options) -> None:
        buffer = io.BytesIO()
        try:
            image.save(buffer, name, **options)
        except (OSError, ValueError, KeyError):  # the format has no such mode
            return
        self._files.append(buffer.getvalue())

    def make(self, rng: random.Random) -> bytes:
        """Return a damaged file, its head damaged alone in four of ten."""
        data = rng.choice(self._files)
        if rng.random() < 0.4:
            head = mutations.damaged(rng, data[:_HEAD_BYTES], times=rng.choice((1, 2)))
            return head + data[_HEAD_BYTES:]
        return mutations.damaged(rng, data)

    def run(self, given: bytes) -> None:
        """Open the picture."""
        image = images.open_image(given, limit_pixels=_LIMIT_PIXELS)
        require(image.mode == "RGB", f"mode {image.mode}")
        require(image.width * image.height <= _LIMIT_PIXELS, "more pixels than the limit")


class Videos(Target):
    """Bytes to the number, the rate and the size of frames within the limits, or one line."""

    weight = 1.0
    num_short = 60

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        kinds = ("GIF", "WEBP", "PNG", "mp4", "matroska", "webm", "avi")
        self._files = [data_files.video(k, num_frames=5, frames_per_second=5) for k in kinds]

    def make(self, rng: random.Random) -> bytes:
        """Return a damaged file."""
        return mutations.damaged(rng, rng.choice(self._files))

    def run(self, given: bytes) -> None:
        """Decode all frames."""
        num_frames, rate, size = video_files.measure(given, "v", limit_pixels=_LIMIT_PIXELS)
        require(num_frames >= 2 and rate > 0, f"{num_frames} frames at {rate}")
        require(size[0] * size[1] <= _LIMIT_PIXELS, "more pixels than the limit")
