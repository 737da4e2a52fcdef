"""Read and check the pictures of rows, from files or stored in a data set."""

import dataclasses
import hashlib

from prism_jax import errors
from prism_jax.data import images, paths, records


def load(row: records.Row, root: str, *, limit_pixels: int, limit_bytes: int) -> records.Row:
    """Return the row with the bytes, sha256 and sizes of its images, after decoding each."""
    loaded = []
    for image in records.get_images(row):
        data = read_bytes(image, root, limit_bytes=limit_bytes)
        name = "bytes of the row" if image.path is None else records.shorten(image.path, 100)
        try:
            width, height = images.open_image(data, name=name, limit_pixels=limit_pixels).size
        except errors.InputError as error:
            raise records.RowError("bad_image", str(error)) from error
        sizes = {f"{width} x {height} pixels": (width, height)}
        if image.scale is not None and image.scale.resized_height is not None:
            sides = (image.scale.resized_width, image.scale.resized_height)
            sizes[f"resized to {sides[0]} x {sides[1]}"] = sides
        for size, sides in sizes.items():
            if max(sides) > images.MAX_ASPECT_RATIO * min(sides):
                raise records.RowError(
                    "bad_image",
                    f"image {name}: aspect ratio must be <= {images.MAX_ASPECT_RATIO}, got {size}",
                )
        loaded.append(
            dataclasses.replace(
                image,
                data=data,
                sha256=hashlib.sha256(data).hexdigest(),
                width_pixels=width,
                height_pixels=height,
            )
        )
    return records.replace_images(row, tuple(loaded))


def read_bytes(image: records.Image, root: str, *, limit_bytes: int) -> bytes:
    """Return the encoded bytes of an image, from the row or from its file below `root`."""
    if image.data is None:
        return paths.read_image(root, image.path, limit_bytes=limit_bytes)
    if len(image.data) > limit_bytes:
        raise records.RowError(
            "image_too_big", f"{len(image.data)} bytes, the limit is {limit_bytes}"
        )
    return image.data


def check_stored(row: records.Row, place: str) -> None:
    """Raise InputError if a stored picture does not have its sha256."""
    for image in records.get_images(row):
        if hashlib.sha256(image.data).hexdigest() != image.sha256:
            raise errors.InputError(f"{place}: a picture is damaged: its sha256 is another")


def check_pixels(row: records.Row, *, limit_pixels: int) -> None:
    """Raise RowError for a picture beyond the limit, which may have been higher at the build."""
    for image in records.get_images(row):
        width, height = image.width_pixels, image.height_pixels
        if width * height > limit_pixels:
            raise records.RowError(
                "bad_image", f"must have at most {limit_pixels} pixels, got {width} x {height}"
            )
