"""A teacher's answer to one row after the other, from many threads: asked, paid, judged, counted.

Every reply is in the cache under the hash of its request before it is looked at.
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
    """Name what became of a reply, or of a prompt: that is its last try's."""

    KEPT = "kept"
    WRONG = "wrong"
    FORMAT = "format"
    CUT = "cut"  # by the limit of tokens
    FILTERED = "filtered"  # the endpoint withheld the reply
    UNREADABLE = "unreadable"  # a special token's name, `<image>` or half a character in it
    TOO_LONG = "too_long"  # an answer beyond the judge's limit
    UNJUDGED = "unjudged"  # the judge passed its deadline or failed
    FAILED = "failed"  # no reply in as many attempts as there may be
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
class Told:
    """Hold what became of a prompt."""

    id: str
    info: Mapping[str, Json]  # the row's extra_info
    has_other_system: bool  # its own system turn is not the published prompt
    tries: tuple[Outcome, ...]
    detail: str | None  # why the last one failed
    key: str | None  # of the reply that is kept

    @property
    def outcome(self) -> Outcome:
        return self.tries[-1]


class Answers:
    """Get the teacher's answer to one row after the other, from any thread.

    `stop` is set when the job is to end. `stopped` then names why, and `fatal` says what is wrong
    where something is.
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

    def answer(self, row: records.PromptRow) -> Told:
        """Try a row until a reply is kept or the tries are used up."""
        tries: list[Outcome] = []
        detail = None
        for number in range(self._options.num_tries):
            key = request.key(row, self._asking, try_number=number)
            outcome, detail = self._try(row, key)
            tries.append(outcome)
            if outcome in _FINAL:
                break
        return Told(
            id=row.id,
            info=row.extra_info,
            has_other_system=row.prompt[0] != request.student_prompt(row)[0],
            tries=tuple(tries),
            detail=detail,
            key=key if tries[-1] is Outcome.KEPT else None,
        )

    def keep_attempts(self) -> None:
        """Append to the file how the attempts since the last call ended.

        It is called after every request, so a killed job loses the count of those under way alone.
        """
        with self._attempts_lock:
            new = collections.Counter(self._client.counts()) - self._attempts_kept
            if new:
                # In one write: lines of a job that takes the folder over are not mixed with it.
                with self._attempts_file.open("ab", buffering=0) as file:
                    file.write(json.dumps(new).encode() + b"\n")
                self._attempts_kept += new

    def report(self, told: Sequence[Told]) -> dict[str, Json]:
        """Return the counts of everything."""
        prompts = collections.Counter(one.outcome for one in told)
        tries = collections.Counter(outcome for one in told for outcome in one.tries)
        attempts = self._client.counts()
        open_ends = prompts[Outcome.NOT_ASKED] + prompts[Outcome.FAILED]
        return {
            "model": self._asking.model,
            "base_url": self._options.endpoint.base_url,
            "complete": open_ends == 0,
            "stopped": self.stopped,
            "num_prompts": len(told),
            "num_kept": prompts[Outcome.KEPT],
            "prompts_under_another_system_turn": sum(one.has_other_system for one in told),
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
        found = self.cache.get(key)
        if found is not None:
            self._count("cached")
        else:
            found, outcome, detail = self._ask(row, key)
            if found is None:
                return outcome, detail
        self._count(f"model:{found.model}")
        return self._judged(row, found), None

    def _ask(
        self, row: records.PromptRow, key: str
    ) -> tuple[reply.Reply | None, Outcome, str | None]:
        """Return the reply, which is in the cache then, or what became of the request."""
        not_asked = None, Outcome.NOT_ASKED, None
        if self.stop.is_set():
            return not_asked
        amount = self.budget.reserve()
        if amount is None:
            self._end("budget")
            return not_asked
        try:
            found = self._client.ask(request.body(row, self._asking), unusable=self._pay_unusable)
            self.cache.put(key, found, model=self._asking.model)
            self._pay(found.usage)
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
        return found, Outcome.KEPT, None

    def _judged(self, row: records.PromptRow, found: reply.Reply) -> Outcome:
        if found.finish == "filter":
            return Outcome.FILTERED
        if found.finish == "length":
            return Outcome.CUT
        text = found.text.strip()
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

    def _note_failure(self, told: str) -> None:
        with self._lock:
            self._failed_in_row += 1
            is_enough = self._failed_in_row >= self._options.max_failed_in_row
        if is_enough:
            self._end("failing", fatal=f"{self._failed_in_row} requests failed in a row: {told}")

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
    """Return the sums over the file's lines; a last one that a kill has cut off is removed."""
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
    """Return a row with the teacher's response, under the system prompt that asks for its form."""
    caption, cot = tags.split_text(text)
    return dataclasses.replace(
        row,
        prompt=request.student_prompt(row),
        teacher_response=text,
        teacher_caption=caption,
        teacher_cot=cot,
    )


def _is_readable(row: records.PromptRow) -> bool:
    """Tell whether the training stages will read the row."""
    try:
        validate.check_row(row, validate.Rules(need_teacher=True, need_answer=True))
        row.teacher_response.encode()
    except (records.RowError, UnicodeEncodeError):
        return False
    return True
