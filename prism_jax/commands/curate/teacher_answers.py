"""The teacher's answers, row by row from many threads: requested, paid, judged and counted.

Each reply enters the cache under the hash of its request before it is examined.
"""

import collections
import dataclasses
import enum
import json
import os
import pathlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from prism_jax import small_files
from prism_jax.commands.curate import teacher_config
from prism_jax.data import records, validate
from prism_jax.rewards import score, tags, workers
from prism_jax.teacher import budget, cache, client, reply, request

Json = Any
ATTEMPTS_FILE = "attempts.jsonl"


class Outcome(enum.StrEnum):
    """The outcome of a reply; that of a prompt is the outcome of its last try."""

    KEPT = "kept"
    WRONG = "wrong"
    FORMAT = "format"
    CUT = "cut"  # by the limit of tokens
    FILTERED = "filtered"  # the endpoint withheld the reply
    UNREADABLE = "unreadable"  # a special token's name, `<image>` or half a character in it
    TOO_LONG = "too_long"  # an answer beyond the judge's limit
    UNJUDGED = "unjudged"  # the judge passed its deadline or failed
    FAILED = "failed"  # no reply within the allowed attempts
    REFUSED = "refused"  # the endpoint refuses this request
    NOT_ASKED = "not_asked"  # the job stopped before


