"""The least time of a step by peak speeds: an estimate, never a measurement.

A call takes as long as the slowest of its arithmetic, its reads of memory and the exchange between
devices, as if the three went on at once and at the makers' peaks. Real steps take longer.
"""

from collections.abc import Sequence

from prism_jax.commands.plan import memory
from prism_jax.commands.plan.machines import Machine
from prism_jax.setup import programs


def flops(work: programs.Work) -> float:
    """Return the floating-point operations of a call, over all devices."""
    text = work.model.text
    layer = memory.layer_parameters(work.model, is_active=True)
    forward = 2 * text.num_layers * layer * work.tokens
    # Causal attention: each token meets half of its sequence on average; q k and p v.
    seen = work.sequence_tokens / 2
    forward += 4 * text.num_layers * text.num_heads * text.head_dim * work.attended_tokens * seen
    forward += 2 * text.hidden_size * text.vocab_size * work.head_tokens
    vision = work.model.vision
    if vision is not None:
        width = vision.hidden_size
        tower = 4 * width**2 + 2 * width * vision.intermediate_size
        forward += 2 * vision.num_layers * tower * work.patches
    return forward * _passes(work)


def _passes(work: programs.Work) -> int:
    """Return how often a call goes through the layers: the backward pass counts twice."""
    return work.passes * (1 if not work.has_gradient else 3 if work.remat == "none" else 4)


def seconds(program: programs.Program, machine: Machine) -> float:
    """Return the least seconds that a step spends in a program."""
    work, kind, devices = program.work, machine.generation, program.devices
    parts, tensor = devices.token_parts(), devices.mesh.shape["tensor"]
    arithmetic = flops(work) / (parts * tensor) / (kind.teraflops * 1e12)
    text = work.model.text
    weights = 2 * text.num_layers * memory.layer_parameters(work.model) / tensor
    exchange = 0.0
    if devices.mesh.shape["fsdp"] * devices.mesh.shape["sequence"] > 1:
        # Weights are gathered in every pass; gradients are summed and scattered.
        exchange = _passes(work) * weights / (kind.link_gigabytes * 1e9)
    read = 0.0
    if work.is_decoding:
        place = 2 * 2 * text.num_layers * text.num_kv_heads * text.head_dim / tensor
        head = 2 * text.hidden_size * text.vocab_size / tensor
        # Half of the room of a row is read on average.
        read = weights + head + place * work.tokens / parts * work.sequence_tokens / 2
        read /= kind.terabytes * 1e12
    return work.calls * max(arithmetic, exchange, read)


def steps_an_hour(listed: Sequence[programs.Program], machine: Machine) -> float:
    """Return the most steps an hour; 0 where no program belongs to a step."""
    total = sum(seconds(program, machine) for program in listed)
    return 3600 / total if total else 0.0
