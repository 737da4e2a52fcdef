"""Stand for the program in tests of the chain: steps that count, wait, fail, or end as asked.

    python stub_program.py NAME FOLDER [wait=FILE] [fail=CODE] [ignore_term] [make=DIR]

Each start adds a line to FOLDER/calls. With `wait` a step counts on in FOLDER/NAME.count until FILE
exists; at SIGTERM it adds the line "stopped" and leaves with 143, as stages do after saving, and a
later start counts on.
"""

import pathlib
import signal
import sys
import time


def main(name: str, folder: str, *options: str) -> int:
    """Run one step."""
    root = pathlib.Path(folder)
    asked = dict(option.partition("=")[::2] for option in options)
    with (root / "calls").open("a") as calls:
        calls.write(f"{name}\n")
    print(f"{name} speaks")
    if "make" in asked:
        # As `upcycle` and `export`: refuse what is there.
        made = pathlib.Path(asked["make"])
        if made.exists():
            print(f"{made} exists")
            return 2
        made.mkdir()
    stopped = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    count = root / f"{name}.count"
    number = int(count.read_text()) if count.exists() else 0
    while "wait" in asked:
        number += 1
        count.write_text(str(number))
        if pathlib.Path(asked["wait"]).exists():
            break
        if stopped:
            with (root / "calls").open("a") as calls:
                calls.write("stopped\n")
            return 143
        time.sleep(0.02)
    return int(asked.get("fail", 0))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
