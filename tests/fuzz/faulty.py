"""A target with one fault of each kind, for the test of the campaign.

python -m tests.fuzz.faulty MINUTES …
"""

import os
import random
import sys
import time

from tests.fuzz import campaign, targets
from tests.fuzz.target import Target, require

_FAULTS = {
    b"b": lambda: require(False, "a promise"),
    b"k": lambda: {}["no such key"],
    b"s": lambda: [None for _ in iter(time.process_time, -1)],
    b"d": lambda: os._exit(7),
}


class Faulty(Target):
    """Bytes of which four are faults, each of another kind."""

    weight = 12.0

    def make(self, rng: random.Random) -> bytes:
        """Return some bytes, seldom a fault, and more seldom one that ends the process."""
        fault = rng.choice(list(_FAULTS)[:3]) if rng.random() < 0.02 else b""
        fault = b"d" if rng.random() < 0.001 else fault
        return b"x" * rng.randrange(20) + fault + b"y" * rng.randrange(20)

    def run(self, given: bytes) -> None:
        """Meet the fault."""
        for byte, fault in _FAULTS.items():
            if byte in given:
                fault()


if __name__ == "__main__":
    targets.TARGETS["faulty"] = Faulty
    sys.exit(campaign.main(sys.argv[1:]))
