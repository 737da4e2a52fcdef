"""Have a teacher answer prompts and keep what verifies: the second step of `curate`.

Any OpenAI-compatible chat endpoint can be the teacher. A reply is kept when its format passes the
strict gate and the strict judge finds its answer right. Nothing here needs JAX or an accelerator.

Every reply is in the cache under the hash of its request before it is looked at. So what this step
writes follows from rows, configuration and cache; started again, after a kill too, it asks only
what is not there.
"""

import concurrent.futures
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from prism_jax import errors, progress, small_files
from prism_jax.checkpoints import lock
from prism_jax.commands.curate import teacher_answers, teacher_config
from prism_jax.data import prompt_files, records, sharegpt_files, sources, validate
from prism_jax.setup import dropped_rows

Json = Any
SFT_FILE = "teacher_sft.json"
ALIGN_FILE = "align.parquet"
OUTCOMES_FILE = "outcomes.jsonl"
REPORT_FILE = "report.json"


def run(
    options: teacher_config.Teacher, rows_source: sources.Source, folder: pathlib.Path
) -> dict[str, Json]:
    """Ask every prompt, write both data sets and return the report.

    The files are written as well when the job stops early, of what there is then.

    Args:
      folder: of this step, inside the workdir.

    Raises:
      InputError: configuration or data are wrong, or the endpoint refuses every request.
    """
    key = options.endpoint.key()
    rules = validate.Rules(
        max_bad_rows=options.max_bad_rows,
        option="config.teacher.max_bad_rows",
        limit_pixels=options.limit_image_pixels,
        need_answer=True,
    )
    with dropped_rows.named(None):
        opened = sources.open_source(rows_source, rules, cache_dir=options.rows_cache_dir)
    dropped_rows.print_rows(opened.report, None)
    count = len(opened.rows) if options.max_rows is None else options.max_rows
    rows = sources.Selection(opened.rows, range(min(count, len(opened.rows))))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT_FILE).unlink(missing_ok=True)  # it tells of other files
    with options.judge.start_for_accuracy("strict") as judge:
        answers = teacher_answers.Answers(options, folder, key=key, judge=judge)
        told = _ask_all(options, rows, answers)
    lock.check()
    _write(rows, told, answers, options, folder, has_scales=opened.report.has_scales)
    report = answers.report(told) | {"prompts_read": opened.report.summary()}
    small_files.write(folder / REPORT_FILE, report)
    if answers.fatal is not None:
        raise errors.InputError(f"{options.endpoint.model}: {answers.fatal}")
    return report


def _ask_all(
    options: teacher_config.Teacher, rows: sources.Rows, answers: teacher_answers.Answers
) -> list[teacher_answers.Told]:
    shown = progress.Progress(
        sys.stderr,
        title="teacher",
        first_step=0,
        num_steps=len(rows),
        watched=("kept", "cost"),
        line_every_steps=options.line_every_steps,
    )
    told: list[teacher_answers.Told] = []
    kept = 0
    with concurrent.futures.ThreadPoolExecutor(options.endpoint.num_concurrent) as pool:
        waiting = [pool.submit(lambda i: answers.answer(rows[i]), i) for i in range(len(rows))]
        try:
            for number, future in enumerate(waiting, start=1):
                told.append(future.result())
                lock.check()
                kept += told[-1].outcome is teacher_answers.Outcome.KEPT
                shown.show(number, {"kept": float(kept), "cost": answers.budget.spent})
        except BaseException:
            # Replies under way are paid: they are waited for and kept, but none is asked any more.
            answers.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        finally:
            shown.close()
    return told


def _write(
    rows: sources.Rows,
    told: Sequence[teacher_answers.Told],
    answers: teacher_answers.Answers,
    options: teacher_config.Teacher,
    folder: pathlib.Path,
    *,
    has_scales: bool,
) -> None:
    """Write both data sets and the outcomes, in the order of the rows."""
    kept = [i for i, one in enumerate(told) if one.key is not None]

    def each() -> Iterator[records.PromptRow]:
        for i in kept:
            yield teacher_answers.answered(rows[i], answers.cache.get(told[i].key).text.strip())

    sharegpt_files.write(folder / SFT_FILE, map(_demonstration, each()))
    infos = [
        dict(told[i].info)
        | {"teacher_model": options.endpoint.model, "teacher_tries": len(told[i].tries)}
        for i in kept
    ]
    prompt_files.write(folder / ALIGN_FILE, each(), infos=infos, has_scales=has_scales)
    lines = (
        {"id": one.id, "outcome": one.outcome.value, "tries": one.tries, "detail": one.detail}
        for one in told
    )
    small_files.replace(
        folder / OUTCOMES_FILE, b"".join(small_files.dumps(line) + b"\n" for line in lines)
    )


def _demonstration(row: records.PromptRow) -> records.SFTRow:
    response = records.Message(role="assistant", content=row.teacher_response)
    return records.SFTRow(
        id=row.id, source=row.source, messages=(*row.prompt, response), images=row.images
    )
