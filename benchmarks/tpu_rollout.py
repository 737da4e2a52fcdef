"""The sampler's programs for TPU topologies, with abstract arguments, and the bytes they must read.

python -m benchmarks.rollout --record=tpu_decode --out=FILE.json    (libtpu, no TPU; CPU alone)
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models import inputs, sharding
from models.config import Qwen3VLConfig
from prism_jax.rollout import decode, memory, prefill
from prism_jax.rollout.sampling import Mode, Settings

Program = tuple[Any, tuple]  # a jitted function and its abstract arguments


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """The inputs of the program: parameters as `serving.prepare` lays them out, and the mesh."""

    graphdef: nnx.GraphDef
    params: nnx.State  # abstract, with shardings
    config: Qwen3VLConfig
    mesh: Mesh
    rules: sharding.Rules

    def placed(self, shape: tuple[int, ...], dtype: Any, *, axis: int = 0) -> jax.ShapeDtypeStruct:
        """Return the shape of an array whose rows are shared out among the parts."""
        spec = PartitionSpec(*[None] * axis, self.rules.mesh_axes("batch"))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))

    def state(self, plan: memory.Plan) -> decode.State:
        """Return the abstract state of the slots."""
        specs = decode.specs(self.rules, self.config.text.num_layers)

        def placed(spec: PartitionSpec, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            where = NamedSharding(self.mesh, spec)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

        shapes = decode.abstract_state(self.config.text, plan, jnp.bfloat16)
        return jax.tree.map(placed, specs, shapes, is_leaf=lambda x: isinstance(x, PartitionSpec))


def plan(*, parts: int, slots: int, places: int, prompt_places: int, width: int) -> memory.Plan:
    """Return slots of one size whose prompts all have `width` readers."""
    return memory.Plan(
        num_parts=parts,
        classes=((slots, places),),
        block_places=places,
        num_prompts=-(-slots // width),
        prompt_places=prompt_places,
        prompt_block_places=prompt_places,
        width=width,
        prefill_prompts=1,
    )


def decode_program(sampler: Sampler, sizes: memory.Plan) -> Program:
    """Return a chunk of one step: XLA counts what a loop's body reads once."""
    slots, prompts = sizes.num_parts * sizes.num_slots, sizes.num_parts * sizes.num_prompts
    placed = sampler.placed

    def each(dtype: Any, *more: int) -> jax.ShapeDtypeStruct:
        return placed((slots, *more), dtype)

    control = decode.Control(
        is_open=each(np.bool_),
        is_fresh=each(np.bool_),
        prompt=each(np.int32),
        place=each(np.int32),
        starts=each(np.int32),
        limits=each(np.int32),
        ends=each(np.int32, 2),
        keys=each(np.uint32, 2),
        numbers=each(np.uint32),
        settings=Settings(
            temperature=each(np.float32), top_k=each(np.int32), top_p=each(np.float32)
        ),
        prompt_lengths=placed((prompts,), np.int32),
        readers=placed((prompts, sizes.width), np.int32),
    )
    program = decode.Program(
        mode=Mode(has_noise=True, top_k=None, has_top_p=False),
        layout=sizes.layout(),
        implementation="pallas",
        chunk_tokens=1,
        key_impl="threefry2x32",
        rules=sampler.rules,
    )
    run = functools.partial(decode.run_chunk, sampler.graphdef, program=program)
    return jax.jit(run, donate_argnums=1), (sampler.params, sampler.state(sizes), control)


def prefill_program(sampler: Sampler, sizes: memory.Plan, *, row_tokens: int) -> Program:
    """Return the reading of one full row of text prompts a part."""
    parts, most = sizes.num_parts, 4
    placed = sampler.placed
    text = inputs.TextInput(
        tokens=placed((parts, row_tokens), np.int32),
        positions=placed((3, parts, row_tokens), np.int32, axis=1),
        image_slots=placed((parts, row_tokens), np.int32),
        segments=inputs.Segments(
            ids=placed((parts, row_tokens), np.int32),
            lengths=placed((parts, most + 1), np.int32),
            offsets=placed((parts, most + 2), np.int32),
        ),
    )
    spans = prefill.Spans(
        starts=placed((parts, most), np.int32),
        lengths=placed((parts, most), np.int32),
        entries=placed((parts, most), np.int32),
    )
    rows = prefill.Rows(text=text, vision=None, spans=spans)

    def run(params: nnx.State, state: decode.State, rows: prefill.Rows) -> decode.State:
        return prefill.fill.__wrapped__(
            sampler.graphdef,
            params,
            state,
            rows,
            implementation="splash",
            rules=sampler.rules,
        )

    return jax.jit(run, donate_argnums=1), (sampler.params, sampler.state(sizes), rows)


def weight_bytes(sampler: Sampler) -> int:
    """Return the bytes of the text model's weights on a device, with the tied head once."""
    text = sampler.config.text
    leaves = jax.tree.leaves(sampler.params["text"])
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    if not text.tie_word_embeddings:  # of the other table a few rows
        weights -= 2 * text.vocab_size * text.hidden_size
    return weights // sampler.mesh.shape["tensor"]


def needed_bytes(sampler: Sampler, sizes: memory.Plan) -> int:
    """Return the bytes that a step of decoding must read on a device with all places in use.

    That is the weights, and every key and value.
    """
    text = sampler.config.text
    place = 2 * 2 * text.num_layers * text.num_kv_heads * text.head_dim
    places = sum(rows * length for rows, length in sizes.classes)
    places += sizes.num_prompts * sizes.prompt_places
    return weight_bytes(sampler) + place * places // sampler.mesh.shape["tensor"]
