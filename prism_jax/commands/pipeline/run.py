"""Run commands one after another, each once: killed at any moment, the next start resumes.

Each step is a separate process that writes to `steps/NAME.log`. `steps/NAME.json` holds its
command, its wall seconds over all starts, and whether it has finished; a finished step never starts
again. An interrupted step starts again with the same command, which resumes where it stopped.

The steps' processes belong to no terminal's group: a signal reaches this program, which passes
SIGTERM on and waits, so that a stage saves. If this program itself is killed, its step lives on.
The next start detects it by a file lock that the step inherited, ends it, and goes on.
"""

import contextlib
import fcntl
import os
import pathlib
import shutil
import signal
import subprocess
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

from prism_jax import errors, progress, small_files
from prism_jax.checkpoints import lock
from prism_jax.commands.pipeline import steps as pipeline_steps
from prism_jax.report import results

Json = Any
STOPPED = 143  # 128 + SIGTERM, as a stage that was preempted
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_RUNNING = "running.lock"
_POLL_SECONDS = 0.2
# Between two writes of the wall time; at most this much is lost in a kill of this program.
_RECORD_SECONDS = 2.0
# How long a step of an earlier start may take to save; a training step of a large model is long.
_LEFTOVER_SECONDS = 300.0
_LOG_LINES = 8
_LOG_BYTES = 8192
_LINE_CHARS = 100


