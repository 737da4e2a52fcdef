"""Write `golden/parity.npz`: what Hugging Face's classes compute on some cases.

    python -m tests.models.make_golden

Needs torch. Outputs are stored whole; of each gradient its norm and its product with a fixed vector
are.
"""

import pathlib

import numpy as np
import transformers

from tests.models import cases, reference

PATH = pathlib.Path(__file__).parent / "golden" / "parity.npz"
CASES = [
    ("dense_tied_2_levels_head64", "rows_of_different_length"),
    ("dense_untied_3_levels_head72", "a_video_and_an_image"),
    ("moe_untied", "two_images_of_different_size"),
]


def gradient_digest(name: str, gradient: np.ndarray) -> np.ndarray:
    """Return two numbers that follow a gradient closely."""
    wide = gradient.astype(np.float64)
    return np.array([np.linalg.norm(wide), (wide * cases.cotangent(name, wide.shape)).sum()])


def main() -> None:
    """Write the file."""
    arrays = {"transformers": np.array(transformers.__version__)}
    for config, rows in CASES:
        found = reference.forward(reference.model(cases.CONFIGS[config]), cases.ROWS[rows], rows)
        key = f"{config}/{rows}"
        for what, value in found.items():
            if what != "gradients":
                arrays[f"{key}/{what}"] = value
        for name, gradient in found["gradients"].items():
            arrays[f"{key}/gradient/{name}"] = gradient_digest(name, gradient)
    np.savez_compressed(PATH, **arrays)
    print(PATH.name, PATH.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
