"""The whole method: `python -m prism_jax pipeline --config=configs/pipeline.py:demo --workdir=…`.

    corpus → (base) → sft → upcycle → pairs → warmup → align → rlvr → evaluate → report

Each step is a command of this program with a separate folder below `--workdir`; the steps and their
commands are in `steps.py`. Killed at any moment and started again, the chain resumes where it
stopped. At the end there are `summary.json` and `report.html`. Run it from the folder that holds
`configs/`. configs/pipeline.py names sizes and hardware.
"""

import pathlib
import sys
from collections.abc import Mapping, Sequence

from prism_jax import configuration, errors
from prism_jax.checkpoints import lock
from prism_jax.commands.pipeline import run as pipeline_run
from prism_jax.commands.pipeline import steps as pipeline_steps
from prism_jax.report import results

_BEAT_SECONDS = 15.0
_PROGRAM = (sys.executable, "-m", "prism_jax")


def main(argv: Sequence[str]) -> None:
    """Run a chain to its end, or exit with the code of the step that failed."""
    config, workdir = configuration.read(argv, command="pipeline")
    options = configuration.parse(pipeline_steps.Config, config)
    _check_files(options)
    if "://" in workdir:
        raise errors.InputError(f"--workdir={workdir}: must be a local (or mounted) folder")
    folder = pathlib.Path(workdir)
    steps = pipeline_steps.plan(options)
    with lock.hold(workdir, beat_seconds=_BEAT_SECONDS):
        runner = pipeline_run.Runner(
            folder, program=_PROGRAM, num_steps=len(steps), stream=sys.stderr
        )
        runner.run(steps)
    sys.stderr.write(f"accuracy: {_line(results.read(folder).evaluations)}\n")
    print(folder / "report.html")


def _check_files(options: pipeline_steps.Config) -> None:
    """Check at the start the files that a later step would refuse."""
    base = options.base
    wanted = {
        "base.folder": pathlib.Path(base.folder) / "config.json" if base.folder else None,
        "base.tokenizer": pathlib.Path(base.tokenizer) / "tokenizer.json"
        if base.tokenizer
        else None,
    }
    for name, path in wanted.items():
        if path is not None and not path.is_file():
            raise errors.InputError(
                f"config.{name} = {path.parent}: there is no {path.name}; it must be a folder in "
                "the form of Hugging Face"
            )
    if not pathlib.Path("configs/sft.py").is_file():
        raise errors.InputError(
            "pipeline: the steps' configurations are read from configs/, which is not in "
            f"{pathlib.Path.cwd()}; run it from the repository's root"
        )


def _line(evaluations: Mapping[str, results.Evaluation | None]) -> str:
    """Return the accuracies of the stages in one line."""
    return ", ".join(
        f"{stage} {'not run' if one is None else one.accuracy}"
        for stage, one in evaluations.items()
    )
