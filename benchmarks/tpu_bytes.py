"""Count the bytes that a compiled TPU program moves between its chip and main memory.

XLA's own count takes reads of fast memory for reads of main memory, and a table that a few rows are
gathered from for read as a whole.
"""

import re

_ARRAY = re.compile(r"(pred|bf16|f8\w*|[fsu]\d+)\[([\d,]*)\](\{[^}]*\})?")
_LINE = re.compile(r"^\s*(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
# They name what is there, or end what another has begun.
_FREE = {
    *("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "reshape", "while"),
    *("copy-done", "slice-done", "async-done", "after-all"),
}


def array_bytes(shape: str) -> list[int]:
    """Return the bytes of each array of an HLO shape; 0 for one in fast memory."""
    sizes = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" or dtype.startswith("f8") else int(dtype.lstrip("bfsu"))
        count = 1
        for dim in dims.split(","):
            count *= int(dim or 1)
        sizes.append(0 if "S(" in layout else count * bits // 8)
    return sizes


def body(hlo: str) -> list[str]:
    """Return the instructions of the computation that calls most kernels: the loop over steps."""
    computations = re.split(r"\n(?=%|ENTRY )", hlo)
    most = max(computations, key=lambda text: text.count('custom_call_target="tpu_custom_call"'))
    return most.splitlines()[1:]


def moved_bytes(lines: list[str]) -> int:
    """Return the bytes that the instructions read of main memory and write to it.

    Kernels and fusions read their arguments and write their results. A scatter writes a few rows of
    an array in place, a gather reads a few.
    """
    shapes, total = {}, 0
    for line in lines:
        found = _LINE.match(line)
        if found is None:
            continue
        name, shape, operation, rest = found.groups()
        shapes[name] = shape
        if operation in _FREE:
            continue
        names = re.findall(r"%([\w.-]+)", rest.split(")", maxsplit=1)[0])
        read = [sum(array_bytes(shapes.get(one, ""))) for one in names]
        written = array_bytes(shape)
        if operation in ("copy-start", "slice-start", "async-start"):
            # A copy names what arrives and what it is copied from; the others their arguments, then
            # what arrives. Either may lie in fast memory.
            place = 0 if operation == "copy-start" else len(names)
            arrived = array_bytes(re.sub(r"S\(\d+\)", "", shape))[place]
            total += arrived * (sum(read) > 0) + written[place]
        elif "scatter" in name:
            total += 2 * sum(read[1:])
        elif "gather" in name:
            total += 2 * sum(written) + sum(read[1:])
        else:
            total += sum(read) + sum(written)
    return total
