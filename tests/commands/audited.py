"""A small data set with one row of each problem, and the test set that it leaks from."""

import pathlib

import numpy as np
from PIL import Image

from prism_jax import main
from tests import data_files

# The question of a row ends up on the page.
HOSTILE = "<script>alert(1)</script> & \x00 what?"


def picture(seed: int, *, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """Return a picture of soft blots that no other seed resembles."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def png(seed: int, **options) -> bytes:
    """Return such a picture as PNG."""
    return data_files.encoded(picture(seed), "PNG", **options)


def row(name: str, seed: int, question: str, answer: str = "5", **changes) -> dict:
    """Return a prompt with a complete teacher's response."""
    told = f"<think>So.</think><answer>{answer}</answer>"
    return {
        "id": name,
        "prompt": f"<image>{question}",
        "images": [{"bytes": png(seed)}],
        "answer": answer,
        "teacher_caption": "<caption>Blots.</caption>",
        "teacher_cot": told,
        "teacher_response": f"<caption>Blots.</caption>{told}",
    } | changes


def write(folder: pathlib.Path) -> None:
    """Write `mine.parquet` and `test.parquet`."""
    jpeg = [{"bytes": data_files.encoded(picture(20), "JPEG", quality=90)}]
    again = [{"bytes": png(1, compress_level=0)}]
    mine = [
        row("clean", 1, "How many blots?"),
        row("repeat", 1, "HOW many blots ?", "6", images=again),
        row("hostile", 2, HOSTILE),
        row("unearned", 3, "Which two?", '["a", "b"]'),
        row("tag", 4, "Which tag?", "</answer>"),
        row("open", 5, "Is it cut?", teacher_cot="<think>It is"),
        row("middle", 6, "And this?", teacher_cot="The answer is the"),
        row("wrong", 7, "Is it right?", teacher_response="<answer>8</answer>", teacher_cot=None,
            teacher_caption=None),
        row("broken", 8, "No picture", images=[{"bytes": b"no picture"}]),
        row("leak", 21, "Which colour?"),
        row("encoded", 20, "Which blot?", images=jpeg),
        row("picture", 22, "Another question?"),
        row("text", 9, "Only the question is the same."),
    ]  # fmt: skip
    test = [
        row("t20", 20, "which blot"),
        row("t21", 21, "Which colour?"),
        row("t22", 22, "What is there?"),
        row("t23", 23, "Only the question is the same!"),
    ]
    data_files.write_parquet(folder / "mine.parquet", mine, group_rows=4)
    data_files.write_parquet(folder / "test.parquet", test, group_rows=4)


def run(folder: pathlib.Path, *arguments: str) -> int:
    """Audit them to `audit.html`; return the exit code."""
    given = [f"--data={folder / 'mine.parquet'}", "--kind=prompts"]
    given += [f"--against={folder / 'test.parquet'}", f"--out={folder / 'audit.html'}"]
    return main.main(["audit", *given, "--title=Blots & more", *arguments])
