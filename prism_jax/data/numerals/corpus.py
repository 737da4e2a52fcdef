"""The embedded corpus `numerals`: pictures that are slightly hard to read, and questions on them.

`write` writes the corpus to a folder in the published formats, `sample_texts` returns texts to
train a tokenizer on, `preview` draws examples. docs/numerals.md describes it.
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Iterator

from PIL import Image, ImageDraw, ImageFont

from prism_jax import errors
from prism_jax.data import prompts
from prism_jax.data.numerals import examples as numerals_examples
from prism_jax.data.numerals import files as numerals_files
from prism_jax.data.numerals import rows as numerals_rows

# To be raised with each change that gives another corpus for the same arguments.
VERSION = 2
_PARQUET_PATHS = {
    "align": "align/train.parquet",
    "rl_train": "rl/train.parquet",
    "rl_test": "rl/test.parquet",
}


def rows_of(level: str, overrides: dict[str, int]) -> numerals_examples.Rows:
    """Return the level's row counts with some replaced; InputError on a bad name or count."""
    rows = numerals_examples.level_named(level).rows
    for name, count in overrides.items():
        if name not in numerals_examples.STREAMS:
            known = ", ".join(numerals_examples.STREAMS)
            raise errors.InputError(f"numerals rows must name one of {known}, got {name!r}")
        if count < 0:
            raise errors.InputError(f"numerals rows of {name} must be >= 0, got {count}")
    return dataclasses.replace(rows, **overrides)


def slips_of(level: str, overrides: dict[str, float]) -> numerals_examples.Slips:
    """Return the level's slip rates with some replaced; InputError on a bad name or rate."""
    slips = numerals_examples.level_named(level).slips
    for name, rate in overrides.items():
        if name not in ("perception", "arithmetic", "habit"):
            raise errors.InputError(
                f"numerals slips must name perception, arithmetic or habit, got {name!r}"
            )
        if not 0 <= rate <= 1:
            raise errors.InputError(f"numerals slip rate {name} must be in [0, 1], got {rate}")
    return dataclasses.replace(slips, **overrides)


def stream(*, level: str, seed: int, name: str, rows: int) -> Iterator[numerals_examples.Example]:
    """Yield the first `rows` examples of a part of the corpus."""
    examples_level = numerals_examples.level_named(level)
    for index in range(rows):
        yield numerals_examples.example(level=examples_level, seed=seed, stream=name, index=index)


def write(
    out: str | pathlib.Path,
    *,
    level: str,
    seed: int,
    rows: numerals_examples.Rows,
    slips: numerals_examples.Slips,
    num_processes: int,
) -> dict:
    """Write the corpus into `out` and return its manifest; the same arguments give the same bytes.

    The folder appears when it is complete: an interrupted run leaves only `<out>.partial`, which
    the next run replaces. A folder that was written with the same arguments is checked and left as
    it is; a folder with other content raises InputError. Parts of 0 rows are left out.
    """
    out = pathlib.Path(out)
    if seed < 0:
        raise errors.InputError(f"numerals seed must be >= 0, got {seed}")
    numerals_examples.level_named(level)
    arguments = {
        "corpus": numerals_rows.DATA_SOURCE,
        "version": VERSION,
        "level": level,
        "seed": seed,
        "rows": dataclasses.asdict(rows),
        "slips": dataclasses.asdict(slips),
    }
    if out.exists() and any(out.iterdir()):
        return _check_written(out, arguments)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    parts, info = {}, {}
    with numerals_rows.drawing(sum(arguments["rows"].values()), num_processes) as draw:
        for name, count in arguments["rows"].items():
            if count == 0:
                continue
            part = numerals_rows.Part(
                level=level, seed=seed, stream=name, num_rows=count, slips=slips
            )
            if name in numerals_rows.SFT_STREAMS:
                parts[name] = numerals_files.write_sharegpt(
                    partial / "sft", draw(part), stream=name
                )
                entry = numerals_files.DATASET_ENTRIES[name]
                info[f"numerals_{name}"] = {"file_name": f"{name}.json", **entry}
            else:
                parts[name] = numerals_files.write_parquet(
                    partial / _PARQUET_PATHS[name], draw(part)
                )
    if info:
        _write_json(partial / "sft" / "dataset_info.json", info)
    manifest = {**arguments, "parts": parts, "files": _checksums(partial)}
    _write_json(partial / "manifest.json", manifest)
    if out.exists():
        out.rmdir()
    partial.rename(out)
    return manifest


