"""Compare names and phrases, ignoring layout but not the case of symbols.

Words of three letters and more are compared without case. One or two letters are variables, units,
chemical symbols or genotypes, whose case has a meaning: `CO` is not `Co`.
"""

import re

_ELEMENTS = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br"
    " Kr Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho"
    " Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es"
    " Fm Md No Lr"
)
_FORMULA = re.compile(rf"(?:(?:{'|'.join(sorted(_ELEMENTS.split(), key=len, reverse=True))})\d*)+")
_GENOTYPE = re.compile(
    r"(?:([A-Za-z])(?i:\1)){1,6}|[Xx][A-Za-z][Xx][A-Za-z]|[Xx][A-Za-z][Yy]|[Xx][Yy]"
)
# Words of two letters, capital or not, that are not symbols of elements.
_SHORT_WORDS = frozenset("no up on go ox or of is to by do it me my we us an so if".split())
_TOKEN = re.compile(r"[A-Za-z\d]+")
_HYPHEN = re.compile(
    r"(?<=[A-Za-z]{2})-(?=[A-Za-z]{2})"
    r"|(?:(?<=\bcounter)|(?<=\banti)|(?<=\bnon)|(?<=\bsemi)) (?=[a-z]{4})",
    re.IGNORECASE,
)
# The case of a formula that has letters of both: `NaOH` is not `NAOH`.
_MIXED = re.compile(r"[A-Z][A-Za-z]*[A-Z][A-Za-z]*")
# `Fe2+` is an ion of charge 2, as no molecule of metals has a charge; `O2-` may be two things.
_METALS = (
    "Be Mg Ca Sr Ba Ra Al Ga In Tl Sn Pb Bi Sc Ti V Cr Mn Fe Co Ni Cu Zn Zr Mo Ru Rh Pd Ag Cd W Pt "
    "Au Hg La Ce Eu Gd"
)
_METAL_ION = re.compile(rf"((?:{'|'.join(_METALS.split())}))([234])\+")
_MOLECULE_ION = re.compile(r"([A-Z][a-z]?)_?\{?(\d)\}? ?\^ ?\{? ?(\d?[+-]) ?\}?")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_YES_NO = re.compile(r"(yes|no|true|false)(?: ?[,.;:!-]+\s*(?P<rest>.*))?", re.I | re.DOTALL)
_REASON = re.compile(r"[A-Za-z]+(?:, |\. |; )[A-Za-z]{2}")
_VERDICT = re.compile(r"\b(?:yes|no|true|false)\b", re.IGNORECASE)
_OPPOSITE = {"yes": "no", "no": "yes", "true": "false", "false": "true"}
_TAKEN_BACK = re.compile(
    r"\b(?:wait|sorry|actually|oops|correction|scratch|maybe|perhaps|unsure|hmm+"
    r"|not (?:sure|really|quite|exactly)|doubt|i meant?)\b",
    re.IGNORECASE,
)


def same(answer: str, truth: str) -> bool:
    """Compare two cleaned texts as phrases."""
    if answer.rstrip("!").endswith("?") and not truth.endswith("?"):
        return False  # a question
    given, wanted = _spelling(answer), _spelling(truth)
    if given.lower() != wanted.lower():
        # `counter-clockwise` may also be written as a single word.
        given, wanted = (_spelling(_HYPHEN.sub("", text)) for text in (answer, truth))
    if given == wanted:
        return bool(given) or answer == truth
    if given.lower() != wanted.lower():
        return False
    pairs = list(zip(_TOKEN.findall(given), _TOKEN.findall(wanted), strict=False))
    is_phrase = any(len(one) > 3 for one, _ in pairs)
    is_capital = is_phrase and (given.isupper() or wanted.isupper())
    return all(
        _case_agrees(one, other, is_phrase=is_phrase, is_capital=is_capital) for one, other in pairs
    )


