"""Responses of a policy: cut into segments, and judged."""

import collections
import json
import math
import pathlib
import random
import re

from prism_jax.rewards import answer, score, symbolic, tags
from tests.fuzz import mutations
from tests.fuzz.target import BrokenError, Target, require

_ANSWERS = pathlib.Path(__file__).parents[1] / "rewards/answers.jsonl"
_TAGS = [tag.encode() for tag in tags.TAGS]
_PIECES = [
    *(bytes([byte]) for byte in range(256)), *_TAGS, b"><", b"</cap", b"tion>", b"caption>", b"\n",
    b" ", b"  \n", b"ab", b"\xe2\x80", b"\xa8", b"</caption><think>", b"</think>\n<answer>",
    b"\xef\xbf\xbd", b"", b"<caption", b"</answer></answer>", b"\x1c", b"\xc2\x85", b"\xf0\x9f",
]  # fmt: skip
_TABLE = [*_PIECES, b"<|im_end|>", b"<|endoftext|>"]
_ENDS = (len(_PIECES), len(_PIECES) + 1)
_TOKEN_OF = {piece: number for number, piece in enumerate(_TABLE)}
_GATES: tuple[tags.Gate, ...] = ("strict", "official", "geo3k")
_ORACLE_CHARS = 400


class Segments(Target):
    """Tokens to segments behind the three gates.

    The released expression is the oracle of the official gate. It takes cubic time, so only short
    texts are compared. Source: PRISM verl/verl/utils/reward_score/mm_gad_no_llm.py:21.
    """

    weight = 8.0
    num_short = 400
    released = re.compile(
        r"\s*<caption>.*?</caption>\s*<think>.*?</think>\s*<answer>.*?</answer>\s*", re.DOTALL
    )

    def make(self, rng: random.Random) -> list[int]:
        """Return tokens: tags with little between them, or anything."""
        if rng.random() < 0.7:
            tokens = self._near_format(rng)
        else:
            start = rng.choice((0, 256))
            length = rng.choice((0, 1, 6, 30, 400))
            tokens = [rng.randrange(start, len(_TABLE)) for _ in range(length)]
        return tokens * 2000 if rng.random() < 0.0005 else tokens

    def _near_format(self, rng: random.Random) -> list[int]:
        tokens: list[int] = []
        for tag in _TAGS:
            is_one_token = rng.random() < 0.8
            tokens += [_TOKEN_OF[tag]] if is_one_token else [_TOKEN_OF[bytes([b])] for b in tag]
            count = rng.choice((0, 0, 1, 1, 3))
            tokens += [rng.randrange(len(_PIECES)) for _ in range(count)]
        for _ in range(rng.choice((0, 0, 1, 2))):
            at = rng.randrange(len(tokens) + 1)
            tokens[at : at + rng.randrange(3)] = [rng.randrange(len(_TABLE))]
        tokens += [rng.choice(_ENDS)] if rng.random() < 0.9 else []
        return tokens + [0] * rng.choice((0, 0, 3))

    def run(self, given: list[int]) -> None:
        """Compare counts of tokens and characters with the text, and gates with one another."""
        accepted = {}
        for gate in _GATES:
            cut = tags.segment(given, bytes_of_token=_TABLE, end_tokens=_ENDS, gate=gate)
            accepted[gate] = cut.format_ok
            self._check_segments(cut, given)
            if gate == "official" and len(cut.text) < _ORACLE_CHARS:
                is_released = bool(self.released.fullmatch(cut.text))
                same = tags.format_ok(cut.text, gate=gate) == is_released
                require(same, "the official gate differs from the released expression")
        require(accepted["official"] or not accepted["strict"], "strict accepts, official does not")
        require(accepted["geo3k"] or not accepted["official"], "official accepts, geo3k does not")
        tags.answer_text(cut.text)
        caption, cot = tags.split_text(cut.text)
        require(caption + cot in ("", cut.text), "split_text loses text")

    def _check_segments(self, cut: tags.Segments, given: list[int]) -> None:
        if not cut.format_ok:
            counts = cut.caption_tokens, cut.cot_tokens, cut.caption_chars
            require(not any(counts) and not cut.cot, "an invalid response has segments")
            return
        require(cut.caption + cut.cot == cut.text, "caption and cot are not the text")
        num_tokens = cut.caption_tokens + cut.cot_tokens
        require(num_tokens == cut.response_tokens, "the segments' tokens are not the response's")
        require(cut.caption.endswith(tags.CAPTION_END), "the caption ends elsewhere")
        require(min(cut.caption_tokens, cut.cot_tokens) >= 1, "an empty segment")
        head = [_TABLE[token] for token in given[: cut.caption_tokens]]
        tag = tags.CAPTION_END.encode()
        require(tag in b"".join(head), "the caption's tokens do not complete </caption>")
        require(tag not in b"".join(head[:-1]), "the caption is a token too long")


