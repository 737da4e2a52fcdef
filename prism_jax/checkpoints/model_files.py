"""The small files of a model: `config.json`, tokenizer, chat template, image settings.

A Hugging Face folder and a converted folder have them beside the weights. A training run copies
them from the model it starts from, so that its checkpoints can be evaluated, continued and exported
alone:

    WORKDIR/checkpoints/N/…     the arrays
    WORKDIR/model/              files of the run's model (item `params` or `policy.params`)
    WORKDIR/discriminator/      files of the second model of a run that trains two
"""

import hashlib
import os
import pathlib
import shutil
import tempfile

from etils import epath

from models.hf import files as hf_files
from models.hf import writer as hf_writer
from prism_jax import errors, small_files
from prism_jax.checkpoints import files as checkpoint_files

FOLDER = "model"
DISCRIMINATOR_FOLDER = "discriminator"
NAMES = ("config.json", *hf_writer.COPIED)


def copy(from_folder: str | os.PathLike[str], to_folder: str | os.PathLike[str]) -> None:
    """Copy a model's small files; `to_folder` appears when it is complete.

    A folder that is there already is compared and kept, so a resumed run may call this again; only
    one process of a job may. On gs:// files appear one by one, `config.json` last.

    Args:
      from_folder: a Hugging Face folder, a converted one, or a run's folder (its `model/` is read).

    Raises:
      InputError: a file is missing or leads out of its folder, or the files that are there differ.
    """
    source, target = of(from_folder), epath.Path(to_folder)
    found = _read(source)
    if (target / "config.json").exists():
        _compare(found, target, source)
    elif checkpoint_files.is_local(target):
        _write(found, pathlib.Path(target))
    else:
        target.mkdir(parents=True, exist_ok=True)
        for name in reversed(found):
            (target / name).write_bytes(found[name])


def of(folder: str | os.PathLike[str], *, is_discriminator: bool = False) -> pathlib.Path:
    """Return where a model folder keeps its small files; those of a run on gs:// are fetched.

    Args:
      is_discriminator: of a run that trains two models, the second; other folders have one.

    Raises:
      InputError: the folder holds an adapter.
    """
    if not is_run(folder):
        try:
            hf_files.refuse_adapter(pathlib.Path(folder))
        except ValueError as error:
            raise errors.InputError(str(error)) from error
        return pathlib.Path(folder)
    run = epath.Path(folder)
    second = run / DISCRIMINATOR_FOLDER
    chosen = second if is_discriminator and second.is_dir() else run / FOLDER
    return pathlib.Path(chosen) if checkpoint_files.is_local(chosen) else _fetch(chosen)


def is_run(folder: str | os.PathLike[str]) -> bool:
    """Tell whether a folder is one that a training run writes its checkpoints to."""
    return (epath.Path(folder) / checkpoint_files.FOLDER).is_dir()


def _read(source: pathlib.Path) -> dict[str, bytes]:
    """Return the files that are there, `config.json` first: it must be."""
    if not source.is_dir():
        raise errors.InputError(f"{source}: no such folder")
    names = [name for name in NAMES if name == "config.json" or (source / name).exists()]
    try:
        return {name: hf_files.inside(source, name).read_bytes() for name in names}
    except ValueError as error:
        raise errors.InputError(str(error)) from error


def _compare(found: dict[str, bytes], target: epath.Path, source: pathlib.Path) -> None:
    there = {name: (target / name).read_bytes() for name in NAMES if (target / name).exists()}
    differing = [name for name in NAMES if there.get(name) != found.get(name)]
    if differing:
        raise errors.InputError(
            f"{target} holds files of another model than {source}: {', '.join(differing)}; "
            "use another workdir"
        )


def _write(found: dict[str, bytes], target: pathlib.Path) -> None:
    partial = target.absolute().parent / f".{target.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name, content in found.items():
            (partial / name).write_bytes(content)
        small_files.rename_folder(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _fetch(remote: epath.Path) -> pathlib.Path:
    """Copy a remote folder's files into a temporary folder that is named by their content."""
    found = {name: (remote / name).read_bytes() for name in NAMES if (remote / name).exists()}
    if not found:
        raise errors.InputError(f"{remote}: no such folder")
    digest = hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:16]
    local = pathlib.Path(tempfile.gettempdir()) / f"prism_jax-{os.getuid()}-{digest}"
    if not local.exists():
        _write(found, local)
    return local
