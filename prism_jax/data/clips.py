"""The videos of a row: in a column, or in a part of a turn's content.

  "a.mp4", bytes, {"bytes": …, "path": …}                      a file
  ["0.png", "1.png", …]                                        a picture for each frame
  {"video": any of these, "sample_fps": 2.0}, {…, "fps": 1.0}  with a rate

`sample_fps` is the rate of a list, whose frames are used as they are. `fps` is a rate to sample at:
for a file instead of the checkpoint's, for a list instead of all frames.

Source: qwen-vl-utils vision_process.py fetch_video; LLaMA-Factory mm_plugin.py _regularize_videos.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from prism_jax.data import fields, pictures, records

KEYS = ("video", "url", "bytes", "path", "sample_fps", "fps")
# The rate of a list that gives none, as in both sources.
_LIST_FRAMES_PER_SECOND = 2.0
_LEAST_RATE, _MOST_RATE = 0.001, 1000.0
# A video for each mark of the turns; None if the turns do not name it.
Named = Sequence[records.Video | None]


def of_row(
    row: Mapping[str, Any], column: str = "videos", *, also: str | None = "video"
) -> tuple[records.Video, ...]:
    """Return the videos of `column`, or the one of the column `also`.

    A list in `column` is one of videos, a list in `also` one of frames.
    """
    names = dict.fromkeys((column, also) if also else (column,))
    given = [name for name in names if not fields.is_empty(row.get(name))]
    if len(given) > 1:
        raise records.RowError("bad_type", f"a row has {column!r} or {also!r}, not both")
    if not given:
        return ()
    name = given[0]
    if name != column:
        return (read(row[name], name),)
    values = row[name] if isinstance(row[name], list) else [row[name]]
    return tuple(read(value, f"{name}[{i}]") for i, value in enumerate(values))


def read(value: Any, name: str) -> records.Video:
    """Return the video that a value refers to, without opening it."""
    if isinstance(value, list):
        if not value:
            raise records.RowError("bad_type", f"{name} has no frames")
        return records.Video(
            files=tuple(_frame(frame, f"{name}[{i}]") for i, frame in enumerate(value)),
            is_list=True,
            frames_per_second=_LIST_FRAMES_PER_SECOND,
        )
    if not isinstance(value, Mapping):
        return records.Video(files=(pictures.read(value, name),), is_list=False)
    fields.only(value, ("type", *KEYS), name)
    kind = value.get("type")
    if not fields.is_blank(kind) and kind != "video":
        raise records.RowError("bad_type", f"{name}.type must be video, got {fields.show(kind)}")
    video = _source(value, name)
    rates = {
        key: _rate(value[key], f"{name}.{key}")
        for key in ("sample_fps", "fps")
        if not fields.is_blank(value.get(key))
    }
    if "sample_fps" in rates and not video.is_list:
        raise records.RowError(
            "unsupported", f"{name}.sample_fps is the rate of a list of frames; a file has its own"
        )
    return dataclasses.replace(
        video,
        frames_per_second=rates.get("sample_fps", video.frames_per_second),
        sampled_per_second=rates.get("fps", video.sampled_per_second),
    )


def _source(value: Mapping[str, Any], name: str) -> records.Video:
    given = [key for key in ("video", "url") if not fields.is_blank(value.get(key))]
    stored = {key: value[key] for key in ("bytes", "path") if not fields.is_blank(value.get(key))}
    if len(given) + bool(stored) != 1:
        raise records.RowError(
            "bad_type",
            f"{name} must have one of video, url and bytes or path, got {fields.show(dict(value))}",
        )
    if stored:
        return records.Video(files=(pictures.read(stored, name),), is_list=False)
    return read(value[given[0]], f"{name}.{given[0]}")


def _frame(value: Any, name: str) -> records.Image:
    frame = pictures.read(value, name)
    if frame.scale is not None:
        raise records.RowError("unsupported", f"{name}: a frame cannot set a size")
    return frame


def _rate(value: Any, name: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not _LEAST_RATE <= value <= _MOST_RATE:
        raise records.RowError(
            "bad_type",
            f"{name} must be a number of frames per second from {_LEAST_RATE} to {_MOST_RATE}, got "
            f"{fields.show(value)}",
        )
    return float(value)


def rate_fields(video: records.Video) -> dict[str, float]:
    """Return the rates that a row sets for a video as the fields of its dict."""
    rates = {} if video.sampled_per_second is None else {"fps": video.sampled_per_second}
    if video.is_list and video.frames_per_second != _LIST_FRAMES_PER_SECOND:
        rates["sample_fps"] = video.frames_per_second
    return rates


def of_marks(named: Named, column: tuple[records.Video, ...]) -> tuple[records.Video, ...]:
    """Return the videos of a row's marks, from the turns that name them or from its column.

    Raises:
      RowError: turns and column name different videos, or a mark has none. If the turns name no
        videos, `validate.check_row` checks the number of the column's.
    """
    if all(video is None for video in named):
        return column
    if None in named:
        raise records.RowError(
            "placeholders", f"video {list(named).index(None) + 1} of the turns has no name"
        )
    videos = tuple(video for video in named if video is not None)
    if column and column != videos:
        raise records.RowError(
            "image_mismatch", f"the turns name {len(videos)} videos, the column others"
        )
    return videos
