"""Compare two cleaned texts, both read as the same, most plausible kind of value."""

import re

from prism_jax.rewards import (
    answer_official,
    choices,
    equations,
    expressions,
    geometry,
    matrices,
    phrases,
    quantities,
    ratios,
    sets,
    solutions,
    structure,
    times,
)

# A more deeply nested tuple cannot be an answer.
_MAX_DEPTH = 4
# A bound on the cost of an answer's comparisons, in characters, for lists of lists.
_MAX_EFFORT = 45_000
_EFFORT_PER_COMPARISON = 100
# A longer text is a sentence, which may say the same in other words.
_MAX_NAME_WORDS = 4
_WORD = re.compile(r"[A-Za-z\d]+")
_ARTICLE = re.compile(r"^(?:[Aa]n?|[Tt]he) (?!and |or )")
_ALL_OR_NONE = re.compile(r"\b(all|none) of (?:these|them|the (?:above|options|choices))\b", re.I)
_NEGATIONS = frozenset(("not", "no", "never", "neither", "nor", "none"))
_JOINING_WORDS = frozenset("and or of the a an to in on it is are both not no".split())
_REASON = re.compile(r"(?:because|since|as|so|by|from|for|due|given|it|this|that|which)\b", re.I)
_INFINITE = ("\\infty", "-\\infty", "- \\infty")


