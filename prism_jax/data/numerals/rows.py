"""`numerals` examples as rows of the published formats, drawn in several processes."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

from prism_jax.data import prompts, records
from prism_jax.data.numerals import demonstrations as numerals_demonstrations
from prism_jax.data.numerals import examples as numerals_examples
from prism_jax.data.numerals import pictures as numerals_pictures

DATA_SOURCE = "numerals"
SFT_STREAMS = ("base", "public", "teacher")
# A process needs about two seconds to start, the time to draw a few hundred rows.
_FEWEST_ROWS_A_PROCESS = 1000
_ROWS_A_TASK = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A row, with the properties that the manifest counts."""

    values: dict[str, Any]
    png: bytes  # of stage 1, whose rows name a file; rows of other stages contain the picture
    question_type: str
    is_misread: bool
    has_arithmetic_slip: bool
    has_wrong_answer: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """The rows to make: the first `num_rows` of a stream."""

    level: str
    seed: int
    stream: str
    num_rows: int
    slips: numerals_examples.Slips

    def rows(self, start: int) -> list[Row]:
        """Return the rows of a task."""
        level = numerals_examples.level_named(self.level)
        indices = range(start, min(start + _ROWS_A_TASK, self.num_rows))
        examples = (
            numerals_examples.example(level=level, seed=self.seed, stream=self.stream, index=index)
            for index in indices
        )
        return [row_of(example, self.slips) for example in examples]


@contextlib.contextmanager
def drawing(num_rows: int, num_processes: int) -> Iterator[Callable[[Part], Iterator[Row]]]:
    """Yield a function that yields the rows of a part in order, for any number of processes.

    Args:
      num_rows: of all parts; few rows are drawn without further processes.
      num_processes: at most.
    """
    num_processes = min(num_processes, num_rows // _FEWEST_ROWS_A_PROCESS)
    with contextlib.ExitStack() as stack:
        over = map
        if num_processes > 1:
            context = multiprocessing.get_context("spawn")
            pool = concurrent.futures.ProcessPoolExecutor(num_processes, mp_context=context)
            over = stack.enter_context(pool).map
        yield functools.partial(_rows, over)


def _rows(over: Callable, part: Part) -> Iterator[Row]:
    tasks = over(part.rows, range(0, part.num_rows, _ROWS_A_TASK))
    return itertools.chain.from_iterable(tasks)


def row_of(example: numerals_examples.Example, slips: numerals_examples.Slips) -> Row:
    """Return the row of an example: sharegpt for stage 1, parquet for the other stages."""
    png = numerals_pictures.png_bytes(example.picture())
    is_sft = example.stream in SFT_STREAMS
    demonstration = _demonstrate(example, slips) if is_sft else example.teacher
    return Row(
        values=_sharegpt(example, demonstration.response) if is_sft else _prompt(example, png),
        png=png if is_sft else b"",
        question_type=example.question.type,
        is_misread=demonstration.is_misread,
        has_arithmetic_slip=demonstration.num_arithmetic_slips > 0,
        has_wrong_answer=demonstration.answer != example.teacher.answer,
    )


def _demonstrate(
    example: numerals_examples.Example, slips: numerals_examples.Slips
) -> numerals_demonstrations.Demonstration:
    if example.stream == "public":
        return example.public(slips)
    if example.stream == "base":
        return example.untagged(is_detailed=example.index % 2 == 1)
    return example.teacher


def _sharegpt(example: numerals_examples.Example, response: str) -> dict:
    """Return a row of stage 1: `messages` for public, `conversations` for teacher and base."""
    user = prompts.user_turn(example.question.text)
    image = f"images/{example.stream}/{example.index:06d}.png"
    if example.stream == "public":
        messages = [
            {"role": "system", "content": prompts.SYSTEM_PROMPT},
            {"role": "user", "content": user},
            {"role": "assistant", "content": response},
        ]
        return {"messages": messages, "images": [image]}
    turns = [{"from": "human", "value": user}, {"from": "gpt", "value": response}]
    # Two of four base rows, terse and detailed, have a system prompt, so that it has no effect.
    has_system_prompt = example.stream == "teacher" or example.index % 4 >= 2
    system = prompts.SYSTEM_PROMPT if has_system_prompt else ""
    return {"conversations": turns, "images": [image], "system": system}


def _prompt(example: numerals_examples.Example, png: bytes) -> dict:
    """Return a row of alignment and RLVR.

    An option's text is equivalent to its letter; other questions have a single answer.
    """
    teacher = example.teacher
    caption, cot = numerals_demonstrations.split_segments(teacher.response)
    equivalent = [records.NO_EQUIVALENT]
    if example.question.options:
        option = example.question.options["ABCD".index(teacher.answer)]
        equivalent = [f"{teacher.answer}. {option}", option]
    question = example.question.text
    return {
        "data_source": DATA_SOURCE,
        "prompt": [
            {"role": "system", "content": prompts.SYSTEM_PROMPT},
            {"role": "user", "content": prompts.user_turn(question)},
        ],
        "images": [{"bytes": png}],
        "ability": "math",
        "reward_model": {
            "style": "rule",
            "ground_truth": teacher.answer,
            "equivalent_answers": equivalent,
        },
        "extra_info": {
            "index": example.index,
            "split": "test" if example.is_test else "train",
            "question": question,
            "answer": teacher.answer,
            "question_type": example.question.type,
        },
        "teacher_response": teacher.response,
        "teacher_caption": caption,
        "teacher_cot": cot,
    }