def _spelling(text: str) -> str:
    """Return a phrase without its layout.

    Quotes, end punctuation, hyphens inside words, the points of abbreviations, the lowering of
    indices and a leading article are dropped; signs, decimal points, factorials and all characters
    between digits or single letters stay.
    """
    text = re.sub(r"\"|(?<=[^\d\s])[,;:](?=\s|$)", "", text)
    text = re.sub(r"(?<=[A-Za-z]{3})'(?=s\b)|(?<=[a-z]{3}s)'(?= )", "", text)
    if ion := _METAL_ION.fullmatch(text):
        return "{}^{}+".format(*ion.groups())
    if ion := _MOLECULE_ION.fullmatch(text):
        return "{}_{}^{}".format(*ion.groups())
    text = re.sub(r"(?<=[A-Za-z]{2})-(?=[A-Za-z]{2})|(?<=\b[A-Za-z])-(?=[A-Za-z]{3})", " ", text)
    text = re.sub(r"(?<=[A-Za-z)])_(?:\{(\d+)\}|(?=\d))", r"\1", text)
    # The charge of an ion: `Na^{+}` is `Na+`, but `O^{2-}` is not `O_2^-`.
    text = re.sub(r"(?<=[A-Za-z\d])\^ ?\{ ?(\d?[+-]) ?\}$", r"^\1", text)
    text = re.sub(r"(?<=[A-Za-z\d])\^(?=[+-]$)", "", text)
    text = re.sub(r"(?<=[A-Za-z])\.", "", text)
    text = re.sub(r"\s+", " ", text).strip(" ,;:")
    text = text if text.endswith("..") else text.removesuffix(".")
    marked = re.search(r"(?<![A-Za-z\\])([A-Za-z]{2,})[!?]{1,3}$", text)
    if marked and not _is_product(marked[1]):
        text = text[: marked.end(1)]
    return re.sub(r"^(?:an? (?=\S\S)|the (?=\S))", "", text, flags=re.IGNORECASE)


def _is_product(letters: str) -> bool:
    """Return whether `!` after these letters may be a factorial: `nn!`, `abc!`, not `cat!`."""
    lower = letters.lower()
    if lower in ("no", "yes"):
        return False
    if len(lower) < 3 or not re.search("[aeiouy]", lower):
        return True
    return len(lower) == 3 and list(lower) == sorted(lower)


def _case_agrees(answer: str, truth: str, *, is_phrase: bool, is_capital: bool) -> bool:
    """Compare two spellings of a word that differ at most in case.

    is_phrase: the phrase has longer words as well. is_capital: a phrase is all capitals.
    """
    if answer == truth:
        return True
    lower = truth.lower()
    if re.search(r"\d", truth):
        # `h2o` can only be meant as H2O; `Co2` may be another substance than CO2, `x2` than X2.
        symbols = re.findall("[A-Z]", truth)
        return len(symbols) > 1 and bool(_FORMULA.fullmatch(truth)) and answer == lower
    if len(lower) < 3:
        if len(lower) < 2 or _GENOTYPE.fullmatch(truth):
            return False
        if is_phrase:
            return is_capital or not (answer.isupper() or truth.isupper())
        return lower in _SHORT_WORDS and not (answer.isupper() or truth.isupper())
    if _FORMULA.fullmatch(truth) and _MIXED.fullmatch(truth) and re.search("[a-z]", truth):
        return answer == lower
    if _GENOTYPE.fullmatch(answer) or (_FORMULA.fullmatch(answer) and _FORMULA.fullmatch(truth)):
        return False
    # `xyz` and `XYZ` are symbols in alphabetical order.
    return not (len(lower) == 3 and lower in _LETTERS)


def yes_no(answer: str, truth: str) -> bool | None:
    """Compare with a truth that is yes, no, true or false; None if it is not.

    Also None if the answer is a sentence, which other rules read.
    """
    wanted, given = _YES_NO.fullmatch(truth), _YES_NO.fullmatch(answer)
    if wanted is None or given is None:
        return None
    is_reason = _REASON.match(truth) and not _VERDICT.search(wanted["rest"] or "")
    if wanted["rest"] and not is_reason:
        return None  # `Yes, it is.` gives its reason, `No. 5` and `Yes, no` do not
    if given[1].lower() != wanted[1].lower():
        return False
    if not given["rest"]:
        # NO may be nitrogen monoxide.
        return given[1].lower() != "no" or (given[1] == "NO") == (wanted[1] == "NO")
    return not _is_hedged(given)


def _is_hedged(verdict: re.Match) -> bool:
    """Return whether a yes or no is followed by its opposite or by doubt."""
    opposite = _OPPOSITE[verdict[1].lower()]
    return bool(
        re.search(rf"\b{opposite}\b", verdict["rest"], re.IGNORECASE)
        or _TAKEN_BACK.search(verdict["rest"])
    )
