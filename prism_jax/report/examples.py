"""A few prompts with the response of each stage, as a part of the page.

Segments of a response are coloured, text outside of them is plain.
"""

import base64
import dataclasses
import html
import re
from collections.abc import Mapping, Sequence

from prism_jax.report import results

_SEGMENT = re.compile(r"<(caption|think|answer)>.*?</\1>", re.DOTALL)
# Characters that HTML forbids, and lone surrogates, which UTF-8 cannot encode.
_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_VERDICTS = {
    "correct": "correct",
    "wrong": "wrong",
    "format": "wrong format",
    "no_answer": "no answer",
    "too_long": "answer too long",
    "timeout": "judge ran out of time",
    "error": "judge failed",
}
# Small pictures are enlarged up to this width.
_SHOWN_PIXELS = 224


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture as PNG, and its size in pixels."""

    png: bytes
    width: int
    height: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Response:
    """A stage's response and the judge's verdict."""

    text: str
    reason: str  # of `rewards.score.Reason`
    ended: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt, and the responses of the evaluated stages."""

    id: str
    question_type: str | None
    question: str | None  # None: the test split no longer exists
    ground_truth: str | None
    pictures: Sequence[Picture]
    has_pictures: bool  # False: the test split no longer exists
    responses: Mapping[str, Response]  # by stage


def draw(example: Example) -> str:
    """Return an example as HTML."""
    kind = example.question_type
    shown_kind = "" if kind is None else f' <span class="note">{clean(kind)}</span>'
    question = example.question
    shown = "the question is not there any more" if question is None else question
    truth = "" if example.ground_truth is None else clean(example.ground_truth)
    responses = "".join(_response(stage, example.responses.get(stage)) for stage in results.STAGES)
    return (
        f'<article class="card example"><div class="question">{_pictures(example)}<div>'
        f"<h3>{clean(shown)}</h3><p>Answer: <b>{truth}</b>{shown_kind}</p></div></div>"
        f'<div class="stages">{responses}</div></article>'
    )


def clean(text: str) -> str:
    """Return text escaped for HTML, with a mark for characters that HTML forbids."""
    return html.escape(_FORBIDDEN.sub("\ufffd", text.replace("\r", "\n")))


def coloured(text: str) -> str:
    """Return a response as HTML with its segments marked."""
    parts, end = [], 0
    for match in _SEGMENT.finditer(text):
        parts.append(clean(text[end : match.start()]))
        parts.append(f'<span class="{match[1]}">{clean(match[0])}</span>')
        end = match.end()
    return "".join(parts) + clean(text[end:])


def _pictures(example: Example) -> str:
    if not example.has_pictures:
        return '<div class="no-picture">the picture is not there any more</div>'
    return pictures(example.pictures, about=example.question or example.id)


def pictures(shown: Sequence[Picture], *, about: str) -> str:
    """Return pictures as HTML; `about` is the plain text of their question."""
    parts = []
    for number, picture in enumerate(shown, start=1):
        factor = max(1, _SHOWN_PIXELS // picture.width)
        data = base64.b64encode(picture.png).decode()
        parts.append(
            f'<img src="data:image/png;base64,{data}" width="{factor * picture.width}" '
            f'height="{factor * picture.height}" alt="Picture {number} of the question below: '
            f'{clean(about)}">'
        )
    return "".join(parts)


def _response(stage: str, response: Response | None) -> str:
    if response is None:
        return (
            f'<section class="response"><h4>{clean(stage)}</h4>'
            '<p class="absent-value">not run</p></section>'
        )
    kind = "good" if response.reason == "correct" else "bad"
    verdict = _VERDICTS.get(response.reason, response.reason)
    cut = "" if response.ended else ' <span class="note">cut by the limit of tokens</span>'
    return (
        f'<section class="response"><h4>{clean(stage)} '
        f'<span class="verdict {kind}">{clean(verdict)}</span>{cut}</h4>'
        f'<pre tabindex="0" aria-label="response of {clean(stage)}">{coloured(response.text)}</pre>'
        "</section>"
    )
