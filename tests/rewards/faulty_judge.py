"""Run the judging process with mathematics that misbehaves on command, in a way no handler catches.

A command looks like mathematics (`hng+1`), so that the fast rules pass it on.
"""

import ctypes
import os
import sys
import time

from prism_jax.rewards import judge_process, symbolic


def misbehave(method: str, given: str, truth: str) -> bool:
    if "hng+1" in given:
        time.sleep(3600)
    if "bsy+1" in given:
        # One call into C that holds the interpreter for hours: no Python handler would run.
        print(9**9**9)
    if "seg+1" in given:
        ctypes.string_at(0)
    if "ext+1" in given:
        os._exit(3)
    if "mem+1" in given:
        return bool(bytearray(1 << 40))
    if "err+1" in given:
        raise RuntimeError("a library's own error")
    if "out+1" in given:
        os.write(1, b"not the protocol\n")
    return symbolic.verify(method, given.replace("out+1", "1"), truth)


if __name__ == "__main__":
    judge_process.main(sys.argv[1:], misbehave)