_ANSWER_PIECES = [
    "1", "2", "0", "12", "3.14", "1,234", "1/2", "\\frac{1}{2}", "\\frac{", "{", "}", "(", ")",
    "[", "]", "\\{", "\\}", ",", ";", " ", "  ", "\n", "=", "<", ">", "\\le", "\\ge ", "x", "y",
    "A", "B", "C.", "(D)", "E)", "or", " or ", " and ", " is ", " not ", "the answer is ", "°", "%",
    "$", "\\$", "€", "cm", "kg", " m/s^2", "\\text{", "\\mathrm{cm}", "\\sqrt{2}", "sqrt(", "^",
    "_", "\\pm", "±", "π", "\\pi", "\\infty", "\\cup", "\\boxed{", "\\left(", "\\right)", "**", "*",
    "`", '"', "'", "0.5", "1e5", "1e400", "e", "10^{400}", "10^-400", "×10^", "9" * 30, "½", "²",
    "⁻", "₀", "①", "٣", "二", "米", "yes", "no", "true", "12:30", "pm", "2020-01-01", "January 5",
    "1990s", "half", "two thirds", "million", "hundred", "\\begin{pmatrix}", "\\end{pmatrix}", "&",
    "\\\\", "\\overline{3}", "0.1\\overline{6}", "\\angle", "ABC", "\\triangle", "sin", "\\", "\0",
    "\ud800", "\u200b", "\xa0", "\x85", "~", "!", "?", ":", "/", "|", "-", "+", "--", "...", ".",
    "(i)", "(1)", "(2)", "1)", "2)", "A,B", "from ", " to ", "about ", "approximately ",
    "\\approx", "≈", "f(x)=", "x=", "\\in", "P(", "<caption>", "</answer>", "答案是", "所以", "选",
    " per ", "square ", "approx.", "a ", "Therefore, ", "x" * 40, " " * 40, "(" * 40, "a b " * 20,
    "1," * 30, "\\frac{1}{" * 10, "####", "~~", "```", "<b>", "\\textcolor{red}{", "K", "Ff", "CO",
    "inf", "\\perp", "⊥", "≅", "∥", "\\cong", "[[1,2],[3,4]]", "both ", "neither ", "point ", "||",
    '{"target": ', '["', '"]', "\u2028", "\x0b", "5!", "!!", "mod ", "\\%", "{,}", "\\!", "\\,",
    "matrix", "\\begin{array}{cc}", "\\end{array}", "\\operatorname{", "\\cdot", "\\times", "∪",
]  # fmt: skip
_SOURCES = ("mm_gad", "math-77k", "visual_logic-26k", score.GEOMETRY_SOURCE, "")


class MathematicsNeeded(BaseException):
    """The fast rules hand on to math-verify; not an Exception, so that nothing swallows it."""


def no_mathematics(method: str, given: str, truth: str) -> bool:
    """Stand in for math-verify where only the rules in the trainer's process are tried."""
    raise MathematicsNeeded


