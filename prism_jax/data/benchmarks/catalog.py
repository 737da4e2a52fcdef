"""The benchmarks by name, in the order of the paper's table."""

from collections.abc import Mapping

from prism_jax.data.benchmarks import (
    hallusion,
    layout,
    mathverse,
    mathvision,
    mathvista,
    mmmu,
    mmmu_pro,
    wemath,
)

LAYOUTS: Mapping[str, layout.Layout] = {
    one.name: one
    for one in (
        mathvista.LAYOUT,
        mathverse.LAYOUT,
        mathvision.LAYOUT,
        wemath.LAYOUT,
        mmmu.LAYOUT,
        mmmu_pro.STANDARD,
        mmmu_pro.VISION,
        hallusion.LAYOUT,
    )
}
