"""Encoded chats as the model's examples."""

import numpy as np

from models import inputs
from prism_jax.data import images, processor


def from_encoded(encoded: processor.Encoded, settings: processor.Processor) -> inputs.Example:
    """Return the example of an encoded chat.

    With the published settings (mean and deviation 0.5) pixels stay uint8, and the model
    normalises them. Other settings are applied here and give float32.
    """
    pixels = []
    for patches, is_video in zip(encoded.patches, encoded.is_video, strict=True):
        used = settings.video_settings if is_video else settings.image_settings
        if not used.is_normalised_by_model:
            patches = images.normalise(patches, used)
        pixels.append(patches)
    return inputs.Example(
        tokens=encoded.tokens,
        token_types=encoded.token_types,
        grids=[(int(t), int(h), int(w)) for t, h, w in np.asarray(encoded.grids)],
        pixels=pixels,
    )