class Strict(Target):
    """The fast rules of the strict judge, which run in the trainer's process."""

    weight = 6.0
    num_short = 300
    judge: score.Judge = "strict"

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        rows = [json.loads(line) for line in _ANSWERS.read_text("utf-8").splitlines()]
        self._texts = sorted({row[name] for row in rows for name in ("answer", "truth")})
        self.rule = score.Rule(judge=self.judge, accuracy_weight=0.8, format_weight=0.2)

    def make(self, rng: random.Random) -> list:
        """Return answer, truth, equivalent answers and the row's data source."""
        given = self._text(rng)
        truth = given if rng.random() < 0.15 else self._text(rng)
        if rng.random() < 0.2:
            middle = len(truth) // 2
            truth = truth[:middle] + rng.choice(_ANSWER_PIECES) + truth[middle:]
        count = rng.choice((0, 0, 0, 1, 2))
        equivalents = [self._text(rng) for _ in range(count)]
        return [rng.choice(_SOURCES), equivalents, truth[:1100], given]

    def _text(self, rng: random.Random, *, limit: int = answer.MAX_CHARS - 1) -> str:
        kind = rng.random()
        if kind < 0.35:
            return rng.choice(self._texts)[:limit]
        if kind < 0.6:
            return mutations.text(rng, rng.choice(self._texts), _ANSWER_PIECES)[:limit]
        if kind < 0.9:
            length = rng.choice((1, 2, 3, 5, 9, 20, 80))
            return "".join(rng.choice(_ANSWER_PIECES) for _ in range(length))[:limit]
        unit = "".join(rng.choice(_ANSWER_PIECES) for _ in range(rng.choice((1, 1, 2, 3))))
        body = unit * (limit // max(1, len(unit)))
        start, end = rng.choice(("", "(", "{", "x=", "A ")), rng.choice(("", ")", "}", "!"))
        return (start + body)[: limit - 1] + end

    def run(self, given: list) -> None:
        """Grade; the reward is a number from 0 to 1 and never stands for an error."""
        source, equivalents, truth, text = given
        answer.check_ground_truth(truth)
        task = score.Task(
            response=f"<caption>c</caption><think>t</think><answer>{text}</answer>",
            ended=True,
            ground_truth=truth,
            equivalent_answers=tuple(equivalents),
            data_source=source,
        )
        try:
            graded = score.grade(task, self.rule, no_mathematics)
        except MathematicsNeeded:
            return
        require(math.isfinite(graded.total) and 0 <= graded.total <= 1, "no reward from 0 to 1")
        require(graded.reason is not score.Reason.ERROR, "an error as a verdict")


class Official(Strict):
    """The released rules, likewise."""

    judge = "official"


class Mathematics(Strict):
    """Both judges with math-verify, as the judging processes run them.

    A process that takes too long is killed by the pool: such inputs are only counted.
    """

    weight = 1.0
    num_short = 12
    is_slow_allowed = True

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        self.counts: collections.Counter[str] = collections.Counter()
        symbolic.verify("expression", "x+1", "1+x")  # loads grammars

    def make(self, rng: random.Random) -> list:
        """Return the same with short texts, and the judge."""
        source, equivalents, truth, given = super().make(rng)
        short = [text[:80] for text in (truth, given)]
        return [rng.choice(("strict", "official")), source, equivalents, *short]

    def run(self, given: list) -> None:
        """Judge; the strict judge never raises."""
        judge, source, equivalents, truth, text = given
        question = score.Question(
            answer=text,
            ground_truth=truth,
            equivalent_answers=tuple(equivalents),
            data_source=source,
            judge=judge,
        )
        try:
            self.counts[score.judge(question, symbolic.verify).value] += 1
        except (RecursionError, MemoryError):
            raise
        except Exception as error:
            # The released judge is kept as it was, failures of its library included.
            if judge == "strict":
                raise BrokenError(f"{type(error).__name__}: {error}") from error
            self.counts[f"official: {type(error).__name__}"] += 1
