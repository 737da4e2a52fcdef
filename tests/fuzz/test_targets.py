"""The short profile of the fuzzing: every target on some hundred inputs, the same at each run.

`bash launch/fuzz.sh MINUTES` is the long one.
"""

import time
import warnings

import hypothesis
import pytest
from hypothesis import strategies

from tests.fuzz import target as target_lib
from tests.fuzz import targets

_LIMIT_SECONDS = 1.0


@pytest.mark.parametrize("name", targets.TARGETS)
def test_what_strangers_write_is_read_or_refused_in_one_line_and_soon(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        target = targets.TARGETS[name](tmp_path)

        @hypothesis.settings(
            max_examples=target.num_short,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(strategies.randoms(use_true_random=False))
        def check(rng):
            given = target.make(rng)
            hypothesis.note(f"input: {given!r:.2000}")
            begun = time.process_time()
            target_lib.check(target, given)
            seconds = time.process_time() - begun
            assert target.is_slow_allowed or seconds < _LIMIT_SECONDS, f"{seconds:.1f} s"

        check()
