"""Opening, resizing and cutting images; transformers' Pillow-based processor is the reference."""

import dataclasses
import io
import struct
import zlib

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as reference

from prism_jax import errors
from prism_jax.data import image_settings, images, records
from tests import processor_cases

SETTINGS = image_settings.ImageSettings(
    patch_size=16,
    merge_size=2,
    temporal_patch_size=2,
    min_pixels=64 * 64,
    max_pixels=128 * 128,
    image_mean=(0.5, 0.4, 0.3),
    image_std=(0.5, 0.25, 0.2),
)


def png(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def raw_png(width, height, *, bits=8, colour=2, pixels=b"\0" * 100, transparent=b"") -> bytes:
    """A PNG of any depth; by default one that claims a size and has next to no data."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = [chunk(b"IHDR", header)] + ([chunk(b"tRNS", transparent)] if transparent else [])
    chunks += [chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


# Opening


def test_open_image_reads_a_file_and_its_bytes_alike(tmp_path):
    array = processor_cases.noise(5, 7, 3)
    path = tmp_path / "a.png"
    path.write_bytes(png(Image.fromarray(array)))
    for source in (path, str(path), path.read_bytes()):
        opened = images.open_image(source)
        assert opened.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(opened), array)


@pytest.mark.parametrize(
    "content",
    [
        b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0garbage",
        b"",
    ],
    ids=["html", "eps", "png signature", "jpeg signature", "empty"],
)
def test_open_image_refuses_what_is_no_image_and_names_the_file(content, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(errors.InputError, match=r"broken\.png"):
        images.open_image(path)
    with pytest.raises(errors.InputError, match="row 7"):
        images.open_image(content, name="row 7")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_open_image_refuses_a_truncated_file(kind):
    file = io.BytesIO()
    Image.fromarray(processor_cases.noise(40, 40, 3)).save(file, kind)
    with pytest.raises(errors.InputError, match="row 7: cannot be decoded"):
        images.open_image(file.getvalue()[: file.tell() // 2], name="row 7")


def test_open_image_refuses_a_missing_file_a_folder_and_a_nul_byte(tmp_path):
    for path in (tmp_path / "none.png", tmp_path, f"{tmp_path}/a\0.png"):
        with pytest.raises(errors.InputError, match="no such file"):
            images.open_image(path)


@pytest.mark.parametrize("size", [(10_000, 10_000), (100_000, 100_000)])
def test_open_image_refuses_too_many_pixels_before_decoding(size, recwarn):
    # Decoded, the data would be found truncated: another message.
    with pytest.raises(errors.InputError, match=r"60000000 pixels|decompression bomb"):
        images.open_image(raw_png(*size))
    assert not recwarn.list


def test_a_telephones_largest_picture_is_opened_and_a_stored_one_as_large_as_it_was_allowed():
    assert images.open_image(png(Image.new("L", (8192, 6144)))).size == (8192, 6144)
    data = png(Image.new("L", (8000, 8000)))
    stored = records.Image(path=None, data=data, width_pixels=8000, height_pixels=8000)
    assert images.open_stored(stored).size == (8000, 8000)
    with pytest.raises(errors.InputError, match="60000000 pixels"):
        images.open_stored(dataclasses.replace(stored, width_pixels=10))


def test_open_image_accepts_exactly_the_limit():
    data = png(Image.new("RGB", (6, 5)))
    assert images.open_image(data, limit_pixels=30).size == (6, 5)
    with pytest.raises(errors.InputError, match="at most 29 pixels, got 6 x 5"):
        images.open_image(data, limit_pixels=29)


def test_open_image_applies_the_orientation_tag():
    image = Image.fromarray(np.array([[[255, 0, 0], [0, 255, 0]]], np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # To be shown turned by 90 degrees clockwise.
    opened = np.asarray(images.open_image(png(image, exif=exif)))
    np.testing.assert_array_equal(opened, [[[255, 0, 0]], [[0, 255, 0]]])


def test_transparent_pixels_are_blended_onto_white():
    rgba = np.array([[[255, 0, 0, 255], [9, 9, 9, 0], [0, 0, 0, 51]]], np.uint8)
    expected = [[[255, 0, 0], [255, 255, 255], [204, 204, 204]]]
    np.testing.assert_array_equal(np.asarray(images.to_rgb(Image.fromarray(rgba))), expected)
    grey = np.array([[[100, 255], [9, 0], [0, 51]]], np.uint8)
    expected = [[[100] * 3, [255] * 3, [204] * 3]]
    np.testing.assert_array_equal(np.asarray(images.to_rgb(Image.fromarray(grey, "LA"))), expected)


def test_a_palette_with_a_transparent_entry_is_blended_onto_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    opened = images.open_image(png(image, transparency=0))
    np.testing.assert_array_equal(np.asarray(opened), [[[255, 255, 255], [40, 50, 60]]])


@pytest.mark.parametrize(
    ("bits", "colour", "row", "transparent", "expected"),
    [
        (1, 0, b"\x40", 1, [0, 255, 0, 0]),
        (2, 0, b"\x1b", 1, [0, 255, 170, 255]),
        (4, 0, b"\x03\x5f", 3, [0, 255, 85, 255]),
        (8, 0, b"\x00\x03\x05\xff", 3, [0, 255, 5, 255]),
        (16, 0, b"\x00\x00\x03\x00\x05\x00\xff\xff", 0x0300, [0, 255, 5, 255]),
        (16, 2, bytes(6) + b"\x03\x00" * 3 + b"\x05\x00" * 3 + b"\xff" * 6, 0x0300,
         [0, 255, 5, 255]),
    ],
)  # fmt: skip
def test_a_transparent_colour_is_found_at_every_depth(bits, colour, row, transparent, expected):
    colours = struct.pack(">H", transparent) * (3 if colour == 2 else 1)
    data = raw_png(4, 1, bits=bits, colour=colour, pixels=b"\0" + row, transparent=colours)
    np.testing.assert_array_equal(np.asarray(images.open_image(data))[0, :, 0], expected)


def test_grey_of_16_bits_keeps_its_high_byte():
    grey = np.array([[0, 255, 256, 0x1234, 65535]], np.uint16)
    opened = np.asarray(images.open_image(png(Image.fromarray(grey))))
    np.testing.assert_array_equal(opened[0, :, 0], [0, 0, 1, 0x12, 255])


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes_are_converted_by_pillow(mode):
    image = Image.fromarray(processor_cases.noise(6, 5, 3)).convert("RGB")
    image = image.convert(mode) if mode != "LAB" else Image.new("LAB", (5, 6), (90, 120, 130))
    np.testing.assert_array_equal(
        np.asarray(images.to_rgb(image)), np.asarray(image.convert("RGB"))
    )


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_grey_without_a_known_range_is_refused(dtype):
    with pytest.raises(errors.InputError, match="8 or 16 bits"):
        images.to_rgb(Image.fromarray(np.zeros((2, 2), dtype)))


# Resizing and cutting


def test_smart_resize_equals_the_reference():
    sizes = [1, 7, 15, 16, 17, 31, 48, 80, 100, 333, 1024, 1999]
    limits = [(65536, 16777216), (4096, 16384), (1, 1024), (1024, 1024)]
    compared = 0
    for height in sizes:
        for width in sizes:
            if max(height, width) / min(height, width) > 200:
                continue
            for low, high in limits:
                compared += 1
                assert images.smart_resize(
                    height, width, factor=32, min_pixels=low, max_pixels=high
                ) == reference.smart_resize(height, width, 32, low, high)
    assert compared > 400


def test_smart_resize_by_hand():
    limits = {"factor": 32, "min_pixels": 65536, "max_pixels": 16777216}
    assert images.smart_resize(1, 1, **limits) == (256, 256)
    assert images.smart_resize(480, 640, **limits) == (480, 640)
    # 1.5 and 2.5 tokens both round to 2, and 64 * 1024 is just enough pixels.
    assert images.smart_resize(48, 1024, **limits) == (64, 1024)
    assert images.smart_resize(80, 1024, **limits) == (64, 1024)


def test_smart_resize_refuses_an_aspect_ratio_above_200():
    limits = {"factor": 32, "min_pixels": 1024, "max_pixels": 65536}
    images.smart_resize(10, 2000, **limits)
    with pytest.raises(
        errors.InputError, match=r"image 2: aspect ratio must be <= 200, got 200\.1"
    ):
        images.smart_resize(2001, 10, name="image 2", **limits)


@pytest.mark.parametrize("name", processor_cases.pictures())
def test_patches_and_pixels_equal_the_reference_on_pillow(name):
    picture = processor_cases.pictures()[name]
    made = images.image_patches(picture, SETTINGS)
    expected = transformers.Qwen2VLImageProcessorPil(
        patch_size=16,
        size={"shortest_edge": SETTINGS.min_pixels, "longest_edge": SETTINGS.max_pixels},
        image_mean=list(SETTINGS.image_mean),
        image_std=list(SETTINGS.image_std),
    )(picture)
    assert made.pixels.dtype == np.uint8
    assert list(made.grid) == expected["image_grid_thw"][0].tolist()
    normal = images.normalise(made.pixels, SETTINGS)
    assert normal.dtype == np.float32
    # One byte is 1 / 255 / 0.2 = 0.02 here.
    np.testing.assert_allclose(normal, expected["pixel_values"], rtol=0, atol=1e-6)


def test_normalise_by_hand():
    # Channels first inside a patch: 4 values each.
    settings = dataclasses.replace(SETTINGS, temporal_patch_size=1, patch_size=2)
    pixels = np.array([[0, 255, 51, 0, 0, 255, 102, 0, 0, 255, 51, 0]], np.uint8)
    expected = [[-1, 1, -0.6, -1, -1.6, 2.4, 0, -1.6, -1.5, 3.5, -0.5, -1.5]]
    np.testing.assert_allclose(images.normalise(pixels, settings), expected, atol=1e-6)


def test_image_patches_stand_in_merge_order():
    # Every pixel of a 2 x 4 grid of patches tells its patch; two tokens of 2 x 2 patches.
    settings = dataclasses.replace(SETTINGS, min_pixels=32 * 64)
    patch = np.arange(8).reshape(2, 4).repeat(16, axis=0).repeat(16, axis=1).astype(np.uint8)
    made = images.image_patches(Image.fromarray(patch), settings)
    assert made.grid == (1, 2, 4)
    np.testing.assert_array_equal(made.pixels[:, 0], [0, 1, 4, 5, 2, 3, 6, 7])
    assert (made.pixels == made.pixels[:, :1]).all()
