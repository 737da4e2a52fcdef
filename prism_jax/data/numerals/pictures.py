"""Draw `numerals` scenes with Pillow: handwritten digits on paper, and bar charts.

The handwriting, `handwriting.npz`, is the test set of UCI's "Optical Recognition of Handwritten
Digits" (E. Alpaydin and C. Kaynak, 1998, CC BY 4.0): 1797 grey pictures of 8x8 pixels. The writers
are not named, so train and test are disjoint in samples, by a hash of the sample's number.
"""

import functools
import io
import pathlib
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from prism_jax.data.numerals import scenes as numerals_scenes

# As in scikit-learn's `load_digits`: levels uint8[1797, 8, 8] from 0 to 16, digits uint8[1797].
_HANDWRITING = pathlib.Path(__file__).with_name("handwriting.npz")
_PAPER_RGB = {
    "white": (252, 252, 252),
    "cream": (246, 236, 208),
    "grey": (205, 205, 208),
    "black": (38, 40, 46),
}
_INK_RGB = {
    "black": (20, 20, 24),
    "blue": (24, 58, 190),
    "red": (196, 26, 30),
    "green": (10, 112, 48),
    "white": (244, 244, 244),
    "yellow": (246, 214, 52),
    "pink": (250, 120, 180),
    "cyan": (60, 214, 226),
}
# Canvas sides are multiples of this: Qwen3-VL's patch grid (patch 16, merge 2) needs no resizing.
_SIDE_PIXELS = 32
# Steepens the soft edge that smooth enlarging leaves around a stroke.
_STEEPEN = [min(255, max(0, (level - 70) * 2)) for level in range(256)]


@functools.cache
def handwriting(*, is_test: bool) -> dict[int, tuple[Image.Image, ...]]:
    """Return the samples of a split by digit, each 10x10 grey: the 8x8 sample and a border."""
    with np.load(_HANDWRITING, allow_pickle=False) as bundle:
        levels, digits = bundle["levels"], bundle["digits"]
    by_digit = {digit: [] for digit in range(10)}
    for number, (pixels, digit) in enumerate(zip(levels, digits, strict=True)):
        if numerals_scenes.belongs_to_test(f"digit sample {number}") != is_test:
            continue
        sample = Image.new("L", (10, 10))
        sample.paste(Image.fromarray((pixels * (255 / 16)).astype("uint8")), (1, 1))
        by_digit[int(digit)].append(sample)
    return {digit: tuple(samples) for digit, samples in by_digit.items()}


@functools.cache
def _font(height_pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=height_pixels)


def _mixed(rgb: tuple[int, int, int], other: tuple[int, int, int], share: float):
    return tuple(round(a * (1 - share) + b * share) for a, b in zip(rgb, other, strict=True))


