"""Small right rows of the three kinds in the published formats, and the files that hold them."""

import io
import json
import pathlib

import av
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from prism_jax.data import sources, validate


def png(shade: int = 200, size: tuple[int, int] = (40, 30)) -> bytes:
    """Return a grey PNG; size is (width, height)."""
    return encoded(Image.new("RGB", size, (shade, shade, shade)), "PNG")


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
    """Return an image file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def video(kind: str, *, num_frames: int, frames_per_second: int | None) -> bytes:
    """Return a video of 64 x 48 pixels whose frames are ever brighter, by 30 from 20 on.

    `kind` is Pillow's name of a format, or PyAV's of a container; None: GIF frames without a time.
    """
    shades = [20 + 30 * i % 230 for i in range(num_frames)]
    frames = [Image.new("RGB", (64, 48), (shade, shade, shade)) for shade in shades]
    if kind in ("GIF", "WEBP", "PNG"):
        duration = 0 if frames_per_second is None else 1000 // frames_per_second
        options = {"save_all": True, "append_images": frames[1:], "duration": duration}
        return encoded(frames[0], kind, **options)
    codecs = {"mp4": "libx264", "matroska": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4"}
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codecs[kind], rate=frames_per_second)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return buffer.getvalue()


def sft_row(i: int, **changes) -> dict:
    """Return a demonstration about picture `i.png`."""
    response = f"<caption>grey {i}</caption><think>t</think><answer>{i}</answer>"
    row = {
        "id": f"row-{i}",
        "messages": [
            {"role": "user", "content": f"<image>\nWhat number, é {i}?"},
            {"role": "assistant", "content": response},
        ],
        "images": [f"{i}.png"],
    }
    return row | changes


def pair_row(i: int, **changes) -> dict:
    """Return a pair with its four segments."""
    row = {
        "prompt": f"What number {i}?",
        "image": f"{i}.png",
        "teacher_caption": f"<caption>teacher {i}</caption>",
        "student_caption": f"<caption>student {i}</caption>",
        "teacher_cot": f"<think>teacher</think><answer>{i}</answer>",
        "student_cot": f"<think>student</think><answer>{i}</answer>",
    }
    return row | changes


def prompt_row(i: int, **changes) -> dict:
    """Return an RL row as the parquet holds it."""
    row = {
        "prompt": [
            {"role": "system", "content": "Answer."},
            {"role": "user", "content": f"<image>\nWhat number {i}?\n"},
        ],
        "images": [{"bytes": png(i % 256), "path": None}],
        "teacher_response": f"response {i}",
        "teacher_caption": f"caption {i}",
        "teacher_cot": f"cot {i}",
        "data_source": "mm_gad",
        "reward_model": {
            "style": "rule",
            "ground_truth": str(i),
            "equivalent_answers": [f"{i}.0"],
        },
        "extra_info": {"index": i, "split": "train"},
    }
    return row | changes


def write_images(folder: pathlib.Path, num_images: int) -> None:
    """Write `0.png`, `1.png`, …"""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num_images):
        (folder / f"{i}.png").write_bytes(png(i))


def write_lines(path: pathlib.Path, rows: list) -> pathlib.Path:
    """Write JSON lines; bytes are written as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def write_parquet(path: pathlib.Path, rows: list[dict], *, group_rows: int) -> pathlib.Path:
    """Write a parquet file with row groups of the given size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group_rows)
    return path


def read_all(source: sources.Source, **rules) -> tuple[list, validate.Report]:
    """Return every right row of a source and the report."""
    opened = sources.open_source(source, validate.Rules(**rules), cache_dir=None)
    return [opened.rows[i] for i in range(len(opened.rows))], opened.report
