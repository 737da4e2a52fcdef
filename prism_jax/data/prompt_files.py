"""Write prompt rows as parquet in the published form, with pictures and videos as bytes.

`extra_info` is a struct, as the released readers require. A key whose values have no common type
(or are empty dicts) is written as JSON text.

Source: PRISM verl/examples/data_preprocess/geo3k.py:84-99 writes this form,
verl/verl/utils/dataset/rl_dataset.py:270-430 reads it.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prism_jax.data import clips, pictures, records

Json = Any
_GROUP_ROWS = 256

_TEXT = pa.string()
_TEACHER = tuple((name, _TEXT) for name in ("teacher_response", "teacher_caption", "teacher_cot"))


def write(
    path: pathlib.Path,
    rows: Iterable[records.PromptRow],
    *,
    infos: Sequence[Mapping[str, Json]],
    has_scales: bool,
    has_videos: bool,
) -> int:
    """Write validated rows atomically, a row group at a time; return their number.

    Args:
      infos: for each row the `extra_info` that replaces the row's.
      has_scales: some pictures set a size, so its fields are written.
      has_videos: some rows have videos, so their column is written.
    """
    types = {
        name: _type_of([info[name] for info in infos if name in info]) for name in _names(infos)
    }
    columns = _columns(has_scales=has_scales, has_videos=has_videos)
    if types:
        struct = pa.struct([(name, _TEXT if t is None else t) for name, t in types.items()])
        columns.append(("extra_info", struct))
    schema = pa.schema(columns)
    partial = path.with_name(path.name + ".partial")
    count = 0
    with pq.ParquetWriter(partial, schema, compression="snappy") as writer:
        pairs = zip(rows, infos, strict=True)
        while group := [
            _row(row, info, types) for row, info in itertools.islice(pairs, _GROUP_ROWS)
        ]:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            count += len(group)
    partial.replace(path)
    return count


def _columns(*, has_scales: bool, has_videos: bool) -> list[tuple[str, pa.DataType]]:
    scale = [(field.name, pa.int64()) for field in dataclasses.fields(records.Scale)]
    picture = pa.struct([("bytes", pa.binary()), *(scale if has_scales else [])])
    truth = [("style", _TEXT), ("ground_truth", _TEXT), ("equivalent_answers", pa.list_(_TEXT))]
    # A file is in `bytes`, a list of frames in `video`.
    rates = [("sample_fps", pa.float64()), ("fps", pa.float64())]
    frames = pa.list_(pa.struct([("bytes", pa.binary())]))
    video = pa.struct([("bytes", pa.binary()), ("video", frames), *rates])
    return [
        ("id", _TEXT),
        ("data_source", _TEXT),
        ("prompt", pa.list_(pa.struct([("role", _TEXT), ("content", _TEXT)]))),
        ("images", pa.list_(picture)),
        *([("videos", pa.list_(video))] if has_videos else []),
        ("reward_model", pa.struct(truth)),
        *_TEACHER,
    ]


def _names(infos: Sequence[Mapping[str, Json]]) -> list[str]:
    """Return the keys that have a value, in order of first appearance."""
    pairs = ((name, value) for info in infos for name, value in info.items())
    return list(dict.fromkeys(name for name, value in pairs if value is not None))


def _type_of(values: Sequence[Json]) -> pa.DataType | None:
    """Return the common type of the values, None if there is none that can be written."""
    try:
        common = pa.array(values).type
    except (pa.ArrowException, OverflowError):
        return None
    return common if _can_be_written(common) else None


def _can_be_written(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.num_fields > 0 and all(
            _can_be_written(kind.field(i).type) for i in range(kind.num_fields)
        )
    if pa.types.is_list(kind):
        return _can_be_written(kind.value_type)
    return not pa.types.is_null(kind)


def _row(
    row: records.PromptRow, info: Mapping[str, Json], types: Mapping[str, pa.DataType | None]
) -> dict[str, Json]:
    truth = {
        "style": "rule",
        "ground_truth": row.ground_truth,
        "equivalent_answers": list(row.equivalent_answers) or [records.NO_EQUIVALENT],
    }
    return {
        "id": row.id,
        "data_source": row.data_source,
        "prompt": [{"role": turn.role, "content": turn.content} for turn in row.prompt],
        "images": [
            {"bytes": image.data}
            | ({} if image.scale is None else pictures.scale_fields(image.scale))
            for image in row.images
        ],
        "videos": [_video(video) for video in row.videos],
        "reward_model": truth,
        "teacher_response": row.teacher_response,
        "teacher_caption": row.teacher_caption,
        "teacher_cot": row.teacher_cot,
        "extra_info": {
            name: _text(info[name]) if kind is None else info[name]
            for name, kind in types.items()
            if info.get(name) is not None
        },
    }


def _video(video: records.Video) -> dict[str, Json]:
    frames = [{"bytes": file.data} for file in video.files]
    source = {"video": frames} if video.is_list else frames[0]
    return source | clips.rate_fields(video)


def _text(value: Json) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
