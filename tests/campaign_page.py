"""The campaigns of several processes as a part of docs/pods.md, made from their results.

python -m tests.fault_campaign FOLDER --json=docs/faults.json
python -m tests.chain_campaign FOLDER --json=docs/chain.json
python -m tests.campaign_page
"""

import collections
import json
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from tests import fault_campaign

_DOCS = pathlib.Path(__file__).parents[1] / "docs"
_PAGE = _DOCS / "pods.md"
_TITLE, _NEXT = "## Faults that were tried", "## Secrets"


def section() -> str:
    """Return the part of the page that the results fill."""
    lines = [_TITLE, "", *_faults(json.loads((_DOCS / "faults.json").read_text())), ""]
    chain = _DOCS / "chain.json"
    if chain.is_file():
        lines += [*_chain(json.loads(chain.read_text())), ""]
    return "\n".join(lines)


def _faults(results: Sequence[Mapping[str, Any]]) -> list[str]:
    text = (
        "Each hit one of two processes (SFT, tiny, gloo on 2 CPU cores). *Survived*: the job ended "
        "by itself, on both with the promised code, and went on to the metrics and the parameters "
        "of a run that nothing disturbed. After a SIGTERM processes agree on a later place to stop "
        "at; where all steps are done by then, they end with 0. Of "
        "`python -m tests.fault_campaign`: "
        f"**{fault_campaign.counts(results)}**"
    )
    num_left = len(fault_campaign.cases()) - len(results)
    text += f", {num_left} of its faults not tried." if num_left else "."
    return [*_wrapped(text), "", fault_campaign.HEAD, *map(fault_campaign.line, results)]


def _chain(result: Mapping[str, Any]) -> list[str]:
    kills = collections.Counter(result["kills"])
    each = ", ".join(f"{name} {count}" for name, count in kills.items())
    worst = max(one["metric"] for one in result.values() if isinstance(one, dict))
    return _wrapped(
        f"All stages in a row (`python -m tests.chain_campaign`) on `local_pod.sh "
        f"{result['processes']}`, of which one process was killed every {result['kill_seconds']:g} "
        "s, or once it had saved again where a start took longer, "
        f"{len(result['kills'])} times in all ({each}), ended in {result['seconds'] / 60:.0f} "
        "minutes with the model of an undisturbed run on one process: metrics differ by at most "
        f"{worst:.1g} of their size, parameters of the export by at most {result['parameter']:.1g}."
    )


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 104, break_on_hyphens=False, break_long_words=False)


def replaced(page: str) -> str:
    """Return the page with this section in its place."""
    before, _, rest = page.partition(_TITLE)
    if not rest:
        before, _, rest = page.partition(_NEXT)
        return f"{before}{section()}\n{_NEXT}{rest}"
    return f"{before}{section()}\n{_NEXT}{rest.partition(_NEXT)[2]}"


if __name__ == "__main__":
    _PAGE.write_text(replaced(_PAGE.read_text()))
