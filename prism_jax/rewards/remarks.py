"""Decide whether the remark after an option's letter takes it back or claims another option.

`A. no, B`, `A. B is correct` and `A: 5, B: 6` claim two options and choose none. The text
of an option may name points, groups or other options: `A. Points B and C lie on it`, `C. Both A and
B`. Another letter is therefore allowed only beside words that say what it names.
"""

import re

from prism_jax.rewards import quantities

_NOUNS = (
    "vitamin type point vertex line segment ray angle side triangle circle square arc chord figure "
    "plane face edge corner node plan company city town village country state team group class "
    "plant box bag jar bottle container beaker tank block object body person student player man "
    "bond cell gas liquid solid metal element compound substance sample solution mixture stage "
    "phase step region area zone layer station stop gate room house building car train bus boat "
    "ship machine factory store shop product brand method process material event set matrix vector "
    "force wire resistor bulb lamp capacitor pulley spring magnet planet star animal species "
    "hepatitis influenza blood grade section part row column position location site spot place "
    "path route road street curve function series pump valve organism protein molecule reaction "
    "experiment trial test tube hole pole end tower tree mountain island particle charge pile "
    "stack shape rectangle term letter note key schedule category reagent catalyst isotope"
).split()
_NOUN = rf"(?:{'|'.join(_NOUNS)})(?:e?s)?"
_L = r"\(?[A-J]\)?(?![\w'])"
_LIST = rf"{_L}(?:(?:, (?:and )?| and | nor | & | to | through |, ?){_L})*"
_OR_LIST = rf"{_L}(?:(?:, (?:and |or )?| and | or | nor | & |, ?){_L})*"
_INNOCENT = tuple(
    re.compile(pattern)
    for pattern in (
        rf"^(?:[Bb]oth|[Nn]either|[Aa]ll of|[Nn]one of) (?:of )?(?:{_NOUN} )?{_OR_LIST}"
        r"(?: (?:only|(?:are|is) (?:true|false|correct|incorrect|right|wrong)))?",
        rf"\b(?i:{_NOUN}) {_LIST}",
        rf"(?:^|\b(?:because|since|as|that) ){_L}(?:, {_L})*,? and {_L} "
        r"(?:are|have|lie|form|intersect|meet|share|touch|overlap|belong|represent|show|attract"
        r"|repel|move|react)\b",
        rf"(?:^|\b(?:because|since|as|that) ){_L} (?:is|are|lies|was|has|moves) "
        rf"[a-z -]{{0,40}}?\b(?:than|to|of|from|as|with|on|between) (?:that of )?{_LIST}",
        rf"{_L} ?(?:[<>=+/-]|\\(?:le|ge|ne|perp|parallel|cong|sim|cup|cap|subset)) ?{_L}",
        r"\b[EFBJ] ?= ?(?:m[acgv]|kx|hf|q[ev])(?![a-z])",
        r"\b[A-J] (?:cells?|lymphocytes?|flat|sharp|major|minor|blood|coli)\b",
        r"\b[A-J] is (?:true|false|correct|incorrect),? (?:but|and|while) R is (?:true|false"
        r"|correct|incorrect)",
    )
)  # fmt: skip
_LISTING = re.compile(
    rf"(?:[Oo]nly )?({_LIST})"
    r"(?: only|(?: are)?(?: both)?(?: true| false| correct| incorrect))?(?=$|[.,;])"
)
# Another option's letter: alone, not an article, a unit behind a number or a function's argument.
_MENTION = re.compile(
    r"(?<![\w'\\^_{°-])(?<![A-Za-z]\()([A-HJ])(?![\w'^_({])|(?<!\w)\(([A-Ja-j])\)(?!\w)"
)
_AS_LABEL = re.compile(r"(?:^|[\s,;])(?:([A-J])|([a-j]))[.):] ?(?=\S|$)")
_MARKED = re.compile(r"(?:^|\s)\([A-Ja-j]\)(?!\w)")
_UNITS = ("A", "C", "F", "G", "H", "J")
_LONE_SMALL = re.compile(r"(?<![\w'\\^_{(])([b-hj])(?![\w'^_({])")
_ARTICLE = re.compile(
    r"A (?=[a-z])(?!(?:is|was|are|and|or|nor|has|have|seems?|looks|would|should|may|might|could"
    r"|can|too|also|instead|again|actually|maybe|rather|then|but|not|better|correct|right)\b)"
)
_SWITCH = re.compile(
    r"\b(?:no|nope|sorry|wait|actually|rather|instead|oops|correction|correct|right(?! (?:angle|"
    r"triangle|side|hand|of|end|half))|wrong|incorrect|better|best|answer|option|choice|choose"
    r"|chosen|pick|select|hmm+|mean|meant|maybe|perhaps|possibly|probably|likely|alternatively"
    r"|otherwise|also|but|however|should|could|might|unless|sure|thought|scratch|change|switch"
    r"|final|finally|or|true|false|then|second|hold)\b|\?",
    re.IGNORECASE,
)
_LONE = re.compile(r"\W*([A-Ja-j])\W*(?:$|[,;])")
_BY_ORDER = re.compile(
    r"\b(?:first|second|third|fourth|fifth|last|other|next) (?:option|choice|answer|one)\b", re.I
)
_REJECTION = re.compile(
    r"(?:is |are )?(?:not (?:\(?[A-J]\b|it\b|sure|correct|right|true|the )|isn't|wrong(?! \w)"
    r"|nor\b|unsure|maybe\b|incorrect(?! \w)|(?:no,? )?wait\b(?! (?:for|until|at|in)\b)|oops"
    r"|sorry\b|scratch that|just kidding|or\b|on second thought|alternatively\b|i mean\b|nope\b"
    r"|hmm+\b)|(?:is|are) (?:false|untrue)\b|(?:i'm |i am )(?:not sure|unsure|guessing)\b"
    r"|(?:just )?(?:a )?guess\b|i guess\b|i don't know\b",
    re.IGNORECASE,
)
_CORRECTION = re.compile(
    r"(?:^(?:no|nope|actually|rather|instead|correction)[,;:!-]+ ?"
    r"|[,;.!] ?(?:no|nope|actually|rather|instead|correction|make that)(?:[,;:!-]+ ?| ))"
    r"(?:(?:it's|it is|that's|make that) )?(?P<value>\S.{0,40})$",
    re.IGNORECASE,
)
_HEDGE = re.compile(
    r"^\W*[A-Ja-j]\W*(?:$|[,;])|^\W*(?:or|and|/|,|&|\+|not)\W*[A-Ja-j]\b(?![a-z'])"
    r"|\bor\s+(?:option\s+)?\(?[A-J]\)?(?![\w'])|\(ii\)|\n\s*[A-J]\s*(?:\n|$)"
)


