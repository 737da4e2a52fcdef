"""A tiny run of supervised fine-tuning by its command, for tests: files, arguments, results."""

import json
import pathlib

import jax
import numpy as np

from prism_jax import main
from prism_jax.checkpoints import checkpoint
from prism_jax.checkpoints import files as checkpoint_files
from tests import data_files, make_tokenizer

# One layer each: compiling is what takes the time here.
SMALL = (
    "--config.model.sizes.num_layers=1",
    "--config.model.sizes.vision_num_layers=1",
    "--config.model.sizes.vision_deepstack_layers=(0,)",
    "--config.model.sizes.hidden_size=32",
    "--config.model.sizes.vision_hidden_size=32",
)

# Four rows of one demonstration, which one, two and four processes share out evenly.
ON_PROCESSES = (
    "--config.train.step_rows=4",
    "--config.train.num_rows=4",
    "--config.data.row_examples=1",
    "--config.optim.warmup_fraction=None",
    "--config.optim.warmup_steps=0",
    "--config.checkpoint.save_every_steps=2",
)


def write(folder: pathlib.Path, *, num_rows: int = 12) -> pathlib.Path:
    """Write a tokenizer to `tok/`, and demonstrations of unequal length to `train.json`.

    Every fourth shows no picture, the one before it a video.
    """
    make_tokenizer.write(folder / "tok", min_pixels=32 * 32, max_pixels=64 * 64)
    rows = []
    for i in range(num_rows):
        row = data_files.sft_row(i)
        row["messages"][1]["content"] += " more" * (i % 5)
        if i % 4 == 3:
            row["messages"][0]["content"] = "No picture?"
            row["images"] = []
        if i % 4 == 2:
            row["messages"][0]["content"] = "<video>\nWhat number?"
            row["videos"] = [[*row.pop("images"), "0.png"]]
        rows.append(row)
    data_files.write_images(folder, num_rows)
    (folder / "train.json").write_text(json.dumps(rows))
    return folder


def arguments(
    folder: pathlib.Path, workdir: pathlib.Path, *overrides: str, is_new: bool = True
) -> list[str]:
    """Return the arguments of a run on one device."""
    start = ("configs/sft.py:tiny,new", *SMALL) if is_new else ("configs/sft.py:tiny",)
    return [
        "sft",
        f"--config={start[0]}",
        *start[1:],
        f"--workdir={workdir}",
        f"--config.model.folder={folder / 'tok'}",
        f"--config.data.train={folder / 'train.json'}",
        "--config.mesh.num_devices=1",
        *overrides,
    ]


def run(folder: pathlib.Path, workdir: pathlib.Path, *overrides: str, is_new: bool = True) -> int:
    """Run the command in this process; return its exit code."""
    try:
        return main.main(arguments(folder, workdir, *overrides, is_new=is_new))
    except SystemExit as stop:
        return stop.code


def rows(workdir: pathlib.Path) -> list[dict]:
    """Return the rows of metrics.jsonl without times, which no two runs share."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith("time/")}
        for line in lines
    ]


def saved(workdir: pathlib.Path, item: str = "params") -> dict[str, np.ndarray]:
    """Return the arrays of the newest checkpoint by name."""
    with checkpoint_files.opened(workdir) as manager:
        step = max(manager.all_steps())
        meta = checkpoint_files.read_meta(manager, workdir, step)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = {
            name: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"], sharding=device)
            for name, leaf in meta["leaves"][item].items()
        }
        found = checkpoint_files.restore_leaves(manager, step, item, meta, wanted)
    return {name: np.asarray(leaf) for name, leaf in found.items()}


def checksums(workdir: pathlib.Path) -> dict:
    """Return the checksums of every array of the newest checkpoint, optimizer included."""
    return checkpoint.read_meta(str(workdir), step=None)["leaves"]
