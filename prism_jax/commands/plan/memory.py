"""What a phase of a stage takes of a device's memory: counted, compiled, or estimated."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from models.config import Qwen3VLConfig
from prism_jax.setup import programs

GIB = 2**30
# A running job also holds what no program does: the next batch, fragmentation.
SAFE_FRACTION = 0.90
# Estimated temporaries of 10 programs with a gradient are 0.82 to 1.32 of what was compiled
# (benchmarks/results/tpu_compile.json): an estimate is made larger by this.
ESTIMATE_FACTOR = 1.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """The memory of a device during a phase, in GiB."""

    name: str
    parts: Mapping[str, float]  # arguments by name, as their shapes say
    beside: Mapping[str, float]  # what lies there for other phases
    temporary: float  # activations, gradients, outputs that take no argument's place
    padding: float  # of arguments, as the device lays them out
    is_compiled: bool
    # Its arrays were made as large as the memory allows: all of it may be taken.
    is_fitted: bool = False
    # The compiler refused it; the figures are then an estimate.
    refusal: str | None = None

    @property
    def total(self) -> float:
        """Return all that is needed at once."""
        held = sum(self.parts.values()) + sum(self.beside.values())
        return held + self.padding + self.temporary

    def fits(self, hbm_gib: float) -> bool:
        """Return whether a tenth of the memory stays free, or as much as the sampler leaves."""
        share = 1.0 if self.is_fitted else SAFE_FRACTION
        return self.refusal is None and self.total <= share * hbm_gib


def size_gib(tree: Any) -> float:
    """Return the memory of one device that abstract arrays take."""
    return programs.num_bytes(tree) / GIB


def compiled(program: programs.Program, measured: Mapping[str, int]) -> Phase:
    """Return the memory of a compiled program, from the bytes of `memory_analysis`."""
    counted = counted_parts(program)
    arguments = measured["argument"] / GIB
    return Phase(
        name=program.phase,
        parts=counted,
        beside={name: size_gib(tree) for name, tree in program.beside.items()},
        temporary=(measured["temporary"] + measured["output"] - measured["alias"]) / GIB,
        padding=max(0.0, arguments - sum(counted.values())),
        is_compiled=True,
        is_fitted=program.is_fitted,
    )


def estimated(program: programs.Program, *, refusal: str | None = None) -> Phase:
    """Return the memory by arithmetic alone."""
    return Phase(
        name=program.phase,
        parts=counted_parts(program),
        beside={name: size_gib(tree) for name, tree in program.beside.items()},
        temporary=ESTIMATE_FACTOR * _temporary(program) / GIB,
        padding=0.0,
        is_compiled=False,
        is_fitted=program.is_fitted,
        refusal=refusal,
    )


def counted_parts(program: programs.Program) -> dict[str, float]:
    """Return the named parts of a program's arguments in GiB."""
    return {name: size_gib(tree) for name, tree in program.parts.items()}


def _temporary(program: programs.Program) -> float:
    """Return an estimate of the bytes of activations, gradients and gathered weights.

    With a gradient these are the inputs of layers that the backward pass needs, one layer's
    activations (four copies of its widest arrays, eight where every expert is computed), the logits
    of a chunk three times in float32, the gathered head and its gradient, two gathered layers, and
    the gradients, see `_gradients`; without one, a copy of each. Decoding holds no more than the
    logits and a layer's activations.
    """
    work, mesh = program.work, program.devices.mesh.shape
    text, tensor = work.model.text, mesh["tensor"]
    tokens, attended, patches = (
        n / program.devices.token_parts() for n in (work.tokens, work.attended_tokens, work.patches)
    )
    width, copies = text.hidden_size, 1
    if work.has_gradient:
        copies = 4 if text.moe is None else 8
    heads = (text.num_heads + 2 * text.num_kv_heads) * text.head_dim / tensor
    layer = tokens * 2 * (6 * width + copies * _mlp_width(work.model) / tensor)
    layer += attended * 2 * copies * heads
    if work.is_decoding:
        # Logits in float32, scaled, with noise and filtered.
        return layer + 4 * 4 * tokens * text.vocab_size / tensor
    temporaries, is_cut = layer, mesh["fsdp"] * mesh["sequence"] > 1
    if program.is_fitted:
        # The keys and values of the prompts that are read, until they are stored.
        temporaries += tokens * 4 * text.num_layers * text.num_kv_heads * text.head_dim / tensor
    chunk = min(work.head_chunk_tokens, work.head_tokens / program.devices.token_parts())
    if work.head_tokens:
        temporaries += (3 if work.has_gradient else 1) * 4 * chunk * text.vocab_size / tensor
        temporaries += (2 + 4 * work.has_gradient) * width * text.vocab_size / tensor * is_cut
    temporaries += 2 * 2 * layer_parameters(work.model) / tensor * is_cut
    vision = work.model.vision
    if vision is not None and patches:
        temporaries += patches * 2 * (8 * vision.hidden_size + copies * vision.intermediate_size)
    if not work.has_gradient:
        return temporaries
    saved = tokens * 2 * width
    if work.remat == "save_attention":
        saved += attended * (2 * heads + 4 * text.num_heads / tensor)
    elif work.remat != "full":
        saved += layer / 2
    temporaries += work.passes * text.num_layers * saved
    if vision is not None and patches:
        temporaries += work.passes * vision.num_layers * patches * 2 * vision.hidden_size
    return temporaries + _gradients(program)


def _gradients(program: programs.Program) -> int:
    """Return the bytes of the gradients, see `training.train_step`.

    Those of float32 parameters are added up in place. Those of bfloat16 lie beside their sum.
    """
    size = programs.num_bytes(program.gradients)
    wide = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding),
        program.gradients,
    )
    is_wide = programs.num_bytes(wide) == size
    return size if is_wide or program.work.calls == 1 else size + programs.num_bytes(wide)


def _mlp_width(config: Qwen3VLConfig) -> int:
    moe = config.text.moe
    if moe is None:
        return config.text.intermediate_size
    # Few experts are all computed on every token.
    return moe.intermediate_size * (moe.num_experts if moe.num_experts <= 8 else 8)


def layer_parameters(config: Qwen3VLConfig, *, is_active: bool = False) -> int:
    """Return the parameters of a decoder layer's matrices; of experts all, or the computed ones."""
    text = config.text
    attention = text.hidden_size * text.head_dim * (2 * text.num_heads + 2 * text.num_kv_heads)
    width = text.intermediate_size
    if text.moe is not None:
        count = text.moe.num_experts
        width = text.moe.intermediate_size * count
        if is_active:
            width = _mlp_width(config)
    return attention + 3 * text.hidden_size * width
