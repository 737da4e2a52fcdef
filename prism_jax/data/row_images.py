"""Read and check the pictures and videos of rows, from files or stored in a data set."""

import dataclasses
import hashlib

from prism_jax import errors
from prism_jax.data import images, paths, records, video_files


def load(row: records.Row, root: str, *, limit_pixels: int, limit_bytes: int) -> records.Row:
    """Return the row with the bytes, sha256 and sizes of its images and videos, after decoding all.

    Args:
      limit_pixels: of a picture or a frame.
      limit_bytes: of a picture; a video's files may have `video_files.LIMIT_BYTES`.
    """
    loaded: list[records.Image | records.Video] = []
    for item in records.get_media(row):
        if isinstance(item, records.Image):
            data = read_bytes(item, root, limit_bytes=limit_bytes)
            loaded.append(_check(item, data, limit_pixels))
        elif item.is_list:
            loaded.append(_load_list(item, root, limit_pixels, limit_bytes))
        else:
            loaded.append(_load_file(item, root, limit_pixels))
    return records.replace_media(row, loaded)


def _check(image: records.Image, data: bytes, limit_pixels: int) -> records.Image:
    """Return a picture with its bytes and sizes, after decoding it."""
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
    return _with_sizes(image, data, (width, height))


def _with_sizes(image: records.Image, data: bytes, size: tuple[int, int]) -> records.Image:
    return dataclasses.replace(
        image,
        data=data,
        sha256=hashlib.sha256(data).hexdigest(),
        width_pixels=size[0],
        height_pixels=size[1],
    )


def _load_list(
    video: records.Video, root: str, limit_pixels: int, limit_bytes: int
) -> records.Video:
    """Return a video of pictures, each decoded; all must have one size."""
    frames: list[records.Image] = []
    left = video_files.LIMIT_BYTES
    for file in video.files:
        data = read_bytes(file, root, limit_bytes=min(limit_bytes, left))
        left -= len(data)
        frames.append(_check(file, data, limit_pixels))
        size, first = (
            (frame.width_pixels, frame.height_pixels) for frame in (frames[-1], frames[0])
        )
        try:
            video_files.check_limits(len(frames), size, video_files.name_of(video))
        except errors.InputError as error:
            raise records.RowError("bad_video", str(error)) from error
        if size != first:
            raise records.RowError(
                "bad_video",
                f"video {video_files.name_of(video)}: frames must have one size, got {first} and "
                f"{size} in frame {len(frames)}",
            )
    if len(frames) < 2:
        raise records.RowError(
            "bad_video", f"video {video_files.name_of(video)}: must have at least 2 frames, got 1"
        )
    return dataclasses.replace(video, files=tuple(frames), num_frames=len(frames))


def _load_file(video: records.Video, root: str, limit_pixels: int) -> records.Video:
    """Return a video with its rate and the number of its frames, after decoding it to the end."""
    (file,) = video.files
    data = read_bytes(file, root, limit_bytes=video_files.LIMIT_BYTES)
    name = video_files.name_of(video)
    try:
        num_frames, rate, size = video_files.measure(data, name, limit_pixels=limit_pixels)
        images.check_aspect_ratio(size[1], size[0], f"video {name}")
    except errors.InputError as error:
        raise records.RowError("bad_video", str(error)) from error
    return dataclasses.replace(
        video,
        files=(_with_sizes(file, data, size),),
        frames_per_second=rate,
        num_frames=num_frames,
    )


def read_bytes(image: records.Image, root: str, *, limit_bytes: int) -> bytes:
    """Return the encoded bytes of a file, from the row or from its file below `root`."""
    if image.data is None:
        return paths.read_image(root, image.path, limit_bytes=limit_bytes)
    if len(image.data) > limit_bytes:
        raise records.RowError(
            "image_too_big", f"{len(image.data)} bytes, the limit is {limit_bytes}"
        )
    return image.data


def check_stored(row: records.Row, place: str) -> None:
    """Raise InputError if a stored picture or video does not have its sha256."""
    for file in records.get_files(row):
        if hashlib.sha256(file.data).hexdigest() != file.sha256:
            raise errors.InputError(f"{place}: a picture is damaged: its sha256 is another")


def check_pixels(row: records.Row, *, limit_pixels: int) -> None:
    """Raise RowError for pixels beyond the limit, which may have been higher at the build."""
    for file in records.get_files(row):
        width, height = file.width_pixels, file.height_pixels
        if width * height > limit_pixels:
            raise records.RowError(
                "bad_image", f"must have at most {limit_pixels} pixels, got {width} x {height}"
            )
