"""The small files of a model: `config.json`, tokenizer, chat template, image settings.

A Hugging Face folder and a converted folder have them beside the weights. A training run copies
them from the model it starts from, so that its checkpoints can be evaluated, continued and exported
alone:

    WORKDIR/checkpoints/N/…     the arrays
    WORKDIR/model/              files of the run's model (item `params` or `policy.params`)
    WORKDIR/discriminator/      files of the second model of a run that trains two
"""

import filecmp
import os
import pathlib
import shutil

from models import hf_files, hf_writer
from prism_jax import checkpoint_files, errors

FOLDER = "model"
DISCRIMINATOR_FOLDER = "discriminator"
NAMES = ("config.json", *hf_writer.COPIED)


def copy(from_folder: str | os.PathLike[str], to_folder: str | os.PathLike[str]) -> None:
    """Copy a model's small files; `to_folder` appears when it is complete.

    A folder that is there already is compared and kept, so a resumed run may call this again; only
    one process of a job may.

    Args:
      from_folder: a Hugging Face folder, a converted one, or a run's folder (its `model/` is read).

    Raises:
      InputError: a file is missing or leads out of its folder, or the files that are there differ.
    """
    source, target = of(from_folder), pathlib.Path(to_folder)
    found = _find(source)
    if target.exists():
        _compare(found, target, source)
        return
    partial = target.absolute().parent / f".{target.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name, path in found.items():
            shutil.copyfile(path, partial / name)
            _sync(partial / name)
        _sync(partial)
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def of(folder: str | os.PathLike[str], *, is_discriminator: bool = False) -> pathlib.Path:
    """Return where a model folder keeps its small files.

    Args:
      is_discriminator: of a run that trains two models, the second; other folders have one.
    """
    folder = pathlib.Path(folder)
    if not is_run(folder):
        return folder
    second = folder / DISCRIMINATOR_FOLDER
    return second if is_discriminator and second.is_dir() else folder / FOLDER


def is_run(folder: str | os.PathLike[str]) -> bool:
    """Tell whether a folder is one that a training run writes its checkpoints to."""
    return (pathlib.Path(folder) / checkpoint_files.FOLDER).is_dir()


def _find(source: pathlib.Path) -> dict[str, pathlib.Path]:
    """Return the files that are there by name; `config.json` must be."""
    if not source.is_dir():
        raise errors.InputError(f"{source}: no such folder")
    names = [name for name in NAMES if name == "config.json" or (source / name).exists()]
    try:
        return {name: hf_files.inside(source, name) for name in names}
    except ValueError as error:
        raise errors.InputError(str(error)) from error


def _compare(found: dict[str, pathlib.Path], target: pathlib.Path, source: pathlib.Path) -> None:
    there = {name for name in NAMES if (target / name).exists()}
    differing = there ^ set(found)
    differing |= {
        name for name in there & set(found) if not filecmp.cmp(found[name], target / name, False)
    }
    if differing:
        raise errors.InputError(
            f"{target} holds files of another model than {source}: {', '.join(sorted(differing))}; "
            "use another workdir"
        )


def _sync(path: pathlib.Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
