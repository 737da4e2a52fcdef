"""Compare the grouped matmuls of JAX and of tokamax as the compilers of TPUs see them.

    pip install tokamax
    python -m benchmarks.grouped_matmul --out=benchmarks/results/grouped_matmul.json

The experts of a layer of the 2B x 4 discriminator, 8192 tokens with 2 experts each, forward and
backward, compiled for one chip ahead of time; nothing is executed. Floating-point operations are
held against those that the chosen experts need; a Pallas kernel counts as much as it declares.
"""

import argparse
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tokamax
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import records, tpu_programs
from models import presets

_TOKENS = 8192
_IMPLEMENTATIONS = {
    "jax": jax.lax.ragged_dot,
    "tokamax": functools.partial(tokamax.ragged_dot, implementation="mosaic"),
}


def experts(ragged_dot: Callable) -> Callable:
    """Return the sum of the experts' answers, as a function to differentiate."""

    def run(x: jax.Array, kernels: tuple[jax.Array, ...], sizes: jax.Array) -> jax.Array:
        gate, up, down = kernels
        h = jax.nn.silu(ragged_dot(x, gate, sizes)) * ragged_dot(x, up, sizes)
        return (ragged_dot(h, down, sizes).astype(jnp.float32) ** 2).sum()

    return run


def compiled(name: str, topology: str) -> dict[str, Any]:
    """Return operations, bytes and memory of value and gradients on the first chip."""
    text = presets.DISCRIMINATOR_2B_MOE4X.text
    e, d, f = text.moe.num_experts, text.hidden_size, text.moe.intermediate_size
    rows = _TOKENS * text.moe.num_experts_per_token
    mesh = tpu_programs.topology_mesh(topology, "data=-1")
    mesh = jax.sharding.Mesh(mesh.devices[:1], mesh.axis_names, axis_types=mesh.axis_types)
    place = NamedSharding(mesh, PartitionSpec())
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16, sharding=place)
    kernels = (shape((e, d, f)), shape((e, d, f)), shape((e, f, d)))
    sizes = jax.ShapeDtypeStruct((e,), jnp.int32, sharding=place)
    run = jax.jit(jax.value_and_grad(experts(_IMPLEMENTATIONS[name]), argnums=(0, 1)))
    # tokamax asks the default device whether a kernel runs there.
    with jax.set_mesh(mesh), jax.default_device(mesh.devices.flat[0]):
        program = run.lower(shape((rows, d)), kernels, sizes).compile()
    cost, memory = program.cost_analysis(), program.memory_analysis()
    return {
        "needed_flops": 3 * 3 * 2 * rows * d * f,
        "flops": cost["flops"],
        "bytes": cost["bytes accessed"],
        "temporary_gib": round(memory.temp_size_in_bytes / 2**30, 3),
        "pallas_kernels": program.as_text().count('custom_call_target="tpu_custom_call"'),
    }


def record(raw: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the record of the programs of each topology."""
    ratios = {
        f"{topology}: operations of {name}'s over those needed": records.ratio(
            round(both[name]["flops"] / both[name]["needed_flops"], 3), "<= 1.1"
        )
        for topology, both in raw.items()
        for name in both
    }
    return records.make(
        "grouped_matmul",
        "A grouped matmul computes no expert that was not chosen, forward and backward",
        ratios,
        limit="JAX's gradient of the weights goes over all rows once for each expert, of which "
        "there are 4. Compiled ahead of time, not run: counts, not times. Bytes are what a kernel "
        "declares, with or without what it reads again.",
        raw=raw | {"tokamax": tokamax.__version__},
        module="benchmarks.grouped_matmul",
        device=f"{', '.join(raw)}, described; compiled on a CPU",
    )


def main() -> None:
    """Compile, print and keep the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", nargs="+", default=["v5p:2x2x1", "v6e:2x2"])
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    flags.FLAGS.mark_as_parsed()  # tokamax would read the arguments of this program
    made = record(
        {
            topology: {name: compiled(name, topology) for name in _IMPLEMENTATIONS}
            for topology in args.topology
        }
    )
    records.emit(made, args.out)


if __name__ == "__main__":
    main()
