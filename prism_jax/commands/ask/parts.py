"""Sample responses to many prompts in parts, so that a killed job resumes.

The prompts are cut into batches of one size, the last filled up with copies. The records of a batch
are written to disk, whole or not at all, under its number. A resumed job reads the existing parts
and samples the others. The random key of a batch follows from the seed and the batch number, so the
records equal those of an uninterrupted job.
"""

import dataclasses
import hashlib
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax

from models import inputs
from prism_jax import errors, progress, small_files
from prism_jax.checkpoints import lock, mirror
from prism_jax.checkpoints import meta as checkpoint_meta
from prism_jax.data import encode, processor, records
from prism_jax.rollout import engine
from prism_jax.rollout import sampling as sampling_lib
from prism_jax.running import metric_writers
from prism_jax.setup import agreement
from prism_jax.setup import prompts as prompts_lib

Json = Any
_PARTS = "parts"
_IDENTITY = "run.json"
_SUMMARY = "summary.json"


class Sampler(Protocol):
    """A function that samples responses to prompts; see `rollout.engine.Engine.generate`."""

    def __call__(
        self,
        prompts: Sequence[inputs.Example],
        sampling: sampling_lib.Sampling,
        key: jax.Array,
        *,
        num_responses: int,
        shapes: engine.Shapes,
    ) -> engine.Rollout: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass over the prompts: how many responses each gets, and how they are sampled."""

    name: str  # of its folder; the random keys depend on it
    sampling: sampling_lib.Sampling
    num_responses: int
    batch_prompts: int


# The rows of a batch and the responses to them -> one JSON object a record.
Describe = Callable[[Sequence[records.PromptRow], engine.Rollout], Sequence[Mapping[str, Json]]]


def _shapes(sizes: Sequence[encode.Size]) -> engine.Shapes:
    """Return the shapes into which every prompt fits, so that a pass compiles prefill once."""
    return engine.Shapes(
        prompt_tokens=max(size.tokens for size in sizes),
        prompt_patches=max(1, *(size.patches for size in sizes)),
        prompt_images=max(1, *(size.images for size in sizes)),
    )


def batch_prompts(batch_responses: int, *, num_responses: int, row_parts: int) -> int:
    """Return the prompts of a batch: a multiple of the parts, near `batch_responses` responses."""
    return max(1, batch_responses // num_responses // row_parts) * row_parts


def ask(
    sampling_pass: Pass,
    opened: prompts_lib.Opened,
    words: processor.Processor,
    *,
    workdir: pathlib.Path,
    key: jax.Array,
    sampler: Callable[[], Sampler],
    describe: Describe,
    schema: small_files.Schema,
    line_every_steps: int,
) -> Iterator[Mapping[str, Json]]:
    """Sample for every prompt without a written part, then yield all records in order.

    Of several processes all ask and describe together, and process 0 writes and yields.

    Args:
      sampler: called before each batch that is sampled.
      key: of the whole job.
      schema: of the fields that the reader of a record needs.

    Raises:
      InputError: a part on disk is damaged.
    """
    folder = workdir / _PARTS / sampling_pass.name
    key = jax.random.fold_in(
        key, int.from_bytes(hashlib.sha256(sampling_pass.name.encode()).digest()[:4])
    )
    shapes = _shapes(opened.sizes)
    starts = range(0, len(opened.rows), sampling_pass.batch_prompts)
    is_first = jax.process_index() == 0
    missing = agreement.on_first(
        "parts", lambda: [n for n in range(len(starts)) if not _part(folder, n).exists()]
    )
    shown = progress.Progress(
        sys.stderr if is_first else None,
        title=sampling_pass.name,
        first_step=len(starts) - len(missing),
        num_steps=len(starts),
        watched=("tokens", "ended"),
        line_every_steps=line_every_steps,
    )
    for done, number in enumerate(missing, start=len(starts) - len(missing) + 1):
        stop = min(starts[number] + sampling_pass.batch_prompts, len(opened.rows))
        rows = [opened.rows[index] for index in range(starts[number], stop)]
        examples = [
            encode.example(row.prompt, records.get_media(row), words, add_generation_prompt=True)
            for row in rows
        ]
        rollout = sampler()(
            _filled(examples, sampling_pass.batch_prompts),
            sampling_pass.sampling,
            jax.random.fold_in(key, number),
            num_responses=sampling_pass.num_responses,
            shapes=shapes,
        )
        rollout = _first(rollout, len(rows) * sampling_pass.num_responses)
        described = describe(rows, rollout)
        if is_first:
            metric_writers.write_dump(folder, number, described)
        values = {"tokens": float(rollout.lengths.mean()), "ended": float(rollout.ended.mean())}
        shown.show(done, values)
    shown.close()
    for number in range(len(starts) if is_first else 0):
        yield from small_files.read_lines(_part(folder, number), schema)


def _part(folder: pathlib.Path, number: int) -> pathlib.Path:
    return folder / f"{number:08d}.jsonl"


def _filled(items: Sequence[Any], size: int) -> list[Any]:
    """Return `size` items: the given ones, the last repeated."""
    return [*items, *[items[-1]] * (size - len(items))]


def _first(rollout: engine.Rollout, num_responses: int) -> engine.Rollout:
    return engine.Rollout(
        tokens=rollout.tokens[:num_responses],
        logprobs=rollout.logprobs[:num_responses],
        lengths=rollout.lengths[:num_responses],
        ended=rollout.ended[:num_responses],
    )


def recorded_step(workdir: pathlib.Path) -> int | None:
    """Return the policy's step recorded by a job in this folder, None without one."""
    identity = _read_identity(workdir)
    return None if identity is None else identity["model_config"]["step"]


