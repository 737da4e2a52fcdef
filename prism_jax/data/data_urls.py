"""Pictures as data URLs, for chat endpoints."""

import base64
import io

from PIL import Image

from prism_jax.data import images, records

# Formats that all endpoints read. Others, and pictures rotated by EXIF, are sent as upright PNG.
_SENT_AS_IS = ("PNG", "JPEG", "WEBP")
_ORIENTATION = 0x0112


def data_url(image: records.Image) -> str:
    """Return a validated picture's bytes in base64 with their media type."""
    data = image.data
    name = images.file_format(data)
    with Image.open(io.BytesIO(data), formats=(name,)) as opened:
        is_upright = opened.getexif().get(_ORIENTATION, 1) == 1
    if name not in _SENT_AS_IS or not is_upright:
        buffer = io.BytesIO()
        images.open_stored(image).save(buffer, "PNG")
        name, data = "PNG", buffer.getvalue()
    return f"data:image/{name.lower()};base64,{base64.b64encode(data).decode()}"
