"""Cut images into patches, in the order of Hugging Face's Qwen3-VL processor.

The resize is Pillow's bicubic filter. Hugging Face's default backend resizes with torch, whose
bicubic filter rounds differently: grids are the same, pixels are equal without a resize and
within 2/255 on smooth images.
"""

import dataclasses
import io
import math
import pathlib
import struct
import warnings
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageOps

from prism_jax import errors
from prism_jax.data import image_settings, pictures, records

# Decoding takes 3 bytes per pixel, and a file of a few kilobytes can claim hundreds of megapixels.
# Phones with 50 megapixels take pictures of up to 8192 x 6144.
LIMIT_PIXELS = 60_000_000
LARGEST_LIMIT_PIXELS = 1 << 28  # the highest limit that a user may set
MAX_ASPECT_RATIO = 200

# Pillow also opens formats that start other programs (EPS) or that no data set uses.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# The step between two grey values of 1, 2 and 4 bits, by Pillow's name for the stored form.
_GREY_STEPS = {"1": 255, "L;2": 85, "L;4": 17}
# Raised by Pillow's decoders for damaged files, besides UnidentifiedImageError.
DECODE_ERRORS = (
    OSError,
    RuntimeError,
    MemoryError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    ArithmeticError,
    struct.error,
    Image.DecompressionBombError,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patches:
    """The patches of an image or video and their grid."""

    pixels: np.ndarray  # uint8[P, C]
    grid: tuple[int, int, int]  # t, h, w in patches; P = t * h * w


def open_image(
    source: str | pathlib.Path | bytes, *, name: str | None = None, limit_pixels: int = LIMIT_PIXELS
) -> Image.Image:
    """Open an image file or its bytes and return it upright, decoded, as RGB.

    Orientation tags are applied; see `to_rgb` for the conversion of colours. Only the first frame
    of an animation is used. `name` is used in messages.

    Raises InputError if the source is not a complete image of a usual format or has more than
    `limit_pixels` pixels; the size is read before any pixel is decoded.

    Source: transformers image_utils.py load_image.
    """
    if name is None:
        name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    if isinstance(source, bytes):
        data: io.BytesIO | pathlib.Path = io.BytesIO(source)
        is_empty = not source
    else:
        data = pathlib.Path(source)
        if "\0" in str(source) or not data.is_file():
            raise errors.InputError(f"image {name!r}: no such file")
        is_empty = data.stat().st_size == 0
    if is_empty:
        raise errors.InputError(f"image {name}: the file is empty")
    try:
        # The limit below replaces Pillow's warning.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(data, formats=FORMATS)
        with opened as image:
            width, height = image.size
            if width * height > limit_pixels:
                raise errors.InputError(
                    f"image {name}: must have at most {limit_pixels} pixels, got {width} x {height}"
                )
            _scale_transparency(image)
            image.load()
            return to_rgb(ImageOps.exif_transpose(image), name=name)
    except errors.InputError:
        raise
    except Image.UnidentifiedImageError as error:
        formats = ", ".join(FORMATS)
        raise errors.InputError(f"image {name}: not an image ({formats})") from error
    except DECODE_ERRORS as error:
        raise errors.InputError(f"image {name}: cannot be decoded: {error}") from error


def _scale_transparency(image: Image.Image) -> None:
    """Bring a PNG's transparent colour to the 8 bits of the pixels, which Pillow scales alone.

    Of 16 bits per channel the high byte counts, as in the pixels.
    """
    colour = image.info.get("transparency")
    if image.format != "PNG" or not image.tile:
        return
    stored = image.tile[0][3]
    if stored == "RGB;16B" and isinstance(colour, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    elif stored in _GREY_STEPS and isinstance(colour, int):
        image.info["transparency"] = colour * _GREY_STEPS[stored] & 255


def open_stored(image: records.Image) -> Image.Image:
    """Open a validated picture, which may be larger than the usual limit."""
    name = "bytes of the row" if image.path is None else image.path
    return open_image(image.data, name=name, limit_pixels=stored_limit(image))


def stored_limit(image: records.Image) -> int:
    """Return the most pixels that a validated file may have."""
    known = (image.width_pixels or 0) * (image.height_pixels or 0)
    return min(max(LIMIT_PIXELS, known), LARGEST_LIMIT_PIXELS)


def thumbnail(image: records.Image, *, side_pixels: int) -> tuple[bytes, int, int]:
    """Return a validated image as PNG, no longer than that on each side, and its width, height."""
    opened = open_stored(image)
    opened.thumbnail((side_pixels, side_pixels))
    written = io.BytesIO()
    opened.save(written, "PNG")
    return written.getvalue(), opened.width, opened.height


def file_format(data: bytes) -> str:
    """Return Pillow's name for the format of a validated picture."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        return opened.format


def to_rgb(image: Image.Image, *, name: str = "image") -> Image.Image:
    """Convert an image of any 8 or 16-bit mode to RGB.

    Transparent pixels are blended onto white, as in transformers 5.23 (5.17 shows the colour that
    hides under them). 16-bit grey keeps its high byte, as Pillow does for 16-bit colour
    (Hugging Face's conversion turns everything above 255 white).

    Source: transformers image_transforms.py convert_to_rgb.
    """
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint16)
        shown = (grey >> 8).astype(np.uint8)
        if isinstance(image.info.get("transparency"), int):
            shown[grey == image.info["transparency"]] = 255
        return Image.fromarray(shown).convert("RGB")
    if image.mode in ("I", "F"):
        raise errors.InputError(
            f"image {name}: grey values must have 8 or 16 bits, got Pillow mode {image.mode}"
        )
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def smart_resize(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int, name: str = "image"
) -> tuple[int, int]:
    """Return the height and width to resize to: multiples of `factor` with a bounded area.

    The aspect ratio is preserved as far as the multiples allow. Each side is at least `factor`, so
    a thin strip may have more than `max_pixels`.

    Raises InputError for an aspect ratio above 200.

    Source: transformers models/qwen2_vl/image_processing_qwen2_vl.py smart_resize.
    """
    check_aspect_ratio(height, width, name)
    area = height * width
    # Python rounds halves to the even neighbour here, and the reference does too.
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        return shrink(height, width, math.sqrt(area / max_pixels), factor)
    if new_height * new_width < min_pixels:
        return grow(height, width, math.sqrt(min_pixels / area), factor)
    return new_height, new_width


def fit(
    height: int,
    width: int,
    settings: image_settings.ImageSettings,
    scale: records.Scale | None,
    *,
    name: str = "image",
) -> tuple[int, int]:
    """Return the height and width to resize a picture to.

    The bounds of a picture replace those of the settings. If it sets only a single bound, the
    other is moved as far as that requires.

    Source: qwen-vl-utils vision_process.py fetch_image.
    """
    least, most = settings.min_pixels, settings.max_pixels
    if scale is not None and scale.resized_height is not None:
        height, width = scale.resized_height, scale.resized_width
        least, most = pictures.LEAST_PIXELS, pictures.MOST_PIXELS
    elif scale is not None:
        scale_least, scale_most = scale.min_pixels, scale.max_pixels
        least = min(least, scale_most) if scale_least is None else scale_least
        most = max(most, scale_least) if scale_most is None else scale_most
    return smart_resize(
        height, width, factor=settings.factor, min_pixels=least, max_pixels=most, name=name
    )


def check_aspect_ratio(height: int, width: int, name: str) -> None:
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise errors.InputError(
            f"{name}: aspect ratio must be <= {MAX_ASPECT_RATIO}, "
            f"got {ratio:.1f} ({width} x {height} pixels)"
        )


def shrink(height: int, width: int, scale: float, factor: int) -> tuple[int, int]:
    return (
        max(factor, math.floor(height / scale / factor) * factor),
        max(factor, math.floor(width / scale / factor) * factor),
    )


def grow(height: int, width: int, scale: float, factor: int) -> tuple[int, int]:
    return (
        math.ceil(height * scale / factor) * factor,
        math.ceil(width * scale / factor) * factor,
    )


def image_patches(
    image: Image.Image,
    settings: image_settings.ImageSettings,
    *,
    scale: records.Scale | None = None,
    name: str = "image",
) -> Patches:
    """Resize an image and cut it into patches of the model's size.

    Each patch repeats the image `temporal_patch_size` times, like a still video.
    """
    height, width = fit(image.height, image.width, settings, scale, name=name)
    return patchify(resize([image], height, width, name), settings)


def resize(images: Iterable[Image.Image], height: int, width: int, name: str) -> np.ndarray:
    """Return uint8[frames, height, width, 3]."""
    size = (width, height)
    frames = [to_rgb(image, name=name).resize(size, Image.Resampling.BICUBIC) for image in images]
    return np.stack([np.asarray(frame) for frame in frames])


def patchify(frames: np.ndarray, settings: image_settings.ImageSettings) -> Patches:
    """Cut uint8[frames, height, width, 3] into patches, those of an image token side by side.

    Order of patches: grid step, token row, token column, row and column inside the token. Order
    inside a patch: channel, frame, row, column.

    Source: transformers models/qwen2_vl/image_processing_pil_qwen2_vl.py patchify.
    """
    step, merge, patch = settings.temporal_patch_size, settings.merge_size, settings.patch_size
    num_frames, height, width, channels = frames.shape
    frames = np.concatenate([frames, *[frames[-1:]] * (-num_frames % step)])
    t, h, w = len(frames) // step, height // patch, width // patch
    blocks = frames.reshape(t, step, h // merge, merge, patch, w // merge, merge, patch, channels)
    blocks = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return Patches(
        pixels=blocks.reshape(t * h * w, channels * step * patch * patch), grid=(t, h, w)
    )


def normalise(pixels: np.ndarray, settings: image_settings.ImageSettings) -> np.ndarray:
    """Return float32 (pixels / 255 - mean) / std of uint8 patches, the shape unchanged.

    Source: transformers image_processing_backends.py rescale_and_normalize.
    """
    mean = np.asarray(settings.image_mean, np.float32)[:, None] * np.float32(255)
    std = np.asarray(settings.image_std, np.float32)[:, None] * np.float32(255)
    by_channel = pixels.reshape(len(pixels), len(settings.image_mean), -1).astype(np.float32)
    return ((by_channel - mean) / std).reshape(pixels.shape)
