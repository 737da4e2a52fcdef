"""Arrays of responses as text, for the position of a run in a checkpoint."""

import base64
import zlib
from collections.abc import Sequence

import numpy as np


def text_of(arrays: Sequence[np.ndarray], dtype: type) -> str:
    """Return the joined arrays as text, bit for bit."""
    # Decimal numbers would round log-probs, and a resumed run would no longer be bit-equal.
    joined = np.concatenate(arrays).astype(np.dtype(dtype).newbyteorder("<"))
    return base64.b64encode(zlib.compress(joined.tobytes())).decode()


def arrays_of(text: str, dtype: type, lengths: np.ndarray) -> list[np.ndarray]:
    """Return the arrays of these lengths that `text_of` was given."""
    data = zlib.decompress(base64.b64decode(text))
    joined = np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).astype(dtype)
    return np.split(joined, np.cumsum(lengths)[:-1])