def is_claimed(workdir: pathlib.Path) -> bool:
    """Return whether any job, this one included, has claimed the folder."""
    return (workdir / _IDENTITY).exists()


def claim(workdir: pathlib.Path, identity: checkpoint_meta.RunIdentity) -> None:
    """Record the policy and the configuration, or compare them with an earlier record.

    Raises:
      InputError: the folder is of another job.
    """
    recorded = _read_identity(workdir)
    if recorded is None:
        meta = {
            "stage": identity.stage,
            "config": dict(identity.config),
            "model_config": dict(identity.model_config),
        }
        small_files.write(workdir / _IDENTITY, meta)
        mirror.upload()
        return
    differences = identity.differences(recorded)
    if differences:
        lines = checkpoint_meta.lines(differences)
        raise errors.InputError(f"{workdir} is of another job; use another workdir:\n{lines}")


def _read_identity(workdir: pathlib.Path) -> Json | None:
    # The step is null unless the policy comes from a training run.
    return small_files.read(
        workdir / _IDENTITY,
        {"stage": str, "config": dict, "model_config": {"step": (int, type(None))}},
        remedy="use another workdir",
    )


def write_lines(path: pathlib.Path, rows: Iterator[Mapping[str, Json]]) -> None:
    """Write JSON lines as a whole or not at all, without holding them in memory; on process 0.

    The others only go through their rows.
    """
    if jax.process_index() != 0:
        for _ in rows:
            pass
        return
    with small_files.replacing(path) as file:
        for row in rows:
            file.write(small_files.dumps(row) + b"\n")
        lock.check()
    mirror.upload()


def finish(workdir: pathlib.Path, summary: Mapping[str, Json]) -> None:
    """Write `summary.json`, the mark of a finished job, and remove the parts."""

    def write() -> None:
        lock.check()
        small_files.write(workdir / _SUMMARY, summary)
        mirror.upload()
        shutil.rmtree(workdir / _PARTS, ignore_errors=True)

    agreement.on_first("finish", write)


def finished(workdir: pathlib.Path, schema: small_files.Schema) -> Json | None:
    """Return the summary of a finished job, None of an unfinished one."""
    path = workdir / _SUMMARY

    def read() -> Json | None:
        summary = small_files.read(path, schema, remedy=f"delete it, and {_PARTS} if it is there")
        if summary is not None:
            shutil.rmtree(workdir / _PARTS, ignore_errors=True)
        return summary

    return agreement.on_first("finished", read)
