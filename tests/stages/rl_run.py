"""Tiny runs of warm-up, alignment and RLVR by their commands: files, arguments, results."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from configs import align as align_file
from models import sharding
from models.hf import checkpoint as hf_checkpoint
from prism_jax import configuration, main
from prism_jax.checkpoints import pretrained
from prism_jax.data import prompt_files, records, sources, tokenizer_files
from prism_jax.data.numerals import corpus as numerals_corpus
from prism_jax.data.numerals import demonstrations as numerals_demonstrations
from prism_jax.data.numerals import examples as numerals_examples
from prism_jax.data.numerals import pictures as numerals_pictures
from prism_jax.setup import fresh
from tests import data_files

# One narrow layer each: compiling is what takes the time here.
SMALL = {
    "num_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "vision_num_layers": 1,
    "vision_hidden_size": 32,
    "vision_intermediate_size": 64,
    "vision_deepstack_layers": (0,),
}


@contextlib.contextmanager
def compiled_once(folder: pathlib.Path) -> Iterator[None]:
    """Keep compiled programs on disk, so that a run that is started again compiles nothing."""
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def write(folder: pathlib.Path, *, has_videos: bool = False) -> pathlib.Path:
    """Write a tokenizer to `tok/`, prompts to `corpus/`, and 12 pairs to `pairs/`.

    With `has_videos` every other prompt and pair shows its picture as a video of two frames.
    """
    # Trained on the corpus, so that prompts are short.
    texts = numerals_corpus.sample_texts("tiny", 0, 200)
    pixels = {"min_pixels": 32 * 32, "max_pixels": 64 * 64}
    tokenizer_files.write(folder / "tok", texts, num_merges=600, **pixels)
    slips = numerals_corpus.slips_of("tiny", {})
    none = dict.fromkeys(numerals_examples.STREAMS, 0)
    rows = numerals_corpus.rows_of("tiny", none | {"align": 5, "rl_train": 5})
    numerals_corpus.write(
        folder / "corpus", level="tiny", seed=0, rows=rows, slips=slips, num_processes=1
    )
    (folder / "pairs").mkdir()
    lines = []
    for example in numerals_corpus.stream(level="tiny", seed=1, name="align", rows=12):
        name = f"{example.index}.png"
        (folder / "pairs" / name).write_bytes(numerals_pictures.png_bytes(example.picture()))
        pair = {"prompt": f"\n{example.question.text}\n", "image": name}
        texts = {"teacher": example.teacher.response, "student": example.public(slips).response}
        for side, text in texts.items():
            pair[f"{side}_caption"], pair[f"{side}_cot"] = numerals_demonstrations.split_segments(
                text
            )
        if has_videos and example.index % 2 == 0:
            pair["video"] = [pair.pop("image"), name]
        lines.append(json.dumps(pair))
    (folder / "pairs" / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    if has_videos:
        for part in ("align", "rl"):
            _show_videos(folder / "corpus" / part / "train.parquet")
    return folder


def write_teacher(folder: pathlib.Path) -> pathlib.Path:
    """Write an open teacher to `teacher/`: a new policy that is deeper than `SMALL`."""
    values = align_file.get_config("tiny,new").model.sizes.to_dict() | SMALL | {"num_layers": 2}
    with fresh.folder(folder / "tok", configuration.Sizes(**values)) as files:
        config_json, config = pretrained.config_of(files)
        build = pretrained.builder(
            config,
            is_discriminator=False,
            rules=sharding.REPLICATED,
            dtype=np.float32,
            param_dtype=np.float32,
        )
        hf_checkpoint.save(
            folder / "teacher",
            nnx.state(build(nnx.Rngs(5))),
            config_json,
            layout="4.57",
            max_shard_bytes=1 << 30,
            copy_from=files,
        )
    return folder / "teacher"


def _show_videos(path: pathlib.Path) -> None:
    """Turn the picture of every other prompt of a file into a video of two frames."""
    given, _ = data_files.read_all(sources.Source(kind="prompts", path=str(path)))
    for number, row in enumerate(given[::2]):
        video = records.Video(files=row.images * 2, is_list=True, frames_per_second=2.0)
        turns = tuple(
            dataclasses.replace(turn, content=turn.content.replace("<image>", "<video>"))
            for turn in row.prompt
        )
        given[2 * number] = dataclasses.replace(row, prompt=turns, images=(), videos=(video,))
    infos = [row.extra_info for row in given]
    prompt_files.write(path, given, infos=infos, has_scales=False, has_videos=True)


def sizes(prefix: str) -> list[str]:
    """Return the overrides that make a new model narrow."""
    return [f"--config.{prefix}.sizes.{name}={value}" for name, value in SMALL.items()]


def arguments(
    stage: str, folder: pathlib.Path, workdir: pathlib.Path, *overrides: str
) -> list[str]:
    """Return the arguments of a run of new models on one device."""
    own = {
        "warmup": [f"--config.data.train={folder / 'pairs' / 'pairs.jsonl'}"],
        "align": [
            f"--config.prompts.path={folder / 'corpus' / 'align' / 'train.parquet'}",
            f"--config.discriminator.folder={folder / 'tok'}",
            *sizes("discriminator"),
        ],
        "rlvr": [f"--config.prompts.path={folder / 'corpus' / 'rl' / 'train.parquet'}"],
    }
    return [
        stage,
        f"--config=configs/{stage}.py:tiny,new",
        f"--workdir={workdir}",
        f"--config.model.folder={folder / 'tok'}",
        *sizes("model"),
        "--config.mesh.num_devices=1",
        *own[stage],
        *overrides,
    ]


def run(stage: str, folder: pathlib.Path, workdir: pathlib.Path, *overrides: str) -> int:
    """Run the command in this process; return its exit code."""
    return run_arguments(arguments(stage, folder, workdir, *overrides))


def run_arguments(argv: list[str]) -> int:
    """Run a command in this process; return its exit code."""
    try:
        return main.main(argv)
    except SystemExit as stop:
        return stop.code


def rows(workdir: pathlib.Path) -> list[dict]:
    """Return the rows of metrics.jsonl without times, which no two runs share."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith("time/")}
        for line in lines
    ]
