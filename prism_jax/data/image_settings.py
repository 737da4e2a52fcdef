"""The image and video settings in the processor files of a checkpoint folder."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from prism_jax import errors

_BICUBIC = 3

# Settings whose other values are not implemented. `null` in a file stands for the class's default,
# which is the first value here.
_FIXED = {
    "do_resize": (True,),
    "do_rescale": (True,),
    "do_normalize": (True,),
    "do_convert_rgb": (True,),
    "do_center_crop": (False,),
    "do_pad": (False,),
    "resample": (_BICUBIC,),
    "data_format": ("channels_first",),
    "input_data_format": (None,),
    "num_frames": (None,),
    "max_duration": (None,),
    "processor_class": ("Qwen3VLProcessor",),
    "image_processor_type": (
        "Qwen2VLImageProcessor",
        "Qwen2VLImageProcessorFast",
        "Qwen2VLImageProcessorPil",
    ),
    "video_processor_type": ("Qwen3VLVideoProcessor",),
}
# Settings without effect on pixels, grids or tokens of a model that resizes by area.
_WITHOUT_EFFECT = frozenset(
    {
        "crop_size",
        "pad_size",
        "default_to_square",
        "device",
        "disable_grouping",
        "return_tensors",
        "return_metadata",
        "video_metadata",
        "max_image_size",
        "auto_map",
        "_processor_class",
    }
)
_GEOMETRY = frozenset({"patch_size", "merge_size", "temporal_patch_size"})
_COLOUR = frozenset({"image_mean", "image_std", "rescale_factor"})
_IMAGE = _GEOMETRY | _COLOUR | {"size", "min_pixels", "max_pixels"}
_VIDEO = (
    _GEOMETRY
    | _COLOUR
    | {
        "size",
        "fps",
        "min_frames",
        "max_frames",
        "do_sample_frames",
        "cap_pixels_per_frame",
        "max_video_tokens",
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """The settings by which an image becomes patches.

    `min_pixels` and `max_pixels` bound height * width after the resize. Mean and deviation are per
    channel on the scale 0..1.
    """

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]

    @property
    def factor(self) -> int:
        """Return the pixels that an image token spans along each side."""
        return self.patch_size * self.merge_size

    @property
    def is_normalised_by_model(self) -> bool:
        """Return whether mean and deviation are the published 0.5, which the model applies."""
        return set(self.image_mean) == set(self.image_std) == {0.5}

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path) -> "ImageSettings":
        """Read `processor_config.json` (nested "image_processor") or `preprocessor_config.json`.

        Raises InputError for a missing file or key and for any setting that is not implemented.

        Source: transformers models/qwen2_vl/image_processing_qwen2_vl.py.
        """
        values, place = _read(
            pathlib.Path(folder), "image_processor", ["preprocessor_config.json"], known=_IMAGE
        )
        # Older files have the two limits outside of `size`; if both forms are present, these
        # limits win, as in transformers.
        size = _size(values, place)
        for old, new in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if values.get(old) is not None:
                size[new] = values[old]
        return cls(**_geometry(values, place), **_limits(size, place), **_colour(values, place))


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoSettings(ImageSettings):
    """The settings by which a video becomes patches.

    Here `min_pixels` and `max_pixels` bound frames * height * width after the resize.
    `frames_per_second` is the rate to sample at; `max_frame_tokens` limits a frame's tokens, as
    in Qwen's preprocessing; with None only the bound on the whole video holds.
    """

    frames_per_second: float
    min_frames: int
    max_frames: int
    max_frame_tokens: int | None

    @classmethod
    def from_folder(cls, folder: str | pathlib.Path) -> "VideoSettings":
        """Read `processor_config.json` (nested "video_processor") or the file for videos.

        That file is `video_preprocessor_config.json`. Missing sampling settings have the defaults
        of its class: 2 frames per second, 4 to 768 frames, no limit per frame.

        Source: transformers models/qwen3_vl/video_processing_qwen3_vl.py.
        """
        values, place = _read(
            pathlib.Path(folder),
            "video_processor",
            ["video_preprocessor_config.json"],
            known=_VIDEO,
        )
        if values.get("do_sample_frames") is False:
            raise errors.InputError(f"{place}: do_sample_frames must be true, got false")
        cap = _number(values, "max_video_tokens", place, default=768)
        return cls(
            **_geometry(values, place),
            **_limits(_size(values, place), place),
            **_colour(values, place),
            frames_per_second=_number(values, "fps", place, default=2, whole=False),
            min_frames=_number(values, "min_frames", place, default=4),
            max_frames=_number(values, "max_frames", place, default=768),
            max_frame_tokens=cap if values.get("cap_pixels_per_frame") else None,
        )


def has_video(folder: str | pathlib.Path) -> bool:
    """Return whether the folder has settings for videos."""
    folder = pathlib.Path(folder)
    nested = folder / "processor_config.json"
    return (folder / "video_preprocessor_config.json").is_file() or (
        nested.is_file() and "video_processor" in read_json(nested)
    )


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object; InputError names the file otherwise."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise errors.InputError(f"{path}: must be a readable JSON file: {error}") from error
    if not isinstance(value, dict):
        raise errors.InputError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def _read(
    folder: pathlib.Path, section: str, names: list[str], *, known: frozenset[str]
) -> tuple[Mapping[str, Any], str]:
    """Find the settings in the folder and refuse those that are not implemented."""
    nested = folder / "processor_config.json"
    values, place = None, ""
    if nested.is_file():
        # Files of transformers 4 with this name have no image settings.
        values, place = read_json(nested).get(section), f"{nested}: {section}"
    for name in names:
        if values is None and (folder / name).is_file():
            values, place = read_json(folder / name), str(folder / name)
    if values is None:
        wanted = " or ".join(['processor_config.json with "' + section + '"', *names])
        raise errors.InputError(f"{folder}: no {wanted}")
    if not isinstance(values, dict):
        raise errors.InputError(f"{place}: must be a JSON object, got {type(values).__name__}")
    for key, value in values.items():
        if key in _FIXED:
            if value is not None and value not in _FIXED[key]:
                allowed = " or ".join(json.dumps(item) for item in _FIXED[key])
                raise errors.InputError(f"{place}: {key} must be {allowed}, got {value!r}")
        elif key not in known and key not in _WITHOUT_EFFECT and value is not None:
            raise errors.InputError(f"{place}: setting {key} = {value!r} is not implemented")
    return values, place


def _number(
    values: Mapping[str, Any],
    key: str,
    place: str,
    *,
    default: int | None = None,
    whole: bool = True,
) -> Any:
    """Return a positive number, the default for None."""
    value = values.get(key)
    if value is None:
        value = default
    kinds = int if whole else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < math.inf:
        kind = "whole number" if whole else "number"
        raise errors.InputError(f"{place}: {key} must be a positive {kind}, got {value!r}")
    return value


def _geometry(values: Mapping[str, Any], place: str) -> dict[str, int]:
    return {key: _number(values, key, place) for key in sorted(_GEOMETRY)}


def _size(values: Mapping[str, Any], place: str) -> dict[str, Any]:
    size = values.get("size")
    if size is not None and not isinstance(size, dict):
        raise errors.InputError(f"{place}: size must be a JSON object, got {size!r}")
    return dict(size or {})


def _limits(size: Mapping[str, Any], place: str) -> dict[str, int]:
    extra = [key for key in size if key not in ("shortest_edge", "longest_edge")]
    if any(size[key] is not None for key in extra):
        raise errors.InputError(
            f"{place}: size must hold shortest_edge and longest_edge (areas in pixels), got {size}"
        )
    limits = {
        "min_pixels": _number(size, "shortest_edge", f"{place}: size"),
        "max_pixels": _number(size, "longest_edge", f"{place}: size"),
    }
    if limits["min_pixels"] > limits["max_pixels"]:
        raise errors.InputError(f"{place}: size: shortest_edge must be <= longest_edge, got {size}")
    return limits


def _colour(values: Mapping[str, Any], place: str) -> dict[str, tuple[float, ...]]:
    scale = values.get("rescale_factor")
    is_number = isinstance(scale, (int, float))
    if scale is not None and not (is_number and math.isclose(scale, 1 / 255, rel_tol=1e-6)):
        raise errors.InputError(f"{place}: rescale_factor must be 1/255, got {scale!r}")
    colour = {}
    for key in ("image_mean", "image_std"):
        value = values.get(key)
        if (
            not isinstance(value, list)
            or len(value) != 3
            or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in value)
            or (key == "image_std" and min(value) <= 0)
        ):
            rule = "three positive numbers" if key == "image_std" else "three numbers"
            raise errors.InputError(f"{place}: {key} must be {rule}, got {value!r}")
        colour[key] = tuple(float(v) for v in value)
    return colour
