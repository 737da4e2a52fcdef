"""The published form of a benchmark, and the question that its reader makes of a row."""

import ast
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prism_jax.data import fields, pictures, prompts, records
from prism_jax.rewards.benchmarks import facts as facts_lib
from prism_jax.rewards.benchmarks import letters

Json = Any
Row = Mapping[str, Any]
# The system turn under which PRISM evaluates: that of training without its last line break.
# Source: PRISM scripts/eval/chat_template/qwen3vl_bridge_eval.jinja.
PRISM_SYSTEM = prompts.SYSTEM_PROMPT.rstrip("\n")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A question of a benchmark: what a policy is asked, and what its scorer knows."""

    id: str
    user: str  # with a mark for each picture
    images: tuple[records.Image, ...]
    kind: str  # by which accuracies are listed
    answer: str
    judged_question: str  # as a model that judges answers reads it
    answer_type: str = ""
    choices: tuple[str, ...] = ()
    precision: int | None = None
    group: Mapping[str, str] = dataclasses.field(default_factory=dict)
    system: str | None = None  # replaces the protocol's system turn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """The published form of a benchmark."""

    name: str
    published: str  # on the hub
    split: str  # begins the names of its files
    folders: tuple[str, ...] | None  # that may hold them; None: any
    columns: frozenset[str]  # that every row has
    optional: frozenset[str]
    max_tokens: Mapping[facts_lib.Protocol, int]  # of a response
    read: Callable[[Row, facts_lib.Protocol, records.Place], Question]
    # Returns the first problem among the groups of all questions, None without one.
    problem: Callable[[Sequence[Mapping[str, str]]], str | None] = lambda _: None

    def parse(
        self, row: Row, *, place: records.Place, protocol: facts_lib.Protocol
    ) -> records.PromptRow:
        """Return a row as a prompt with the facts for its scorer.

        Raises:
          RowError: a column is missing or unknown, or has a value that it cannot have.
        """
        self._check_columns(row)
        question = self.read(row, protocol, place)
        facts = facts_lib.Facts(
            name=self.name,
            protocol=protocol,
            question=question.judged_question,
            answer=question.answer,
            answer_type=question.answer_type,
            choices=question.choices,
            precision=question.precision,
            group=question.group,
            max_tokens=self.max_tokens[protocol],
        )
        system = question.system
        if system is None and protocol == "prism":
            system = PRISM_SYSTEM
        turns = [] if system is None else [records.Message(role="system", content=system)]
        return records.PromptRow(
            id=question.id,
            source=self.name,
            prompt=(*turns, records.Message(role="user", content=question.user)),
            images=question.images,
            teacher_response=None,
            teacher_caption=None,
            teacher_cot=None,
            data_source=self.name,
            ground_truth=question.answer,
            equivalent_answers=(),
            extra_info={"question_type": question.kind, facts_lib.KEY: facts.to_json()},
        )

    def _check_columns(self, row: Row) -> None:
        missing = sorted(self.columns - row.keys())
        if missing:
            raise records.RowError("missing_column", f"column {missing[0]!r} is missing")
        unknown = sorted(row.keys() - self.columns - self.optional)
        if unknown:
            raise records.RowError(
                "unknown_column",
                f"column {unknown[0]!r} is not one of {self.published}, got "
                f"{fields.show(row[unknown[0]])}",
            )


def text(row: Row, name: str) -> str:
    """Return a column's text, which may not be blank; a whole number is read as text."""
    value = row[name]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if fields.is_blank(value):
        raise records.RowError("empty", f"column {name!r} is empty")
    return fields.check_text(value, name)


def optional_text(row: Row, name: str) -> str:
    """Return a column's text, "" if it is blank or not there."""
    return fields.optional_text(row, name) or ""


def one_of(row: Row, name: str, allowed: Sequence[str]) -> str:
    """Return a column's text, which must be one of these."""
    value = text(row, name)
    if value not in allowed:
        raise records.RowError(
            "unknown_value", f"{name} must be one of {', '.join(allowed)}, got {value!r:.80}"
        )
    return value


def image(row: Row, name: str) -> records.Image:
    """Return a column's picture."""
    if fields.is_blank(row[name]):
        raise records.RowError("no_image", f"column {name!r} has no picture")
    return pictures.read(row[name], name)


def texts(value: Any, name: str) -> tuple[str, ...]:
    """Return a list of texts; an empty one or None has none."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise records.RowError("bad_type", f"{name} must be a list, got {fields.show(value)}")
    if len(value) > len(letters.ALPHABET):
        raise records.RowError("unknown_value", f"{name} has {len(value)} texts, at most 26 fit")
    return tuple(fields.check_text(item, f"{name}[{i}]") for i, item in enumerate(value))


def texts_as_text(row: Row, name: str) -> tuple[str, ...]:
    """Return the texts of a list that is written as text, as MMMU writes its options."""
    value = text(row, name)
    try:
        content = ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise records.RowError(
            "bad_type", f"{name} must be a list as text, got {value!r:.80}"
        ) from error
    if not isinstance(content, list):
        raise records.RowError("bad_type", f"{name} must be a list as text, got {value!r:.80}")
    return tuple(str(item) for item in content)


def letter(row: Row, name: str, choices: Sequence[str]) -> str:
    """Return the letter of one of the choices."""
    if not 0 < len(choices) <= len(letters.ALPHABET):
        raise records.RowError("unknown_value", f"{len(choices)} options, must be 1 to 26")
    return one_of(row, name, tuple(letters.ALPHABET[: len(choices)]))


def listed(choices: Sequence[str], form: str) -> str:
    """Return the choices, a line each, in a form such as `{}. {}`."""
    return "\n".join(form.format(*pair) for pair in zip(letters.ALPHABET, choices, strict=False))


def unmarked(value: str) -> str:
    """Return a question's text, which may not hold the mark of a picture."""
    if records.IMAGE_MARK in value:
        raise records.RowError(
            "placeholders", f"a question holds {records.IMAGE_MARK}, which stands for a picture"
        )
    return value


def shown(images: Sequence[records.Image], value: str) -> str:
    """Return a text behind the marks of its pictures."""
    return records.IMAGE_MARK * len(images) + unmarked(value)
