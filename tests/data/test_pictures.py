"""Sizes that rows ask for their pictures reach the patches, or are refused."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from prism_jax.data import encode, images, pictures, processor, records
from tests import data_files, tiny_checkpoint

SIZES = {"min_pixels": 64 * 64, "max_pixels": 96 * 96}
SIDES = {"resized_height": 64, "resized_width": 64}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return processor.Processor.from_folder(
        tiny_checkpoint.write(tmp_path_factory.mktemp("pictures") / "model")
    )


def patches(words, scale, *, size=(320, 160)) -> tuple[int, int]:
    """Return height and width in patches, which measuring and encoding agree on."""
    picture = records.Image(
        path=None,
        data=data_files.png(size=size),
        width_pixels=size[0],
        height_pixels=size[1],
        scale=scale,
    )
    turns = [records.Message(role="user", content="<image>Q")]
    example = encode.example(turns, [picture], words, add_generation_prompt=True)
    measured = encode.measure(turns, [picture], words, add_generation_prompt=True)
    assert (measured.tokens, measured.patches) == (
        len(example.tokens),
        sum(map(len, example.pixels)),
    )
    ((_, height, width),) = example.grids
    return height, width


def test_a_picture_has_the_size_that_its_row_asks_for(words):
    # The checkpoint's bounds are 32 x 32 and 128 x 128 pixels; a patch has 16 x 16.
    assert patches(words, None) == (4, 10)  # 64 x 160 pixels of at most 16384, in steps of 32
    assert patches(words, records.Scale(resized_height=64, resized_width=192)) == (4, 12)
    assert patches(words, records.Scale(max_pixels=320 * 160)) == (10, 20)
    assert patches(words, records.Scale(max_pixels=64 * 64)) == (2, 4)
    assert patches(words, records.Scale(min_pixels=640 * 320)) == (20, 40)
    small = (32, 32)
    assert patches(words, records.Scale(min_pixels=96 * 96), size=small) == (6, 6)


def test_a_bound_that_is_not_given_moves_out_of_the_way_of_the_one_that_is(words):
    settings = dataclasses.replace(words.image_settings, min_pixels=256 * 256, max_pixels=512 * 512)
    assert images.fit(300, 300, settings, records.Scale(max_pixels=64 * 64)) == (64, 64)
    assert images.fit(300, 300, settings, records.Scale(min_pixels=640 * 640)) == (640, 640)


@pytest.mark.parametrize(
    ("value", "image"),
    [
        (
            {"image": "a.png"} | SIZES,
            records.Image(path="a.png", data=None, scale=records.Scale(**SIZES)),
        ),
        (
            {"bytes": b"x", "resized_height": 64.0, "resized_width": 96},
            records.Image(
                path=None, data=b"x", scale=records.Scale(resized_height=64, resized_width=96)
            ),
        ),
        (
            {"image": {"path": "a.png"} | SIZES, **SIZES},
            records.Image(path="a.png", data=None, scale=records.Scale(**SIZES)),
        ),
        (
            {"path": "a.png", "url": "./a.png", "type": "image"},
            records.Image(path="./a.png", data=None),
        ),
        ({"path": "a.png", "bytes": b""}, records.Image(path="a.png", data=None)),
        ({"path": "a.png", "bytes": ""}, records.Image(path="a.png", data=None)),
        (
            {"path": "", "bytes": b"x", "max_pixels": float("nan")},
            records.Image(path=None, data=b"x"),
        ),
    ],
)
def test_a_dict_of_a_picture_is_read_whole(value, image):
    assert pictures.read(value, "images[0]") == image


@pytest.mark.parametrize(
    ("value", "reason", "message"),
    [
        ({"path": ""}, "bad_type", "one of bytes, path"),
        ({"path": "", "bytes": None}, "bad_type", "one of bytes, path"),
        ({"image": {}}, "bad_type", "one of bytes, path"),
        ({"path": "a.png", "crop": [0, 0, 1, 1]}, "unsupported", "crop"),
        ({"path": "a.png", "image": "b.png"}, "image_mismatch", "two pictures"),
        ({"image": {"path": "a", "max_pixels": 5000}, "max_pixels": 6000}, "image_mismatch", "0"),
        ({"path": "a.png", "type": "video"}, "bad_type", "type must be image"),
        ({"path": "a.png", "resized_height": 64}, "unsupported", "resized_width"),
        ({"path": "a.png", "resized_height": 64, "min_pixels": 64}, "unsupported", "resized_width"),
        ({"path": "a.png"} | SIDES | SIZES, "unsupported", "bounds"),
        ({"path": "a.png", "resized_height": 8, "resized_width": 8}, "unsupported", "4096"),
        ({"path": "a.png", "max_pixels": 1024}, "unsupported", "must be <= max_pixels"),
        ({"path": "a.png", "max_pixels": "1024"}, "bad_type", "max_pixels"),
        ({"path": "a.png", "min_pixels": -1}, "bad_type", "min_pixels"),
        ({"path": "a.png", "max_pixels": 5000.5}, "bad_type", "max_pixels"),
        ({"path": "a.png", "max_pixels": True}, "bad_type", "max_pixels"),
    ],
)  # fmt: skip
def test_a_wrong_dict_of_a_picture_is_named(value, reason, message):
    with pytest.raises(records.RowError, match=message) as caught:
        pictures.read(value, "images[0]")
    assert caught.value.reason == reason


def test_16_bit_grey_has_its_transparent_value_white_and_keeps_the_rest():
    grey = np.full((4, 6), 0x9C00, np.uint16)
    grey[:, 3:] = 0x7693
    grey[0, 0] = 0x7694  # the same high byte as the transparent value
    data = data_files.encoded(Image.fromarray(grey), "PNG", transparency=0x7693)
    shown = np.asarray(images.open_image(data))[..., 0]
    assert (shown[:, 3:] == 255).all()
    assert (shown[0, 0], shown[1, 0]) == (0x76, 0x9C)