def takes_back(remark: str, named: str) -> bool:
    """Return whether a remark after the letter `named` takes it back or claims another letter."""
    if not remark:
        return False
    if _REJECTION.match(remark.lstrip("([ ")) or _corrects(remark):
        return True
    rest = remark
    listing = _LISTING.match(remark)
    if listing and _is_reference(listing, named):
        rest = remark[listing.end() :]  # `C. A and B`: an option that refers to earlier options
    for pattern in _INNOCENT:
        rest = pattern.sub(" ", rest)
    if _claims(rest, named):
        return True
    if _others(rest, named):
        return True
    if rest == remark:
        return bool(_SWITCH.search(remark)) and any(
            letter.upper() != named for letter in _LONE_SMALL.findall(remark)
        )
    return bool(_SWITCH.search(rest))


def _corrects(remark: str) -> bool:
    """Return whether a remark is another value instead of the option: `No, 8`, `8, no 9`."""
    match = _CORRECTION.search(remark)
    return match is not None and quantities.parse(match["value"].rstrip(". ")) is not None


def hedges(text: str) -> bool:
    """Return whether an option's text in a truth names another option, as an option."""
    if text.strip(" .") == "I":
        return False  # statement I
    return bool(_HEDGE.search(text) or _AS_LABEL.search(text) or _MARKED.search(text))


def _is_reference(listing: re.Match, named: str) -> bool:
    """Return whether `A and B`, or `only A`, lists options before the named option."""
    listed = set(re.findall("[A-J]", listing[1]))
    return max(listed) < named and (len(listed) > 1 or "nly" in listing.group())


def _claims(remark: str, named: str) -> bool:
    """Return whether another letter is written as an option: `(B)`, `B. cat`, `or B`."""
    labels = {(a or b).upper() for a, b in _AS_LABEL.findall(remark)}
    lone = _LONE.match(remark)
    if labels - {named} or _BY_ORDER.search(remark) or (lone and lone[1].upper() != named):
        return True
    return bool(_HEDGE.search(remark) and _others(remark, named))


def _others(text: str, named: str) -> bool:
    """Return whether a text still has letters of options other than the named option."""
    for mention in _MENTION.finditer(text):
        before = text[: mention.start()]
        if (mention[1] or mention[2]).upper() == named:
            continue
        starts = not before.strip() or before.rstrip()[-1] in ".!?;"
        if mention[1] == "A" and starts and _ARTICLE.match(text, mention.start()):
            continue
        is_unit = (
            mention[1] in _UNITS
            and re.search(r"(?:\d|°) ?$", before)
            and not re.match(r"[.):] ?\S", text[mention.end() :])
        )
        if not is_unit:
            return True
    return False