class Comparison:
    """A comparison of texts with `mathematics` and a bounded effort.

    Exceptions of `mathematics` pass through.
    """

    def __init__(self, mathematics: answer_official.Mathematics):
        self.mathematics = mathematics
        self._effort = _MAX_EFFORT

    def same(self, answer: str, truth: str, depth: int = 0) -> bool:
        """Compare two cleaned texts."""
        self._effort -= _EFFORT_PER_COMPARISON + len(answer) + len(truth)
        if depth > _MAX_DEPTH or not answer or not truth or self._effort < 0:
            return False
        answer, truth = answer.strip(), truth.strip()
        if answer == truth:
            return True
        for decide in (self._same_words, self._same_figure, self._same_numbers):
            decided = decide(answer, truth, depth)
            if decided is not None:
                return decided
        answer, truth = map(_unwrapped, geometry.without_names(answer, truth))
        return self._same_parts_or_value(answer, truth, depth)

    def contradicts(self, answer: str, truth: str) -> bool:
        """Return whether the text of an option is another option's, both cleaned.

        A remark, such as a reason, contradicts nothing. Another value does, and a few words if
        each side has a word that the other has not.
        """
        if not answer or self.same(answer, truth):
            return False
        is_figure = geometry.same(answer, truth) is not None
        if is_figure or all(_is_value(text) for text in (answer, truth)):
            return True
        texts = [_ALL_OR_NONE.sub(r"\1", _ARTICLE.sub("", text)) for text in (answer, truth)]
        words = [_WORD.findall(text) for text in texts]
        if any(len(one) > _MAX_NAME_WORDS for one in words) or _REASON.match(answer):
            return False
        symbols = [
            {
                word.lower()
                for word in one
                if word.lower() in _NEGATIONS or not re.search("[a-z]", word)
            }
            for one in words
        ]
        names = [{word.lower() for word in one} - _JOINING_WORDS for one in words]
        return symbols[0] != symbols[1] or all((names[0] - names[1], names[1] - names[0]))

    def _same_words(self, answer: str, truth: str, depth: int) -> bool | None:
        del depth
        by_yes_no = phrases.yes_no(answer, truth)
        if by_yes_no is not None:
            return by_yes_no
        by_statements = choices.same_statements(answer, truth)
        if by_statements is not None:
            return by_statements
        dates = times.date(answer), times.date(truth)
        if any(dates):
            return dates[0] == dates[1]
        if not re.search(r"\d", answer + truth) and phrases.same(answer, truth):
            return True
        return None

    def _same_figure(self, answer: str, truth: str, depth: int) -> bool | None:
        by_geometry = geometry.same(answer, truth)
        if by_geometry is not None:
            return by_geometry
        return matrices.same(answer, truth, lambda a, t: self.same(a, t, depth + 1))

    def _same_numbers(self, answer: str, truth: str, depth: int) -> bool | None:
        """Compare sets of numbers and infinity."""
        if answer in _INFINITE or truth in _INFINITE:
            given, wanted = (equations.name_and_value(text)[1] for text in (answer, truth))
            return given.replace("- ", "-").strip() == wanted.replace("- ", "-").strip()
        return sets.same(answer, truth, lambda a, t: self.same(a, t, depth + 1))

    def _same_parts_or_value(self, answer: str, truth: str, depth: int) -> bool:
        given, wanted = structure.readings(answer), structure.readings(truth)
        if given and wanted and structure.is_single(answer) and not structure.is_single(truth):
            return False  # `1,234` may be a number as well as the two of `(1,234)`
        if any(self._same_parts(a, t, depth) for a in given for t in wanted):
            return True
        # A text that can only be read as several values is never a single value.
        for text, readings in ((answer, given), (truth, wanted)):
            if readings and quantities.parse(text) is None and not structure.is_single(text):
                return not re.search(r"\d", truth) and phrases.same(answer, truth)
        return self._same_value(answer, truth, depth)

    def _same_parts(self, answer: structure.Parts, truth: structure.Parts, depth: int) -> bool:
        if answer.brackets == truth.brackets == "{}":
            return self._same_sets(answer.items, truth.items, depth)
        if len(answer.items) != len(truth.items) or not _brackets_agree(answer, truth):
            return False
        answer, truth = solutions.named_alike(answer, truth)
        if _is_or(answer) != _is_or(truth) and not _are_solutions(answer.items + truth.items):
            return False
        of_one_unknown = [solutions.is_of_one_unknown(parts) for parts in (answer, truth)]
        if any(of_one_unknown) and "()" in (answer.brackets, truth.brackets):
            return False  # one value, not the coordinates of a point
        is_free = of_one_unknown[1] and not answer.is_numbered and answer.brackets != "[]"
        if is_free or solutions.are_conditions(answer, truth):
            return self._same_in_any_order(answer.items, truth.items, depth)
        named = [
            dict(equations.name_and_value(item) for item in parts.items)
            for parts in (answer, truth)
        ]
        is_named = ["" not in one and len(one) == len(truth.items) for one in named]
        if all(is_named):
            return named[0].keys() == named[1].keys() and all(
                self.same(value, named[1][name], depth + 1) for name, value in named[0].items()
            )
        if any(is_named):
            in_order = solutions.in_order_of_names(answer, truth)
            if in_order is None:
                return False
            answer, truth = in_order
        points = [{geometry.name(item): item for item in parts.items} for parts in (answer, truth)]
        if all("" not in one and len(one) == len(truth.items) for one in points):
            return points[0].keys() == points[1].keys() and all(
                self.same(point, points[1][name], depth + 1) for name, point in points[0].items()
            )
        # The order of alternatives never counts: `2, 1` for `1 or 2`.
        is_ordered = truth.ordered or answer.is_numbered or (answer.ordered and not _is_or(truth))
        if is_ordered and "{}" not in (answer.brackets, truth.brackets):
            pairs = zip(answer.items, truth.items, strict=True)
            return all(self.same(a, t, depth + 1) for a, t in pairs)
        return self._same_in_any_order(answer.items, truth.items, depth)

    def _same_sets(self, answers: tuple[str, ...], truths: tuple[str, ...], depth: int) -> bool:
        """Compare sets; an element that an answer repeats counts once.

        A truth that repeats one may be a list of data, and is compared with its repetitions.
        """
        if len(answers) <= len(truths):
            return self._same_in_any_order(answers, truths, depth)
        first = [
            next((i for i, truth in enumerate(truths) if self.same(given, truth, depth + 1)), None)
            for given in answers
        ]
        return None not in first and len(set(first)) == len(truths)

    def _same_in_any_order(
        self, answers: tuple[str, ...], truths: tuple[str, ...], depth: int
    ) -> bool:
        unused, unmatched = list(answers), []
        for truth in truths:
            if truth in unused:
                unused.remove(truth)
            else:
                unmatched.append(truth)
        for truth in unmatched:
            partner = next((a for a in unused if self.same(a, truth, depth + 1)), None)
            if partner is None:
                return False
            unused.remove(partner)
        return True

    def _same_value(self, answer: str, truth: str, depth: int) -> bool:
        """Compare two texts that are not lists."""
        decided = times.same(answer, truth)
        if decided is None:
            decided = ratios.same(answer, truth, lambda a, t: self.same(a, t, depth + 1))
        if decided is not None:
            return decided
        if times.is_time(answer) or times.is_time(truth):
            return False
        if _without_blanks(answer) == _without_blanks(truth):
            return True
        given, wanted = quantities.parse(answer), quantities.parse(truth)
        if given is not None and wanted is not None:
            return quantities.equal(given, wanted)
        if equations.is_equation(answer) or equations.is_equation(truth):
            return equations.same(answer, truth, self, depth)
        if phrases.same(answer, truth):
            return True
        return self.same_expression(answer, truth)

    def same_expression(self, answer: str, truth: str) -> bool:
        """Compare with math-verify, if both texts are expressions."""
        if quantities.parse(truth) is not None and expressions.has_prose(answer):
            return False  # read as a product of letters, `not 0` would be 0
        both = expressions.comparable(answer, truth)
        return both is not None and self.mathematics("expression", *both)


