"""Settings of images and videos in every form that checkpoints carry them."""

import dataclasses
import json

import pytest
import transformers

from prism_jax import errors
from prism_jax.data import image_settings
from tests import make_tokenizer


def write(folder, name, value):
    (folder / name).write_text(json.dumps(value))


def test_settings_of_the_published_form(tmp_path):
    make_tokenizer.write(tmp_path)
    settings = image_settings.ImageSettings.from_folder(tmp_path)
    assert settings == image_settings.ImageSettings(
        patch_size=16,
        merge_size=2,
        temporal_patch_size=2,
        min_pixels=65536,
        max_pixels=16777216,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    )
    video = image_settings.VideoSettings.from_folder(tmp_path)
    assert (video.min_pixels, video.max_pixels) == (4096, 25165824)
    assert (video.frames_per_second, video.min_frames, video.max_frames) == (2, 4, 768)
    assert video.max_frame_tokens is None


def published(tmp_path, name="preprocessor_config.json"):
    make_tokenizer.write(tmp_path)
    return json.loads((tmp_path / name).read_text())


def test_settings_of_the_nested_and_of_the_older_form_are_the_same(tmp_path):
    values = published(tmp_path)
    expected = image_settings.ImageSettings.from_folder(tmp_path)
    size = values.pop("size")
    write(tmp_path, "preprocessor_config.json", {
        **values, "min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]
    })  # fmt: skip
    assert image_settings.ImageSettings.from_folder(tmp_path) == expected
    # What transformers 5 saves, which wins over the other file.
    saved = transformers.Qwen2VLImageProcessorPil(**{
        **values, "size": {**size, "shortest_edge": 1024}
    }).to_dict()  # fmt: skip
    write(tmp_path, "processor_config.json", {"image_processor": saved})
    nested = image_settings.ImageSettings.from_folder(tmp_path)
    assert nested == dataclasses.replace(expected, min_pixels=1024)


def test_null_settings_mean_the_values_of_the_class(tmp_path):
    values = published(tmp_path)
    expected = image_settings.ImageSettings.from_folder(tmp_path)
    nulls = ("do_center_crop", "do_pad", "crop_size", "min_pixels", "resample", "do_resize")
    write(tmp_path, "preprocessor_config.json", values | dict.fromkeys(nulls))
    assert image_settings.ImageSettings.from_folder(tmp_path) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_resize": False}, "do_resize must be true, got False"),
        ({"resample": 2}, "resample must be 3, got 2"),
        ({"do_center_crop": True}, "do_center_crop must be false, got True"),
        ({"rescale_factor": 1.0}, "rescale_factor must be 1/255, got 1.0"),
        ({"size": {"height": 224, "width": 224}}, "size must hold shortest_edge"),
        (
            {"size": {"shortest_edge": 9, "longest_edge": 4}},
            "shortest_edge must be <= longest_edge",
        ),
        ({"size": 224}, "size must be a JSON object, got 224"),
        ({"rescale_factor": "1/255"}, "rescale_factor must be 1/255, got '1/255'"),
        ({"size": None}, "shortest_edge must be a positive whole number, got None"),
        ({"patch_size": 0}, "patch_size must be a positive whole number, got 0"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std must be three positive numbers"),
        ({"image_mean": 0.5}, "image_mean must be three numbers"),
        ({"image_processor_type": "CLIPImageProcessor"}, "image_processor_type must be"),
        ({"sharpen": 2}, "setting sharpen = 2 is not implemented"),
    ],
)
def test_settings_that_are_not_implemented_are_refused(change, message, tmp_path):
    values = published(tmp_path)
    write(tmp_path, "preprocessor_config.json", values | change)
    with pytest.raises(errors.InputError, match=f"preprocessor_config.json: .*{message}"):
        image_settings.ImageSettings.from_folder(tmp_path)


def test_settings_of_videos_are_read_and_checked(tmp_path):
    name = "video_preprocessor_config.json"
    values = published(tmp_path, name)
    write(tmp_path, name, values | {"fps": 1.5, "max_frames": 9, "cap_pixels_per_frame": True})
    settings = image_settings.VideoSettings.from_folder(tmp_path)
    assert (settings.frames_per_second, settings.max_frames) == (1.5, 9)
    assert settings.max_frame_tokens == 768
    for change in ({"do_sample_frames": False}, {"num_frames": 8}, {"fps": "2"}):
        write(tmp_path, name, values | change)
        with pytest.raises(errors.InputError, match=next(iter(change))):
            image_settings.VideoSettings.from_folder(tmp_path)


def test_missing_and_broken_files_of_settings_are_named(tmp_path):
    with pytest.raises(errors.InputError, match=r"no processor_config\.json .* or preprocessor"):
        image_settings.ImageSettings.from_folder(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(errors.InputError, match=r"preprocessor_config\.json: must be a readable"):
        image_settings.ImageSettings.from_folder(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("[]")
    with pytest.raises(errors.InputError, match="must hold a JSON object, got list"):
        image_settings.ImageSettings.from_folder(tmp_path)
