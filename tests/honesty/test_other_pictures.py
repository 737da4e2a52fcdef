"""Other pictures for the panel: shuffled, blank and replaced ones keep their grids and types."""

import numpy as np

from models.inputs import Example
from prism_jax.discriminator import swaps
from prism_jax.honesty import other_pictures
from tests.honesty import constructed
from tests.models import cases


def test_shuffled_pictures_are_the_next_prompts_in_this_prompts_grid():
    prompts = constructed.pairs(num_prompts=3).prompts
    found = other_pictures.changed(prompts, "shuffled", spatial_merge_size=2)
    for place, one in enumerate(found):
        other = prompts[(place + 1) % 3]
        assert one.grids == prompts[place].grids
        assert one.pixels[0].shape == prompts[place].pixels[0].shape
        rows = {row.tobytes() for row in other.pixels[0]}
        assert {row.tobytes() for row in one.pixels[0]} <= rows
    # Prompts 0 and 2 have pictures of one size: they are handed on whole.
    np.testing.assert_array_equal(found[2].pixels[0], prompts[0].pixels[0])


def test_a_borrowed_picture_keeps_its_places():
    def picture(grid, merge):
        places = swaps._coords(grid, merge)
        pixels = (1000 * places[:, 1:2] + places[:, 2:3]).astype(np.float32)
        return Example(
            tokens=np.zeros(1, np.int32),
            token_types=np.zeros(1, np.int32),
            grids=[grid],
            pixels=[pixels],
        )

    small, large = picture((1, 2, 4), 2), picture((1, 4, 8), 2)
    found, _ = other_pictures.changed([small, large], "shuffled", spatial_merge_size=2)
    # Every second row and column of the large one, in the order of the small one's patches.
    places = swaps._coords((1, 2, 4), 2)
    np.testing.assert_array_equal(
        found.pixels[0][:, 0], 2 * (1000 * places[:, 1] + places[:, 2]).astype(np.float32)
    )


def test_blank_and_replaced_pictures_keep_their_type_and_a_prompt_without_stays():
    bare = cases.example("text", 5)
    seen = constructed.pairs(num_prompts=1).prompts[0]
    bright = Example(
        tokens=seen.tokens,
        token_types=seen.token_types,
        grids=seen.grids,
        pixels=[np.full(seen.pixels[0].shape, 200, np.uint8)],
    )
    blank = other_pictures.changed([bare, bright, seen], "blank", spatial_merge_size=2)
    assert blank[0] is bare
    assert blank[1].pixels[0].dtype == np.uint8 and (blank[1].pixels[0] == 128).all()
    assert (blank[2].pixels[0] == 0).all()
    noise = other_pictures.changed([bright], "replaced", spatial_merge_size=2)[0].pixels[0]
    again = other_pictures.changed([bright], "replaced", spatial_merge_size=2)[0].pixels[0]
    assert noise.dtype == np.uint8 and noise.std() > 50
    np.testing.assert_array_equal(noise, again)
