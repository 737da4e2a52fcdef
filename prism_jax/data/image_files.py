"""Pictures and videos of rows as files beside a data set, each written only once."""

import hashlib
import pathlib
from typing import Any

from prism_jax.data import clips, pictures, records, video_files

Json = Any
FOLDER = "images"


def reference(image: records.Image, root: pathlib.Path) -> Json:
    """Write a picture and return a row's reference to it: its path, and its size if it sets one."""
    path = keep(image, root)
    return path if image.scale is None else {"path": path} | pictures.scale_fields(image.scale)


def video_reference(video: records.Video, root: pathlib.Path) -> Json:
    """Write a video's files and return a row's reference: its path or paths, and its rates."""
    kept = [keep(file, root) for file in video.files]
    paths, rates = kept if video.is_list else kept[0], clips.rate_fields(video)
    return {"video": paths} | rates if rates else paths


def keep(image: records.Image, root: pathlib.Path) -> str:
    """Write a validated file's bytes below `root`, named by their hash; return its path there.

    Equal files are written once, atomically.
    """
    digest = hashlib.sha256(image.data).hexdigest()
    name = f"{FOLDER}/{digest}.{video_files.file_format(image.data)}"
    path = root / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(image.data)
        partial.replace(path)
    return name