def _is_value(text: str) -> bool:
    """Return whether a text is a number, an expression, a point, a ratio, a time or a verdict."""
    is_number = quantities.parse(text) is not None or expressions.is_expression(text)
    is_of_time = times.is_time(text) or times.same(text, text)
    return bool(is_number or is_of_time or ratios.is_ratio(text) or phrases.yes_no(text, text))


def _without_blanks(text: str) -> str:
    """Drop the blanks before a unit and around the hyphen of a range: `300 K` is `300K`."""
    return re.sub(r"(?<=\d) (?=[A-Za-z%°])", "", re.sub(r"(?<=\d) - (?=\d)", "-", text))


def _unwrapped(text: str) -> str:
    text = re.sub(r"^[A-Za-z]\s*\\in\b\s*(?=[(\[{\\])", "", text)
    inner, brackets = structure.unwrap(text)
    is_one = brackets in ("()", "{}", "[]") and not re.search(r"[,;]|\\emptyset", inner)
    return inner if is_one else text


def _is_or(parts: structure.Parts) -> bool:
    return not parts.ordered and not parts.brackets


def _are_solutions(items: tuple[str, ...]) -> bool:
    """Return whether "or" and "and" mean the same between items: between numbers of one name.

    `cat or dog` is not `cat and dog`, and `x > 0 or y > 0` not `x > 0 and y > 0`.
    """
    names = {equations.name_and_value(item)[0] or geometry.name(item) for item in items} - {""}
    if len(names) > 1 or any(expressions.RELATION.search(item) for item in items):
        return False
    return bool(re.search(r"\d", "".join(items)))


def _brackets_agree(answer: structure.Parts, truth: structure.Parts) -> bool:
    """Allow missing brackets, except of alternatives and of an interval with a closed end."""
    if answer.brackets == truth.brackets:
        return True
    pair = (answer.brackets or truth.brackets) in ("()", "[]")
    if pair and any(not parts.brackets and not parts.ordered for parts in (answer, truth)):
        return False  # `2 or 3` is not the point (2,3)
    if answer.brackets and truth.brackets:
        return False
    return (answer.brackets or truth.brackets) in ("()", "{}", "[]")
