"""Pictures of rows as files beside a data set, each written only once."""

import hashlib
import pathlib
from typing import Any

from prism_jax.data import images, pictures, records

Json = Any
FOLDER = "images"


def reference(image: records.Image, root: pathlib.Path) -> Json:
    """Write a picture and return a row's reference to it: its path, and its size if it sets one."""
    path = keep(image, root)
    return path if image.scale is None else {"path": path} | pictures.scale_fields(image.scale)


def keep(image: records.Image, root: pathlib.Path) -> str:
    """Write a validated picture's bytes below `root`, named by their hash; return its path there.

    Equal pictures share a file. Files are written atomically.
    """
    digest = hashlib.sha256(image.data).hexdigest()
    name = f"{FOLDER}/{digest}.{images.file_format(image.data).lower()}"
    path = root / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(image.data)
        partial.replace(path)
    return name