def _background(width: int, height: int, paper: str, rng: random.Random) -> Image.Image:
    """Return a sheet of paper: plain, ruled with faint lines, or darker towards one side."""
    rgb = _PAPER_RGB[paper]
    middle = (128, 128, 128)
    look = rng.choice(("plain", "ruled", "shaded"))
    if look == "shaded":
        shade = Image.linear_gradient("L").point([level // 4 for level in range(256)])
        shade = shade.rotate(rng.choice((0, 90, 180, 270))).resize((width, height))
        return Image.composite(
            Image.new("RGB", (width, height), middle), Image.new("RGB", (width, height), rgb), shade
        )
    sheet = Image.new("RGB", (width, height), rgb)
    if look == "ruled":
        pen = ImageDraw.Draw(sheet)
        step = rng.randint(7, 11) * max(1, height // 100)
        for y in range(rng.randrange(step), height, step):
            pen.line((0, y, width, y), fill=_mixed(rgb, middle, 0.3))
    return sheet


def _soil(sheet: Image.Image, rng: random.Random, *, num_dots: int) -> None:
    """Add stray dots, and in half of the pictures a stray thin stroke."""
    pen = ImageDraw.Draw(sheet)
    width, height = sheet.size
    for _ in range(num_dots):
        level = rng.randint(70, 190)
        pen.point((rng.randrange(width), rng.randrange(height)), fill=(level, level, level))
    if rng.random() < 0.5:
        ends = (
            (rng.randrange(width), rng.randrange(height)),
            (
                rng.randrange(width),
                rng.randrange(height),
            ),
        )
        pen.line(ends, fill=(128, 128, 128))


def _digit_mask(digit: int, size: int, rng: random.Random, *, is_test: bool) -> Image.Image:
    sample = rng.choice(handwriting(is_test=is_test)[digit])
    strength = rng.uniform(0.7, 1.0)
    mask = sample.resize((size, size), Image.Resampling.BICUBIC)
    mask = mask.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC)
    return mask.point([round(level * strength) for level in _STEEPEN])


def _draw_other(sheet: Image.Image, mark: numerals_scenes.Mark, box: tuple[int, int, int]) -> None:
    """Draw a letter or a shape in the square (left, top, size)."""
    left, top, size = box
    pen = ImageDraw.Draw(sheet)
    rgb = _INK_RGB[mark.ink]
    inset = size // 5
    x0, y0, x1, y1 = left + inset, top + inset, left + size - inset, top + size - inset
    stroke = max(2, size // 14)
    if mark.kind == "letter":
        centre = (left + size // 2, top + size // 2)
        pen.text(centre, mark.name, fill=rgb, font=_font(size * 2 // 3), anchor="mm")
    elif mark.name == "diamond":
        xm, ym = (x0 + x1) // 2, (y0 + y1) // 2
        corners = ((x0, ym), (xm, y0), (x1, ym), (xm, y1), (x0, ym))
        pen.line(corners, fill=rgb, width=stroke, joint="curve")
    elif mark.name == "square":
        pen.rectangle((x0, y0, x1, y1), outline=rgb, width=stroke)
    elif mark.name == "triangle":
        corners = ((x0, y1), ((x0 + x1) // 2, y0), (x1, y1), (x0, y1))
        pen.line(corners, fill=rgb, width=stroke, joint="curve")
    else:
        assert mark.name == "cross", f"no drawing for the shape {mark.name}"
        pen.line((x0, y0, x1, y1), fill=rgb, width=stroke)
        pen.line((x0, y1, x1, y0), fill=rgb, width=stroke)


def draw_grid(
    grid: numerals_scenes.Grid, rng: random.Random, *, cell_pixels: tuple[int, int], is_test: bool
) -> Image.Image:
    """Draw a grid on a canvas whose sides are multiples of 32 pixels.

    `cell_pixels` is the range of a cell's side; a mark fills 0.8 to 0.95 of the side, at a random
    position inside.
    """
    cell = rng.randint(*cell_pixels)
    num_rows, num_columns = len(grid.rows), len(grid.rows[0])
    width = -(-num_columns * cell // _SIDE_PIXELS) * _SIDE_PIXELS
    height = -(-num_rows * cell // _SIDE_PIXELS) * _SIDE_PIXELS
    sheet = _background(width, height, grid.paper, rng)
    _soil(sheet, rng, num_dots=width * height // 200)
    left = rng.randint(0, width - num_columns * cell)
    top = rng.randint(0, height - num_rows * cell)
    for r, row in enumerate(grid.rows):
        for c, mark in enumerate(row):
            size = round(cell * rng.uniform(0.8, 0.95))
            x = left + c * cell + rng.randint(0, cell - size)
            y = top + r * cell + rng.randint(0, cell - size)
            if mark.kind == "digit":
                mask = _digit_mask(int(mark.name), size, rng, is_test=is_test)
                sheet.paste(_INK_RGB[mark.ink], (x, y), mask)
            else:
                _draw_other(sheet, mark, (x, y, size))
    return sheet


def draw_chart(chart: numerals_scenes.Chart, rng: random.Random) -> Image.Image:
    """Draw a bar chart of 256 to 320 by 192 to 256 pixels: labelled axis, no values on the bars."""
    width, height = rng.choice((256, 288, 320)), rng.choice((192, 224, 256))
    sheet = _background(width, height, chart.paper, rng)
    _soil(sheet, rng, num_dots=width * height // 800)
    pen = ImageDraw.Draw(sheet)
    left, right, top, bottom = 32, width - 8, 14, height - 24
    ink, line = (40, 40, 44), (150, 150, 154)

    def level(value: int) -> int:
        return round(bottom - (bottom - top) * value / chart.top)

    for value in range(0, chart.top + 1, chart.tick):
        pen.line((left, level(value), right, level(value)), fill=line)
        pen.text((left - 6, level(value)), str(value), fill=ink, font=_font(13), anchor="rm")
    slot = (right - left) / len(chart.bars)
    share = rng.uniform(0.45, 0.8)
    for place, bar in enumerate(chart.bars):
        middle = left + slot * (place + 0.5)
        rgb = _mixed(_INK_RGB[bar.colour], (255, 255, 255), rng.uniform(0.0, 0.25))
        x0, x1 = round(middle - slot * share / 2), round(middle + slot * share / 2)
        pen.rectangle((x0, level(bar.value), x1, bottom), fill=rgb)
        pen.text((middle, bottom + 11), bar.label, fill=ink, font=_font(14), anchor="mm")
    pen.line((left, top, left, bottom, right, bottom), fill=ink)
    return sheet


def png_bytes(picture: Image.Image) -> bytes:
    """Return the picture as a PNG file's bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
