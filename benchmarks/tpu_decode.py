"""Compile decoding and prefill for TPUs ahead of time, and count the bytes that they move."""

import time

import jax

from benchmarks import kernel_times, records, tpu_bytes, tpu_compile, tpu_programs, tpu_rollout
from prism_jax import mesh as mesh_lib

_TARGET = 1.25
# Topologies, each with the fewest chips a copy of the weights that leave room for responses.
_CASES = {
    "4b": (("v5e:2x2", 4), ("v5p:2x2x1", 1), ("v6e:2x2", 1), ("tpu7x:2x2x1", 1)),
    "8b": (("v5e:2x4", 8), ("v5p:2x2x1", 1), ("v6e:2x2", 2), ("tpu7x:2x2x1", 1)),
    "tiny": (("v5e:2x2", 2),),
}
_SLOTS, _PLACES, _PROMPT_PLACES, _WIDTH = 32, 1024, 512, 16
_ROW_TOKENS = 2048


def measure(size: str) -> dict:
    """Compile every case; the ratio is the worst step's."""
    models = ("4b", "8b") if size == "4b" else (size,)
    cases = []
    for model in models:
        for topology, tensor in _CASES[model]:
            name = "small_64" if model == "tiny" else model
            cases.append(_case(name, topology, tensor))
            kernel_times.report(cases[-1])
    return summarize(cases)


def summarize(cases: list[dict]) -> dict:
    """Return the record of compiled cases."""
    names = {"decode": "bytes_over_needed", "prefill": "prefill_bytes_over_weights"}
    return {
        "claim": "bytes that compiled programs move, the largest ratio: a step of decoding with "
        "all places in use over the weights, keys and values that it must read; a prefill of "
        f"{_ROW_TOKENS} tokens over the weights",
        "ratios": {
            name: records.ratio(max(case[key] for case in cases), f"<= {_TARGET}")
            for name, key in names.items()
        },
        "limit": "decode: logits in float32 and activations. Prefill: activations, nearly half of "
        "them queries and keys in float32 between their norms and rotations; its matrix products "
        "take longer than its bytes. Counts of a compiler, not times of a chip.",
        "raw": {"cases": cases, "slots": _SLOTS, "places": _PLACES, "row_tokens": _ROW_TOKENS},
    }


def _case(model: str, topology: str, tensor: int) -> dict:
    """Compile a step and a prefill for one topology."""
    mesh = tpu_programs.topology_mesh(topology, f"data=-1,tensor={tensor}")
    rules = mesh_lib.rules(mesh_lib.DEFAULT_RULES)
    case = tpu_programs.Case(
        model=model,
        topology=topology,
        program="decode",
        mesh="",
        row_tokens=_PLACES,
        row_patches=_PROMPT_PLACES,
        rows=_SLOTS,
        chunk_tokens=1,
        moe_implementation=None,
    )
    sampler = tpu_programs.abstract_sampler(case, mesh, rules)
    sizes = tpu_rollout.plan(
        parts=mesh.shape["data"],
        slots=_SLOTS,
        places=_PLACES,
        prompt_places=_PROMPT_PLACES,
        width=_WIDTH,
    )
    result = {"model": model, "topology": topology, "tensor": tensor}
    programs = {
        "decode": tpu_rollout.decode_program(sampler, sizes),
        "prefill": tpu_rollout.prefill_program(sampler, sizes, row_tokens=_ROW_TOKENS),
    }
    for name, (function, arguments) in programs.items():
        begun = time.monotonic()
        with jax.set_mesh(mesh):
            compiled = function.lower(*arguments).compile()
        hlo = compiled.as_text()
        result[name] = tpu_compile.memory(compiled, topology) | {
            "seconds": round(time.monotonic() - begun, 1),
            "bytes_moved": tpu_bytes.moved_bytes(tpu_bytes.body(hlo)),
            "pallas_kernels": hlo.count('custom_call_target="tpu_custom_call"'),
            "largest_collectives": tpu_compile.collectives(hlo)[:3],
        }
    needed = tpu_rollout.needed_bytes(sampler, sizes)
    weights = tpu_rollout.weight_bytes(sampler)
    return result | {
        "needed_bytes": needed,
        "bytes_over_needed": result["decode"]["bytes_moved"] / needed,
        "weight_bytes": weights,
        "prefill_bytes_over_weights": result["prefill"]["bytes_moved"] / weights,
    }