_OF_REASON = {
    score.Reason.CORRECT: Outcome.KEPT,
    score.Reason.WRONG: Outcome.WRONG,
    score.Reason.FORMAT: Outcome.FORMAT,
    score.Reason.NO_ANSWER: Outcome.FORMAT,
    score.Reason.TOO_LONG: Outcome.TOO_LONG,
    score.Reason.TIMEOUT: Outcome.UNJUDGED,
    score.Reason.ERROR: Outcome.UNJUDGED,
}
# Another try would end the same way.
_FINAL = (Outcome.KEPT, Outcome.FAILED, Outcome.REFUSED, Outcome.NOT_ASKED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptOutcome:
    """The outcome of a prompt, with that of each try."""

    id: str
    info: Mapping[str, Json]  # the row's extra_info
    has_other_system: bool  # the row's system turn is not the published prompt
    tries: tuple[Outcome, ...]
    detail: str | None  # reason why the last try failed
    key: str | None  # of the reply that is kept

    @property
    def outcome(self) -> Outcome:
        return self.tries[-1]


class Answers:
    """The teacher's answers to rows, requested from any thread.

    `stop` is set when the job is to end. `stopped` then holds the reason, and `fatal` the message
    when the reason is an error.
    """

    def __init__(
        self,
        options: teacher_config.Teacher,
        folder: pathlib.Path,
        *,
        key: str | None,
        judge: workers.JudgePool,
    ):
        self._options = options
        self._asking = options.asking()
        self._prices = options.prices.of()
        self.cache = cache.Cache(
            folder / "cache" if options.cache_dir is None else pathlib.Path(options.cache_dir)
        )
        self._known = list(self.cache.usages(model=self._asking.model))
        self.budget = budget.Budget(
            options.budget,
            spent=sum(map(self._prices.cost, self._known)),
            prices=self._prices,
            max_tokens=options.sampling.max_tokens,
        )
        self.stop = threading.Event()
        self.stopped: str | None = None
        self.fatal: str | None = None
        self._client = client.Client(
            options.endpoint.base_url, key=key, patience=options.endpoint.patience(), stop=self.stop
        )
        self._attempts_file = folder / ATTEMPTS_FILE
        self._attempts_before = _read_counts(self._attempts_file)  # of earlier starts
        self._attempts_kept: collections.Counter[str] = collections.Counter()  # of this start
        self._attempts_lock = threading.Lock()
        self._judge = judge
        self._judge_lock = threading.Lock()
        self._lock = threading.Lock()
        self._failed_in_row = 0
        self._paid: list[reply.Usage] = []  # by this start
        self._counts: collections.Counter[str] = collections.Counter()

    def answer(self, row: records.PromptRow) -> PromptOutcome:
        """Try a row until a reply is kept or the tries are used up."""
        tries: list[Outcome] = []
        detail = None
        for number in range(self._options.num_tries):
            key = request.key(row, self._asking, try_number=number)
            outcome, detail = self._try(row, key)
            tries.append(outcome)
            if outcome in _FINAL:
                break
        return PromptOutcome(
            id=row.id,
            info=row.extra_info,
            has_other_system=row.prompt[0] != request.student_prompt(row)[0],
            tries=tuple(tries),
            detail=detail,
            key=key if tries[-1] is Outcome.KEPT else None,
        )

    def keep_attempts(self) -> None:
        """Append the counts of the attempts since the last call to the file.

        Called after every request, so a killed job loses only the counts of requests under way.
        """
        with self._attempts_lock:
            new = collections.Counter(self._client.counts()) - self._attempts_kept
            if new:
                # One write, so that lines of a job that takes the folder over do not mix with it.
                with self._attempts_file.open("ab", buffering=0) as file:
                    file.write(json.dumps(new).encode() + b"\n")
                self._attempts_kept += new

    def report(self, outcomes: Sequence[PromptOutcome]) -> dict[str, Json]:
        """Return the report: counts of prompts, tries, attempts and costs."""
        prompts = collections.Counter(one.outcome for one in outcomes)
        tries = collections.Counter(outcome for one in outcomes for outcome in one.tries)
        attempts = self._client.counts()
        open_ends = prompts[Outcome.NOT_ASKED] + prompts[Outcome.FAILED]
        return {
            "model": self._asking.model,
            "base_url": self._options.endpoint.base_url,
            "complete": open_ends == 0,
            "stopped": self.stopped,
            "num_prompts": len(outcomes),
            "num_kept": prompts[Outcome.KEPT],
            "prompts_under_another_system_turn": sum(one.has_other_system for one in outcomes),
            "prompts": {outcome.value: prompts[outcome] for outcome in Outcome},
            "tries": {outcome.value: tries[outcome] for outcome in Outcome},
            "attempts": {
                name: self._attempts_before[name] + count for name, count in attempts.items()
            },
            "attempts_of_this_start": attempts,
            "replies_from_cache": self._counts["cached"],
            "replies_without_usage": self._counts["without_usage"],
            "this_start": self._sums(self._paid),
            # Attempts without a count of tokens cost at least nothing: this is a lower bound.
            "whole_cache": self._sums([*self._known, *self._paid]),
            "prices_per_million": dataclasses.asdict(self._options.prices),
            "budget": self._options.budget,
            "models_told": {
                name.removeprefix("model:"): count
                for name, count in sorted(self._counts.items())
                if name.startswith("model:")
            },
        }

    def _try(self, row: records.PromptRow, key: str) -> tuple[Outcome, str | None]:
        teacher_reply = self.cache.get(key)
        if teacher_reply is not None:
            self._count("cached")
        else:
            teacher_reply, outcome, detail = self._ask(row, key)
            if teacher_reply is None:
                return outcome, detail
        self._count(f"model:{teacher_reply.model}")
        return self._judged(row, teacher_reply), None

    def _ask(
        self, row: records.PromptRow, key: str
    ) -> tuple[reply.Reply | None, Outcome, str | None]:
        """Request a reply and put it in the cache; return it, or the reason why there is none."""
        not_asked = None, Outcome.NOT_ASKED, None
        if self.stop.is_set():
            return not_asked
        amount = self.budget.reserve()
        if amount is None:
            self._end("budget")
            return not_asked
        try:
            teacher_reply = self._client.ask(
                request.body(row, self._asking), unusable=self._pay_unusable
            )
            self.cache.put(key, teacher_reply, model=self._asking.model)
            self._pay(teacher_reply.usage)
        except client.StoppedError:
            return not_asked
        except client.FatalError as error:
            self._end("refused", fatal=str(error))
            return not_asked
        except (client.FailedError, client.RefusedError) as error:
            self._note_failure(str(error))
            is_refused = isinstance(error, client.RefusedError)
            return None, Outcome.REFUSED if is_refused else Outcome.FAILED, str(error)
        finally:
            self.budget.release(amount)
            self.keep_attempts()
        with self._lock:
            self._failed_in_row = 0
        return teacher_reply, Outcome.KEPT, None

    def _judged(self, row: records.PromptRow, teacher_reply: reply.Reply) -> Outcome:
        if teacher_reply.finish == "filter":
            return Outcome.FILTERED
        if teacher_reply.finish == "length":
            return Outcome.CUT
        text = teacher_reply.text.strip()
        if not tags.format_ok(text, gate="strict"):
            return Outcome.FORMAT
        if not _is_readable(answered(row, text)):
            return Outcome.UNREADABLE
        task = score.Task(
            response=text,
            ended=True,
            ground_truth=row.ground_truth,
            equivalent_answers=row.equivalent_answers,
            data_source=row.data_source or "",
        )
        with self._judge_lock:
            (reward,) = self._judge.grade([task])
        return _OF_REASON[reward.reason]

    def _pay(self, usage: reply.Usage | None) -> None:
        if usage is None:
            self._count("without_usage")
            if self._options.budget is not None:
                self._end("no_usage", fatal="no `usage` in a reply, so no budget can be kept")
            return
        with self._lock:
            self._paid.append(usage)
        self.budget.pay(usage)

    def _pay_unusable(self, usage: reply.Usage) -> None:
        self.cache.put_unusable(model=self._asking.model, usage=usage)
        self._pay(usage)

    def _note_failure(self, message: str) -> None:
        with self._lock:
            self._failed_in_row += 1
            is_enough = self._failed_in_row >= self._options.max_failed_in_row
        if is_enough:
            self._end("failing", fatal=f"{self._failed_in_row} requests failed in a row: {message}")

    def _end(self, why: str, *, fatal: str | None = None) -> None:
        with self._lock:
            if self.stopped is None:
                self.stopped, self.fatal = why, fatal
        self.stop.set()

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    def _sums(self, usages: Sequence[reply.Usage]) -> dict[str, Json]:
        return {
            "replies": len(usages),
            "input_tokens": sum(one.input_tokens for one in usages),
            "output_tokens": sum(one.output_tokens for one in usages),
            "cost": sum(map(self._prices.cost, usages)),
        }


def _read_counts(path: pathlib.Path) -> collections.Counter[str]:
    """Return the sums over the file's lines; remove a last line that a kill has cut off."""
    total: collections.Counter[str] = collections.Counter()
    if not path.exists():
        return total
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        os.truncate(path, len(whole))
    for number, line in enumerate(whole.splitlines(), start=1):
        total.update(small_files.parse(line, {str: int}, where=f"{path}: line {number}"))
    return total


def answered(row: records.PromptRow, text: str) -> records.PromptRow:
    """Return a row with the teacher's response, under the student's system prompt."""
    caption, cot = tags.split_text(text)
    return dataclasses.replace(
        row,
        prompt=request.student_prompt(row),
        teacher_response=text,
        teacher_caption=caption,
        teacher_cot=cot,
    )


def _is_readable(row: records.PromptRow) -> bool:
    """Return whether the training stages will read the row."""
    try:
        validate.check_row(row, validate.Rules(need_teacher=True, need_answer=True))
        row.teacher_response.encode()
    except (records.RowError, UnicodeEncodeError):
        return False
    return True
