"""The best step of a run, as `best.json` in its folder names it; `running.best` writes the file."""

from etils import epath

from prism_jax import errors, small_files

NAME = "best.json"
SCHEMA = {"step": int, "metric": str, "value": float, "evaluations": [[float]]}
BEST = "best"  # in place of the number of a step


def argument(text: str) -> int | str:
    """Return a step as a command line gives it: a number, or "best"."""
    return text if text == BEST else int(text)


def number_of(folder: epath.PathLike, step: int | str | None) -> int | None:
    """Return the number of a step of a run's folder, of "best" that of `best.json`.

    Raises:
      InputError: the run has not evaluated anything, or the file is damaged.
    """
    if step != BEST:
        return step
    known = small_files.read(epath.Path(folder) / NAME, SCHEMA)
    if known is None:
        raise errors.InputError(f"{folder} has no {NAME}: the run has no evaluation of steps")
    return known["step"]
