"""The program with a fault in one of its processes, for tests of jobs of several processes.

PRISM_TEST_SHARES_PROGRAMS=1    see `tests.shared_programs`
PRISM_TEST_FAULT=KIND:PROCESS[:STEP],…    PROCESS: its number, or all

scripted       no policy: responses as in `scripted.by_key`, of the files of `scripted.write_files`
slow_judge     the judge of that process takes seconds longer
late_judge     every answer that the judge of that process gets runs out of time
sigterm        that process gets SIGTERM before the step of this number (from 0) begins
die_in_save    that process is killed while the checkpoint of this step is being written
die_in_step    that process is killed before the step of this number begins
full_disk      that process finds the disk full when the checkpoint of this step is written
other_rows     that process makes another row of the step of this number
"""

import errno
import os
import signal
import sys
import time

from prism_jax import main
from prism_jax.checkpoints import checkpoint
from prism_jax.commands.ask import job as ask_job
from prism_jax.rewards import score, workers
from prism_jax.running import loop
from prism_jax.setup import agreement
from tests import shared_programs
from tests.stages import scripted

_SLOW_SECONDS = 4.0
LATE = score.Reward(total=0.0, accuracy=0.0, format=0.0, reason=score.Reason.TIMEOUT)


def _before(owner, name, do):
    """Call `do` with the arguments before the method or function itself."""
    original = getattr(owner, name)

    def both(*args, **kwargs):
        do(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, both)


def inject(kind: str, step: int) -> None:
    """Put the fault into this process."""
    grade = workers.JudgePool.grade

    def late(self, tasks):
        return [LATE for _ in tasks]

    def slow(self, tasks):
        time.sleep(_SLOW_SECONDS)
        return grade(self, tasks)

    def send(number):
        def do(data, this_step):
            if this_step == step:
                os.kill(os.getpid(), number)

        return do

    if kind == "scripted":
        ask_job.open_sampler = scripted.open_by_key
    elif kind == "slow_judge":
        workers.JudgePool.grade = slow
    elif kind == "late_judge":
        workers.JudgePool.grade = late
    elif kind == "sigterm":
        _before(loop, "_next_batch", send(signal.SIGTERM))
    elif kind == "die_in_step":
        _before(loop, "_next_batch", send(signal.SIGKILL))
    elif kind == "die_in_save":
        write = checkpoint.Checkpointer.write_items

        def die(self, this_step, *args, **kwargs):
            write(self, this_step, *args, **kwargs)
            if this_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoint.Checkpointer.write_items = die
    elif kind == "full_disk":

        def fail(self, this_step, *args, **kwargs):
            if this_step == step:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "here")

        _before(checkpoint.Checkpointer, "write_items", fail)
    elif kind == "other_rows":
        note = agreement.Inputs.note

        def other(self, this_step, *parts):
            note(self, this_step, *parts, *(["another"] if this_step == step else []))

        agreement.Inputs.note = other
    else:
        raise ValueError(kind)


if __name__ == "__main__":
    if os.environ.get("PRISM_TEST_SHARES_PROGRAMS") == "1":
        shared_programs.share()
    faults = os.environ.get("PRISM_TEST_FAULT", "")
    for fault in faults.split(",") if faults else ():
        kind, process, *where = fault.split(":")
        if process in ("all", os.environ.get("PRISM_PROCESS_ID", "0")):
            inject(kind, int(where[0]) if where else 0)
    # python -m prism_jax …
    sys.exit(main.main(sys.argv[3:]))
