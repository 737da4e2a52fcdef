"""The facts about each row of a data set, gathered while its rows are validated."""

import dataclasses
from collections.abc import Callable, Sequence

from prism_jax import errors
from prism_jax.commands.audit import pictures, texts
from prism_jax.data import encode, processor, records, sources, validate
from prism_jax.rewards import tags

_MANY = 1 << 31


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """The facts about a valid row for an audit; None where a row has no such thing."""

    id: str
    source: int  # number of the data set, and of the row in it
    number: int
    question: bytes  # see `texts.question_key`
    question_chars: int
    pictures: tuple[pictures.Seen, ...]
    num_turns: int
    has_system: bool
    tokens: int | None  # of the prompt, for sft of the whole row, pictures included
    response_tokens: tuple[int, ...]  # of each response; without a tokenizer none
    response_chars: tuple[int, ...]
    has_end: tuple[bool, ...]  # of each response, by its last character
    cut: tuple[str, ...]  # why the responses look cut
    strict_ok: bool | None  # the format of the whole response
    official_ok: bool | None
    answer: str | None  # of the whole response
    truth: str | None
    equivalents: tuple[str, ...]
    data_source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A data set: its rows, the report on those left out, and the facts."""

    name: str
    rows: sources.Rows
    report: validate.Report
    facts: list[Facts]


def survey(
    given: Sequence[tuple[str, sources.Source]],
    *,
    words: processor.Processor | None,
    limit_pixels: int,
) -> list[Part]:
    """Read data sets; wrong rows are reported, whatever their number.

    Args:
      given: each source with its name.
      words: counts tokens; None: nothing does.

    Raises:
      InputError: a source cannot be read at all.
    """
    parts = []
    for number, (name, source) in enumerate(given):
        rules = validate.Rules(
            max_bad_rows=_MANY,
            count_tokens=_describer(number, words),
            max_tokens=_MANY,
            limit_pixels=limit_pixels,
        )
        try:
            opened = sources.open_source(source, rules, cache_dir=None)
            rows, report = opened.rows, opened.report
        except validate.WrongRows as error:
            # No row is right, which is a finding as well.
            rows, report = (), error.report
        facts = [
            dataclasses.replace(described, number=i)
            for i, (_, described) in enumerate(report.counted)
        ]
        parts.append(Part(name=name, rows=rows, report=report, facts=facts))
    return parts


def _describer(
    source: int, words: processor.Processor | None
) -> Callable[[records.Row], tuple[int, Facts]]:
    """Return a function for `validate.Rules.count_tokens`; it is called in threads."""

    def describe(row: records.Row) -> tuple[int, Facts]:
        try:
            seen = tuple(pictures.look_at(image) for image in records.get_images(row))
            tokens = None if words is None else _tokens(row, words)
        except errors.InputError as error:
            raise records.RowError("unprocessable", str(error)) from error
        given = texts.responses(row)
        whole = texts.whole_response(row)
        turns = _turns(row)
        is_prompt = isinstance(row, records.PromptRow)
        facts = Facts(
            id=row.id,
            source=source,
            number=-1,
            question=texts.question_key(records.get_question(row)),
            question_chars=len(records.get_question(row)),
            pictures=seen,
            num_turns=len(turns),
            has_system=bool(turns) and turns[0].role == "system",
            tokens=tokens,
            response_tokens=()
            if words is None
            else tuple(len(words.token_ids(text)) for text in given.values()),
            response_chars=tuple(len(text) for text in given.values()),
            has_end=tuple(texts.is_ended(text) for text in given.values()),
            cut=tuple(
                f"{name}: {reason}"
                for name, text in given.items()
                if (reason := texts.cut_reason(text)) is not None
            ),
            strict_ok=None if whole is None else tags.format_ok(whole, gate="strict"),
            official_ok=None if whole is None else tags.format_ok(whole, gate="official"),
            answer=None if whole is None else tags.answer_text(whole) or None,
            truth=row.ground_truth if is_prompt else None,
            equivalents=row.equivalent_answers if is_prompt else (),
            data_source=(row.data_source or "") if is_prompt else "",
        )
        return 0, facts

    return describe


def _turns(row: records.Row) -> tuple[records.Message, ...]:
    if isinstance(row, records.PairRow):
        return (records.Message(role="user", content=row.prompt),)
    return row.messages if isinstance(row, records.SFTRow) else row.prompt


def _tokens(row: records.Row, words: processor.Processor) -> int:
    is_whole = isinstance(row, records.SFTRow)
    media = records.get_media(row)
    size = encode.measure(_turns(row), media, words, add_generation_prompt=not is_whole)
    return size.tokens
