"""Repositories of the Hugging Face hub in arguments, downloaded when they are named.

  hf://Qwen/Qwen3-VL-4B-Instruct                      a model
  hf://Qwen/Qwen3-VL-4B-Instruct@main                 a branch, tag or commit of it
  hf://datasets/prism-vlm/rl_dataset/train.parquet    a file or folder of a data set

Files of formats that execute code when they are opened are left out. `HF_ENDPOINT`, `HF_TOKEN`,
`HF_HOME` and `HF_HUB_OFFLINE` are huggingface_hub's.
"""

import os
import pathlib
import re
import sys
from collections.abc import Collection, Sequence

import huggingface_hub
from huggingface_hub import constants

from prism_jax import errors

# A value, or a text in a tuple of values.
_ADDRESS = re.compile(
    r"(?:(?<==)|(?<![\s\S])|(?<=['\"]))hf://(?P<datasets>datasets/)?(?P<owner>[\w.-]+)/(?P<name>[\w.-]+)"
    r"(?:@(?P<revision>[\w.-]+)(?![\w.:-]))?(?=$|[/#@'\"])"
)
# Pickles, and copies of the weights in formats that nothing here reads.
_LEFT_OUT = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.msgpack", "*.h5", "*.onnx")


def resolved(arguments: Sequence[str]) -> list[str]:
    """Return arguments with the folder of its download in place of each address.

    Raises:
      InputError: a repository cannot be downloaded, or an address is none.
    """
    made = []
    for argument in arguments:
        text = _ADDRESS.sub(_download, argument)
        if re.search(r"(^|=|['\"])hf://", text):
            raise errors.InputError(
                f"{argument}: an address must be hf://OWNER/NAME or hf://datasets/OWNER/NAME, with "
                "@REVISION and a path behind it if needed"
            )
        made.append(text)
    return made


def _download(address: re.Match) -> str:
    """Return the folder of a repository, brought up to date."""
    repository = f"{address['owner']}/{address['name']}"
    kind = "dataset" if address["datasets"] else "model"
    revision = address["revision"] or "main"
    if any(not part.strip(".") for part in (address["owner"], address["name"], revision)):
        raise errors.InputError(f"{address[0]}: a name must be more than dots")
    # Files, not the links of the hub's own cache: a row's pictures must lie in its folder.
    folder = os.path.join(
        constants.HF_HOME, "prism_jax", f"{kind}s", address["owner"], address["name"], revision
    )
    # Holds the commit of the folder's files.
    complete = pathlib.Path(f"{folder}.complete")
    if constants.HF_HUB_OFFLINE:
        if not complete.exists():
            raise errors.InputError(
                f"{address[0]}: HF_HUB_OFFLINE is set, and {folder} is not whole"
            )
        return folder
    hub = huggingface_hub.HfApi()
    try:
        # Without this, a hub that cannot be reached would leave whatever is in the folder.
        commit = hub.repo_info(repository, repo_type=kind, revision=revision).sha
        is_new = not complete.exists() or complete.read_text("utf-8").strip() != commit
        if is_new:
            # Until the end the folder may have files of two commits.
            complete.unlink(missing_ok=True)
        huggingface_hub.snapshot_download(
            repository,
            repo_type=kind,
            revision=commit,
            local_dir=folder,
            ignore_patterns=list(_LEFT_OUT),
        )
        if is_new:
            names = hub.list_repo_files(repository, repo_type=kind, revision=commit)
            _remove_others(pathlib.Path(folder), set(names))
    # The library raises its own errors, those of its client and of the operating system.
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        cause = lines[0] if lines else type(error).__name__
        raise errors.InputError(f"{address[0]}: cannot be downloaded: {cause}") from error
    complete.write_text(f"{commit}\n", encoding="utf-8")
    sys.stderr.write(f"{address[0]} is in {folder}\n")
    return folder


def _remove_others(folder: pathlib.Path, names: Collection[str]) -> None:
    """Remove files that the repository had in an earlier commit: a folder's rows are all read."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        # The library's own records of what it downloaded are in `.cache`.
        if path.is_file() and name not in names and not name.startswith(".cache/"):
            path.unlink(missing_ok=True)
