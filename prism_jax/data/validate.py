"""Check all rows when a data set is built or opened, and report each row that is left out.

The report lists such a row with its file, number, id, reason and message. More wrong rows than
`Rules.max_bad_rows` end the build with `WrongRows`, which has that list.
"""

import collections
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from prism_jax import errors
from prism_jax.data import images, marks, parallel, records, row_images, unique_ids

# The number of tokens of a row, or a tuple that begins with it.
Counted = int | tuple[Any, ...]

_DIGEST_BYTES = 32
# Wrong rows beyond the limit that are listed before reading stops.
_MOST_LISTED = 100_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """The rules for a row, and the treatment of rows that break them.

    Attributes:
      max_bad_rows: wrong rows that may be left out; more are an error.
      option: the user's name of `max_bad_rows`, for messages.
      count_tokens: returns the length of a validated row in the stage, alone or followed by other
        values to store in `Report.counted`; None: any length.
      max_tokens: the longest row, given exactly if `count_tokens` is.
      overlong: "error" counts a longer row as wrong, "filter" leaves it out and reports it.
      need_teacher: a prompt needs teacher_caption and teacher_cot.
      need_answer: a prompt needs a ground truth.
      answer_problem: returns why a ground truth cannot be judged against, None if it can; used with
        `need_answer`.
      limit_pixels: pixels of an image or a frame, read before it is decoded.
      limit_image_bytes: size of an image file.
      num_threads: rows checked in parallel.
    """

    max_bad_rows: int = 0
    option: str = "max_bad_rows"
    count_tokens: Callable[[records.Row], Counted] | None = None
    max_tokens: int | None = None
    overlong: Literal["error", "filter"] = "error"
    need_teacher: bool = False
    need_answer: bool = False
    answer_problem: Callable[[str], str | None] | None = None
    limit_pixels: int = images.LIMIT_PIXELS
    limit_image_bytes: int = 64 << 20
    num_threads: int = 4

    def __post_init__(self):
        if self.max_bad_rows < 0:
            raise errors.InputError(f"{self.option} must be >= 0, got {self.max_bad_rows}")
        if not 1 <= self.limit_pixels <= images.LARGEST_LIMIT_PIXELS:
            raise errors.InputError(
                f"limit_image_pixels must be from 1 to {images.LARGEST_LIMIT_PIXELS}, got "
                f"{self.limit_pixels}"
            )
        if self.overlong not in ("error", "filter"):
            raise errors.InputError(f"data.overlong must be error or filter, got {self.overlong!r}")
        if (self.count_tokens is None) != (self.max_tokens is None):
            raise ValueError("count_tokens and max_tokens must be given together")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A row of a file, not yet parsed; `index` counts the rows of the whole source from 0."""

    index: int
    place: records.Place
    fields: Mapping[str, Any] | records.RowError
    parse: Callable[..., records.Row]  # (fields, place=)
    image_root: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropped:
    """A row that was left out; `is_wrong` is False for duplicates and with overlong=filter."""

    file: str
    row: int
    id: str | None
    reason: str
    message: str
    is_wrong: bool

    def __str__(self) -> str:
        name = "" if self.id is None else f" (id {records.shorten(self.id, 100)})"
        return f"{self.file} row {self.row}{name}: {self.reason}: {self.message}"


@dataclasses.dataclass(kw_only=True)
class Report:
    """The rows of a source that were read, accepted and left out.

    `counted` has the result of `Rules.count_tokens` for each accepted row, in order; it is empty
    without that rule. `digests` is `records.digest` of the accepted rows, concatenated; it is empty
    if a built folder was opened without reading its rows.
    """

    name: str
    num_read: int = 0
    num_kept: int = 0
    num_wrong: int = 0
    dropped: list[Dropped] = dataclasses.field(default_factory=list)
    counted: list[Counted] = dataclasses.field(default_factory=list)
    digests: bytearray = dataclasses.field(default_factory=bytearray)
    has_scales: bool = False  # a picture sets a size
    has_videos: bool = False
    renamed: dict[int, str] = dataclasses.field(default_factory=dict)  # number of the row -> new id

    def keep(self, row: records.Row, counted: Counted | None, row_digest: bytes) -> None:
        """Add an accepted row."""
        self.num_kept += 1
        self.digests += row_digest
        self.has_scales |= any(image.scale is not None for image in records.get_images(row))
        self.has_videos |= bool(records.get_videos(row))
        if counted is not None:
            self.counted.append(counted)

    def digest_of(self, number: int) -> bytes:
        """Return `records.digest` of an accepted row."""
        return bytes(self.digests[number * _DIGEST_BYTES : (number + 1) * _DIGEST_BYTES])

    def first_digests(self, max_rows: int | None) -> bytes:
        """Return the digests of the first accepted rows (None: of all), in order."""
        assert len(self.digests) == self.num_kept * _DIGEST_BYTES, f"{self.name}: rows not read"
        return bytes(self.digests if max_rows is None else self.digests[: max_rows * _DIGEST_BYTES])

    def drop(
        self, place: records.Place, row_id: str | None, error: records.RowError, rules: Rules
    ) -> None:
        """Add a row that is left out."""
        is_filtered = error.reason == "overlong" and rules.overlong == "filter"
        is_wrong = not is_filtered and error.reason != "duplicate"
        self.num_wrong += is_wrong
        self.dropped.append(
            Dropped(
                file=place.file,
                row=place.row,
                id=row_id,
                reason=error.reason,
                message=str(error),
                is_wrong=is_wrong,
            )
        )

    def counts(self) -> dict[str, int]:
        """Return the number of dropped rows by reason, most frequent first, then by name."""
        counts = collections.Counter(row.reason for row in self.dropped)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def summary(self) -> dict[str, Any]:
        """Return the numbers as JSON values."""
        return {
            "name": self.name,
            "rows_read": self.num_read,
            "rows_kept": self.num_kept,
            "rows_dropped": len(self.dropped),
            "ids_made_unique": len(self.renamed),
            "dropped_by_reason": self.counts(),
        }

    def lines(self) -> str:
        """Return the dropped rows as JSON lines."""
        rows = (json.dumps(dataclasses.asdict(row), ensure_ascii=True) for row in self.dropped)
        return "".join(f"{row}\n" for row in rows)

    def finish(self, rules: Rules) -> None:
        """Raise `WrongRows` if more rows are wrong than allowed, or if none is left."""
        wrong = [row for row in self.dropped if row.is_wrong]
        if len(wrong) > rules.max_bad_rows:
            problem = f"{len(wrong)} of {self.num_read} rows are wrong, "
            problem += f"{rules.option} is {rules.max_bad_rows}"
            raise WrongRows(f"{self.name}: {problem}{self._listing(wrong)}", self)
        if self.num_kept == 0:
            problem = f"no rows: {self.num_read} read, {len(self.dropped)} dropped"
            raise WrongRows(f"{self.name}: {problem}{self._listing(self.dropped)}", self)

    def _listing(self, rows: list[Dropped]) -> str:
        counts = ", ".join(f"{reason} {count}" for reason, count in self.counts().items())
        return f"; {counts}; first {rows[0]}" if rows else ""


class WrongRows(errors.InputError):
    """Too many wrong rows in a data set; the message is short, `report` lists them all."""

    def __init__(self, message: str, report: Report):
        super().__init__(message)
        self.report = report


def check(
    candidates: Iterable[Candidate], rules: Rules, report: Report
) -> Iterator[tuple[Candidate, records.Row]]:
    """Yield the valid rows in order, with images loaded, and add the others to the report.

    A row with the id of an earlier row gets a new id, or is left out if it is the same row.
    `report.finish` is called after the last row, so it raises before a caller reaches the end with
    too many wrong rows.
    """
    ids = unique_ids.Ids()

    def work(candidate: Candidate) -> _ValidRow | _InvalidRow:
        return _check_one(candidate, rules)

    weighed = parallel.ordered_map(
        work,
        candidates,
        rules.num_threads,
        weigh=lambda candidate: parallel.held_bytes(candidate.fields),
    )
    for candidate, result in weighed:
        report.num_read += 1
        if isinstance(result, _ValidRow):
            row = result.row
            try:
                row_id = ids.admit(row.id, result.digest, candidate.index)
                if row_id != row.id:
                    row = dataclasses.replace(row, id=row_id)
                    report.renamed[report.num_kept] = row_id
                report.keep(row, result.counted, result.digest)
                yield candidate, row
                continue
            except records.RowError as error:
                result = _InvalidRow(row_id=row.id, error=error)
        report.drop(candidate.place, result.row_id, result.error, rules)
        if report.num_wrong > rules.max_bad_rows + _MOST_LISTED:
            break
    report.finish(rules)


def recheck(rows: Sequence[records.Row], rules: Rules, report: Report, *, file: str) -> list[int]:
    """Check the rows of a built folder for a stage; return the numbers of the valid rows.

    The checks are those of `check`, except that pictures are compared with their sha256 and not
    decoded.

    Raises:
      InputError: a picture is damaged, or too many rows are wrong.
    """

    def work(index: int) -> _ValidRow | _InvalidRow:
        row = rows[index]
        row_images.check_stored(row, f"{file} row {index + 1}")
        try:
            check_row(row, rules)
            row_images.check_pixels(row, limit_pixels=rules.limit_pixels)
            counted = check_length(row, rules)
        except records.RowError as error:
            return _InvalidRow(row_id=row.id, error=error.alone())
        return _ValidRow(row=row, counted=counted, digest=records.digest(row))

    numbers = []
    for index, result in parallel.ordered_map(work, range(len(rows)), rules.num_threads):
        report.num_read += 1
        if isinstance(result, _ValidRow):
            report.keep(result.row, result.counted, result.digest)
            numbers.append(index)
        else:
            place = records.Place(file=file, row=index + 1)
            report.drop(place, result.row_id, result.error, rules)
    report.finish(rules)
    return numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ValidRow:
    row: records.Row
    counted: Counted | None
    digest: bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class _InvalidRow:
    row_id: str | None
    error: records.RowError


def _check_one(candidate: Candidate, rules: Rules) -> _ValidRow | _InvalidRow:
    """Return the row with its images, or its id (if it has one) and the error."""
    row_id = None
    try:
        if isinstance(candidate.fields, records.RowError):
            raise candidate.fields
        given = candidate.fields.get("id")
        row_id = None if given is None else f"{given!s:.100}"
        row = candidate.parse(candidate.fields, place=candidate.place)
        row_id = row.id
        check_row(row, rules)
        row = row_images.load(
            row,
            candidate.image_root,
            limit_pixels=rules.limit_pixels,
            limit_bytes=rules.limit_image_bytes,
        )
        counted = check_length(row, rules)
    except records.RowError as error:
        return _InvalidRow(row_id=row_id, error=error.alone())
    return _ValidRow(row=row, counted=counted, digest=records.digest(row))


def check_row(row: records.Row, rules: Rules) -> None:
    """Check roles, texts and marks of a row, without opening images."""
    if isinstance(row, records.SFTRow):
        _check_turns(row.messages, last="assistant")
        prompts = [message.content for message in row.messages if message.role == "user"]
    elif isinstance(row, records.PromptRow):
        _check_turns(row.prompt, last="user")
        prompts = [message.content for message in row.prompt if message.role == "user"]
        _check_needs(row, rules)
    else:
        prompts = [row.prompt]
    if not "".join(prompts).strip():
        raise records.RowError("empty_prompt", "the prompt has no text, picture or video")
    systems = [turn.content for turn in _turns_of(row) if turn.role == "system"]
    marks.check(row, prompts, systems)


def _turns_of(row: records.Row) -> tuple[records.Message, ...]:
    if isinstance(row, records.PairRow):
        return ()
    return row.messages if isinstance(row, records.SFTRow) else row.prompt


def _check_turns(messages: tuple[records.Message, ...], *, last: str) -> None:
    turns = messages[1:] if messages[0].role == "system" else messages
    roles = [turn.role for turn in turns]
    if last == "assistant" and "assistant" not in roles:
        raise records.RowError("no_response", f"no assistant turn, roles: {', '.join(roles)}")
    right = ["user", "assistant"] * len(roles)
    if not roles or roles != right[: len(roles)] or roles[-1] != last:
        raise records.RowError(
            "role_order",
            f"user and assistant must alternate, from user to {last}, after an optional system "
            f"turn, got: {', '.join(message.role for message in messages)}",
        )
    for turn in turns:
        if not turn.content.strip():
            reason = "empty_answer" if turn.role == "assistant" else "empty_prompt"
            raise records.RowError(reason, f"a turn of {turn.role} is empty")


def _check_needs(row: records.PromptRow, rules: Rules) -> None:
    if rules.need_teacher and row.teacher_caption is None:
        raise records.RowError("missing_segment", "teacher_caption and teacher_cot are missing")
    if not rules.need_answer:
        return
    if row.ground_truth is None:
        raise records.RowError("empty_answer", "no ground truth")
    problem = rules.answer_problem(row.ground_truth) if rules.answer_problem else None
    if problem is not None:
        raise records.RowError("bad_answer", problem)


def check_length(row: records.Row, rules: Rules) -> Counted | None:
    """Return the result of `Rules.count_tokens` for a validated row; RowError if it is too long."""
    if rules.count_tokens is None:
        return None
    try:
        counted = rules.count_tokens(row)
    except records.RowError:
        raise
    except errors.InputError as error:
        raise records.RowError("unprocessable", str(error)) from error
    num_tokens = counted[0] if isinstance(counted, tuple) else counted
    if num_tokens > rules.max_tokens:
        raise records.RowError("overlong", f"{num_tokens} tokens, the limit is {rules.max_tokens}")
    return counted