def _checksums(folder: pathlib.Path) -> dict[str, str]:
    """Return SHA-256 by path of all files but the pictures, which have a sum in their part."""
    return {
        path.relative_to(folder).as_posix(): numerals_files.file_sha256(path)
        for path in sorted([*folder.rglob("*.json"), *folder.rglob("*.parquet")])
        if path != folder / "manifest.json"
    }


def _check_written(out: pathlib.Path, arguments: dict) -> dict:
    path = out / "manifest.json"
    if not path.exists():
        raise errors.InputError(f"{out} must be empty or hold a numerals corpus, no {path} there")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise errors.InputError(f"{path} must be JSON: {error}") from error
    for name, value in arguments.items():
        if manifest.get(name) != value:
            raise errors.InputError(
                f"{out} holds a numerals corpus with {name} {manifest.get(name)}, not"
                f" {value}: choose another folder or delete it"
            )
    if _checksums(out) != manifest["files"]:
        raise errors.InputError(f"{out} holds files that differ from {path}: delete the folder")
    for name in manifest["parts"]:
        pictures_sha256 = manifest["parts"][name].get("images_sha256")
        if pictures_sha256 not in (
            None,
            numerals_files.images_sha256(out / "sft" / "images" / name),
        ):
            raise errors.InputError(
                f"{out} holds pictures of {name} that differ from {path}: delete the folder"
            )
    return manifest


def _write_json(path: pathlib.Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def sample_texts(level: str, seed: int, n: int) -> list[str]:
    """Return n texts that cover the level's language, to train a tokenizer on.

    The system prompt comes first, then in turn a question, a teacher's, a public and a terse
    untagged response.
    """
    slips = slips_of(level, {})
    texts = [prompts.SYSTEM_PROMPT]
    for example in stream(level=level, seed=seed, name="base", rows=-(-n // 4)):
        texts += [
            prompts.user_turn(example.question.text),
            example.teacher.response,
            example.public(slips).response,
            example.untagged(is_detailed=False).response,
        ]
    return texts[:n]


def preview(
    level: str, *, seed: int, name: str, columns: int, rows: int, scale: int
) -> Image.Image:
    """Draw a contact sheet of a part: enlarged pictures, each with question and answer below."""
    font = ImageFont.load_default(size=12)
    cells = list(stream(level=level, seed=seed, name=name, rows=columns * rows))
    pictures = [example.picture() for example in cells]
    pictures = [
        picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
        for picture in pictures
    ]
    captions = [_wrapped(f"{e.question.text}\n-> {e.teacher.answer}") for e in cells]
    width = max(240, *(picture.width for picture in pictures)) + 12
    text_height = 15 * max(caption.count("\n") + 1 for caption in captions) + 10
    height = max(picture.height for picture in pictures) + text_height + 8
    sheet = Image.new("RGB", (width * columns, height * rows), (225, 225, 225))
    pen = ImageDraw.Draw(sheet)
    for place, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = place % columns * width + 6, place // columns * height + 6
        sheet.paste(picture, (x, y))
        pen.multiline_text((x, y + picture.height + 4), caption, fill=(0, 0, 0), font=font)
    return sheet


def _wrapped(text: str) -> str:
    """Break lines at the last blank before 38 characters."""
    lines = []
    for line in text.split("\n"):
        current = ""
        for word in line.split(" "):
            if current and len(current) + len(word) >= 38:
                lines.append(current)
                current = word
            else:
                current = f"{current} {word}".strip()
        lines.append(current)
    return "\n".join(lines)
