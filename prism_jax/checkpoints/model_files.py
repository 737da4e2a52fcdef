"""The small files of a model: `config.json`, tokenizer, chat template, image settings.

A Hugging Face folder and a converted folder hold them beside the weights. A training run copies
them from its initial model, so that its checkpoints can be evaluated, continued and exported
without that folder:

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

    An existing folder is compared and kept, so that a resumed run may call this again; only one
    process of a job may. On gs:// files appear one by one, `config.json` last.

    Args:
      from_folder: a Hugging Face folder, a converted one, or a run's folder (its `model/` is read).

    Raises:
      InputError: a file is missing or leads out of its folder, or the existing files differ.
    """
    source, target = of(from_folder), epath.Path(to_folder)
    contents = _read(source)
    if (target / "config.json").exists():
        _compare(contents, target, source)
    elif checkpoint_files.is_local(target):
        _write(contents, pathlib.Path(target))
    else:
        target.mkdir(parents=True, exist_ok=True)
        for name in reversed(contents):
            (target / name).write_bytes(contents[name])


def of(folder: str | os.PathLike[str], *, is_discriminator: bool = False) -> pathlib.Path:
    """Return the folder of a model's small files; fetch those of a run on gs://.

    Args:
      is_discriminator: the second model of a run that trains two; other folders have one.

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
    path = second if is_discriminator and second.is_dir() else run / FOLDER
    return pathlib.Path(path) if checkpoint_files.is_local(path) else _fetch(path)


def is_run(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder is the workdir of a training run."""
    return (epath.Path(folder) / checkpoint_files.FOLDER).is_dir()


def _read(source: pathlib.Path) -> dict[str, bytes]:
    """Return the existing files; `config.json` comes first and must exist."""
    if not source.is_dir():
        raise errors.InputError(f"{source}: no such folder")
    names = [name for name in NAMES if name == "config.json" or (source / name).exists()]
    try:
        return {name: hf_files.inside(source, name).read_bytes() for name in names}
    except ValueError as error:
        raise errors.InputError(str(error)) from error


def _compare(contents: dict[str, bytes], target: epath.Path, source: pathlib.Path) -> None:
    there = {name: (target / name).read_bytes() for name in NAMES if (target / name).exists()}
    differing = [name for name in NAMES if there.get(name) != contents.get(name)]
    if differing:
        raise errors.InputError(
            f"{target} holds files of another model than {source}: {', '.join(differing)}; "
            "use another workdir"
        )


def _write(contents: dict[str, bytes], target: pathlib.Path) -> None:
    partial = target.absolute().parent / f".{target.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name, content in contents.items():
            (partial / name).write_bytes(content)
        small_files.rename_folder(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _fetch(remote: epath.Path) -> pathlib.Path:
    """Copy a remote folder's files into a temporary folder named by their content."""
    contents = {name: (remote / name).read_bytes() for name in NAMES if (remote / name).exists()}
    if not contents:
        raise errors.InputError(f"{remote}: no such folder")
    digest = hashlib.sha256(repr(sorted(contents.items())).encode()).hexdigest()[:16]
    local = pathlib.Path(tempfile.gettempdir()) / f"prism_jax-{os.getuid()}-{digest}"
    if not local.exists():
        _write(contents, local)
    return local