class Runner:
    """The runner of one chain in one folder."""

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        program: Sequence[str],
        num_steps: int,
        stream: TextIO,
    ):
        """Prepare the folder, whose lock this process already holds.

        Args:
          program: the command in front of a step's arguments, as in `python -m prism_jax`.
          num_steps: of the whole chain, for the progress lines.
          stream: receives a line per step.
        """
        self._workdir = workdir
        self._folder = workdir / results.STEPS_FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)
        self._program = tuple(program)
        self._num_steps = num_steps
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._child: subprocess.Popen | None = None
        self._is_stopping = False
        self._drawn_chars = 0
        self._log_start = 0  # place in the log where this start of a step begins

    def run(self, steps: Sequence[pipeline_steps.Step]) -> None:
        """Run every step that has not finished.

        Raises:
          InputError: a finished step of this folder had another command.
          SystemExit: a step failed, with its exit code, or the chain was stopped, with 143.
        """
        self._refuse_others(steps)
        with self._signals(), self._alone() as running:
            for number, step in enumerate(steps, start=1):
                record = self._read(step)
                if record is not None and record["is_finished"]:
                    self._tell(number, step, record["seconds"], "finished before")
                    continue
                self._run(number, step, record, running)

    def _refuse_others(self, steps: Sequence[pipeline_steps.Step]) -> None:
        for step in steps:
            record = self._read(step)
            if record is None or not record["is_finished"]:
                continue
            if record["arguments"] != list(step.arguments):
                old, new = set(record["arguments"]), set(step.arguments)
                raise errors.InputError(
                    f"{self._workdir}: step {step.name} has finished with other arguments "
                    f"({' '.join(sorted(old - new)) or 'in another order'} instead of "
                    f"{' '.join(sorted(new - old)) or 'this one'}); use another workdir"
                )

    def _run(
        self, number: int, step: pipeline_steps.Step, record: Json | None, running: TextIO
    ) -> None:
        if self._is_stopping:
            raise SystemExit(STOPPED)
        spent = 0.0 if record is None else record["seconds"]
        record = {
            "number": number,
            "name": step.name,
            "arguments": list(step.arguments),
            "seconds": spent,
            "num_starts": 1 if record is None else record["num_starts"] + 1,
            "exit_code": None,
            "is_finished": False,
        }
        self._write(step, record)
        if step.removed is not None:
            _remove(self._workdir, step.removed)
        begun = time.monotonic()
        with self._log(step).open("ab") as log:
            self._log_start = log.seek(0, os.SEEK_END)
            code = self._wait(number, step, record, log, running)
        record |= {
            "seconds": spent + time.monotonic() - begun,
            "exit_code": code,
            "is_finished": code == 0,
        }
        self._write(step, record)
        if code == 0:
            self._tell(number, step, record["seconds"], "")
            return
        if self._is_stopping:
            self._tell(number, step, record["seconds"], "stopped; start again to go on")
            raise SystemExit(STOPPED)
        self._tell(number, step, record["seconds"], f"failed with exit code {code}")
        self._stream.write(f"{self._log(step)} ends:\n")
        self._stream.writelines(f"  {line}\n" for line in self._last_lines(step, _LOG_LINES))
        # A step that a signal killed has a negative code; shells say 128 + the signal.
        raise SystemExit(code if code > 0 else 128 - code)

    def _wait(
        self,
        number: int,
        step: pipeline_steps.Step,
        record: dict[str, Json],
        log: Any,
        running: TextIO,
    ) -> int:
        """Run the step's process; keep its record and, on a terminal, its line up to date."""
        spent, begun = record["seconds"], time.monotonic()
        written = begun
        _note(running, "")  # the earlier process is gone, and its number may belong to another
        self._child = subprocess.Popen(
            [*self._program, *step.command(self._workdir)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(running.fileno(),),
        )
        _note(running, str(self._child.pid))
        if self._is_stopping:  # the signal came while the process was made
            self._child.send_signal(signal.SIGTERM)
        while True:
            try:
                return self._child.wait(timeout=_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                now = time.monotonic()
            if now - written >= _RECORD_SECONDS:
                written = now
                self._write(step, record | {"seconds": spent + now - begun})
                self._draw(number, step, spent + now - begun)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Pass signals on as SIGTERM while the context is open."""

        def stop(signum: int, frame: types.FrameType | None) -> None:
            del signum, frame
            self._is_stopping = True
            if self._child is not None and self._child.returncode is None:
                self._child.send_signal(signal.SIGTERM)

        # Signals that this program ignored at its start stay ignored, as under nohup.
        before = {
            number: signal.signal(number, stop)
            for number in _SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[TextIO]:
        """Yield the lock's file when no step of an earlier start is alive."""
        path = self._folder / _RUNNING
        with path.open("a+") as file:
            if not _lock(file):
                pid = path.read_text(errors="replace").strip()
                self._stream.write(f"ending process {pid}, a step of an earlier start\n")
                self._stream.flush()
                # Only the number of a single process: signals to 0 and -1 reach many.
                if pid.isdecimal() and int(pid) > 1:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGTERM)
                deadline = time.monotonic() + _LEFTOVER_SECONDS
                while not _lock(file):
                    if time.monotonic() > deadline or self._is_stopping:
                        raise errors.InputError(
                            f"{self._workdir}: process {pid} of an earlier start still runs"
                        )
                    time.sleep(_POLL_SECONDS)
            yield file

    def _read(self, step: pipeline_steps.Step) -> Json | None:
        path = self._folder / f"{step.name}.json"
        return small_files.read(path, results.STEP, remedy="delete it to have the step run again")

    def _write(self, step: pipeline_steps.Step, record: Mapping[str, Json]) -> None:
        lock.check()
        small_files.write(self._folder / f"{step.name}.json", record)

    def _log(self, step: pipeline_steps.Step) -> pathlib.Path:
        return self._folder / f"{step.name}.log"

    def _last_lines(self, step: pipeline_steps.Step, count: int) -> list[str]:
        with self._log(step).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, size - _LOG_BYTES))
            text = file.read().decode(errors="replace")
        return [line for line in text.splitlines() if line.strip()][-count:]

    def _line(self, number: int, step: pipeline_steps.Step, seconds: float, status: str) -> str:
        digits = len(str(self._num_steps))
        place = f"[{number:{digits}}/{self._num_steps}]"
        line = f"{place} {step.name:14}  {progress.duration(seconds):>7}  {status}"
        return line.rstrip()

    def _tell(self, number: int, step: pipeline_steps.Step, seconds: float, status: str) -> None:
        line = self._line(number, step, seconds, status)
        start = "\r" if self._is_terminal else ""
        self._stream.write(f"{start}{line.ljust(self._drawn_chars)}\n")
        self._drawn_chars = 0
        self._stream.flush()

    def _draw(self, number: int, step: pipeline_steps.Step, seconds: float) -> None:
        """Show the last line of the step's log on a terminal."""
        if not self._is_terminal:
            return
        last_line = "".join(self._last_lines(step, 1))
        line = self._line(number, step, seconds, last_line)[:_LINE_CHARS]
        self._stream.write("\r" + line.ljust(self._drawn_chars))
        self._drawn_chars = len(line)
        self._stream.flush()


def _lock(file: TextIO) -> bool:
    """Try to take the lock, which inheriting processes share; return whether it worked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _note(running: TextIO, pid: str) -> None:
    """Record the number of the running process."""
    running.seek(0)
    running.truncate()
    running.write(pid)
    running.flush()


def _remove(workdir: pathlib.Path, name: str) -> None:
    """Remove the folder of an interrupted step, and its unfinished files beside it."""
    for path in (workdir / name, *workdir.glob(f".{name}.partial-*")):
        if path.exists():
            shutil.rmtree(path)
