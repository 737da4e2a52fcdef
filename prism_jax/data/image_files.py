"""Pictures of rows as files beside a data set, each written once."""

import hashlib
import io
import pathlib

from PIL import Image

from prism_jax.data import records

FOLDER = "images"


def keep(image: records.Image, root: pathlib.Path) -> str:
    """Write a validated picture's bytes below `root`, named by their hash; return its path there.

    Equal pictures are one file. A file is there whole or not at all.
    """
    digest = hashlib.sha256(image.data).hexdigest()
    with Image.open(io.BytesIO(image.data)) as opened:
        name = f"{FOLDER}/{digest}.{opened.format.lower()}"
    path = root / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(image.data)
        partial.replace(path)
    return name
