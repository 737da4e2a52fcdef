"""Encoded chats as the model's examples."""

import numpy as np

from models import inputs
from prism_jax.data import images, processor


def from_encoded(encoded: processor.Encoded, settings: processor.Processor) -> inputs.Example:
    """Return the example of an encoded chat.

    Pixels stay uint8 where the model normalises them itself (mean and deviation 0.5, the published
    settings); other settings are applied here and give float32.
    """
    pixels = []
    for patches, is_video in zip(encoded.patches, encoded.is_video, strict=True):
        own = settings.video_settings if is_video else settings.image_settings
        is_usual = set(own.image_mean) == set(own.image_std) == {0.5}
        pixels.append(patches if is_usual else images.normalise(patches, own))
    return inputs.Example(
        tokens=encoded.tokens,
        token_types=encoded.token_types,
        grids=[(int(t), int(h), int(w)) for t, h, w in np.asarray(encoded.grids)],
        pixels=pixels,
    )
