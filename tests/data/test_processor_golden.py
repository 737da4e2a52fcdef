"""Our processor against `tests/golden/processor.npz`: the same chats through Hugging Face's."""

import pathlib

import numpy as np
import pytest

from prism_jax.data import image_settings, processor, videos
from tests import processor_cases

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "processor.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    processor_cases.write_folder(folder)
    made = processor.Processor.from_folder(folder)
    pictures, clips = processor_cases.pictures(), processor_cases.clips()
    return {
        name: made.encode(
            case.messages,
            images=[pictures[picture] for picture in case.pictures],
            videos=[clips[clip] for clip in case.clips],
            add_generation_prompt=case.add_generation_prompt,
        )
        for name, case in processor_cases.CASES.items()
    }


def pixels(encoded, *, of_videos):
    chosen = [
        patches
        for patches, is_video in zip(encoded.patches, encoded.is_video, strict=True)
        if is_video == of_videos
    ]
    return np.concatenate(chosen).astype(int) if chosen else None


def test_golden_file_covers_every_case(golden):
    named = {key.split("/")[0] for key in golden if "/" in key}
    assert named == set(processor_cases.CASES)


@pytest.mark.parametrize("name", processor_cases.CASES)
def test_ids_and_token_types_equal_the_reference(name, golden, encoded):
    np.testing.assert_array_equal(encoded[name].tokens, golden[f"{name}/tokens"])
    np.testing.assert_array_equal(encoded[name].token_types, golden[f"{name}/token_types"])


@pytest.mark.parametrize("name", processor_cases.CASES)
def test_grids_equal_the_reference(name, golden, encoded):
    none = np.zeros((0, 3), np.int32)
    grids, is_video = encoded[name].grids, encoded[name].is_video
    np.testing.assert_array_equal(grids[~is_video], golden.get(f"{name}/image_grids", none))
    np.testing.assert_array_equal(grids[is_video], golden.get(f"{name}/video_grids", none))


@pytest.mark.parametrize("name", processor_cases.CASES)
def test_pixels_are_within_two_of_the_reference(name, golden, encoded):
    for kind in ("image", "video"):
        ours = pixels(encoded[name], of_videos=kind == "video")
        assert (ours is not None) == (f"{name}/{kind}_pixels" in golden)
        if ours is not None:
            assert np.abs(ours - golden[f"{name}/{kind}_pixels"]).max() <= 2


def test_pixels_equal_the_reference_where_nothing_is_resized(golden, encoded):
    checked = 0
    for name, case in processor_cases.CASES.items():
        theirs = golden.get(f"{name}/image_pixels")
        start = 0
        for index, picture in enumerate(case.pictures):
            ours = encoded[name].patches[index]
            if picture.startswith("exact"):
                np.testing.assert_array_equal(ours, theirs[start : start + len(ours)])
                checked += 1
            start += len(ours)
    assert checked == 4
    (video,) = encoded["a_video"].patches
    np.testing.assert_array_equal(video, golden["a_video/video_pixels"])


def test_sizes_of_videos_equal_the_reference(golden, tmp_path):
    processor_cases.write_folder(tmp_path)
    settings = image_settings.VideoSettings.from_folder(tmp_path)
    ours = [videos.frame_size(*size, settings) for size in processor_cases.VIDEO_SIZES]
    np.testing.assert_array_equal(ours, golden["video_sizes"])
