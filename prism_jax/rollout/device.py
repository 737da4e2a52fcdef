"""The compiled programs of the sampler, and how host arrays come to a mesh and its processes."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models import attention, decode_attention, sharding
from models.config import Qwen3VLConfig
from models.inputs import Example
from prism_jax.rollout import decode, prefill
from prism_jax.rollout.memory import Plan
from prism_jax.rollout.sampling import Mode
from prism_jax.rollout.slots import Move


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """The sampler's programs, each compiled once for its shapes.

    Every process of a job calls them with the same host arrays and gives its devices their parts.
    """

    graphdef: nnx.GraphDef
    config: Qwen3VLConfig
    prefill_implementation: attention.Implementation
    decode_implementation: decode_attention.Implementation
    chunk_tokens: int
    dtype: Any  # of keys, values and hidden states
    mesh: Mesh | None
    rules: sharding.Rules
    programs: dict = dataclasses.field(default_factory=dict, repr=False)  # of `advance`, by mode

    def empty(self, plan: Plan) -> decode.State:
        """Return the state of empty slots."""
        shapes = decode.abstract_state(self.config.text, plan, self.dtype)
        if self.mesh is None:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        specs = decode.specs(self.rules, self.config.text.num_layers)

        def zeros(spec: PartitionSpec, x: jax.ShapeDtypeStruct) -> jax.Array:
            return jnp.zeros(x.shape, x.dtype, device=NamedSharding(self.mesh, spec))

        return jax.tree.map(zeros, specs, shapes, is_leaf=lambda x: isinstance(x, PartitionSpec))

    def fill(
        self,
        params: nnx.State,
        state: decode.State,
        parts: Sequence[Sequence[tuple[int, Example]]],
        shape: prefill.Shape,
        plan: Plan,
    ) -> decode.State:
        """Read prompts, each into its entry of its part's store."""
        rows = prefill.pack_prompts(parts, shape, config=self.config, num_entries=plan.num_prompts)
        places = self._put(rows.text.positions, axis=1)
        text = dataclasses.replace(rows.text, positions=None)
        rows = self._put(dataclasses.replace(rows, text=text))
        text = dataclasses.replace(rows.text, positions=places)
        with self._in_mesh():
            return prefill.fill(
                self.graphdef,
                params,
                state,
                dataclasses.replace(rows, text=text),
                implementation=self.prefill_implementation,
                rules=self.rules,
            )

    def advance(
        self,
        params: nnx.State,
        state: decode.State,
        control: decode.Control,
        mode: Mode,
        key_impl: str,
        plan: Plan,
    ) -> tuple[decode.State, decode.Chunk]:
        """Decode a chunk."""
        key = (mode, key_impl, plan.layout())
        if key not in self.programs:
            program = decode.Program(
                mode=mode,
                layout=plan.layout(),
                implementation=self.decode_implementation,
                chunk_tokens=self.chunk_tokens,
                key_impl=key_impl,
                rules=self.rules,
            )
            self.programs[key] = decode.advance(self.graphdef, program, jax.default_backend())
        with self._in_mesh():
            return self.programs[key](params, state, self._put(control))

    def move(self, state: decode.State, move: Move, plan: Plan) -> decode.State:
        """Move one response of each part to a longer slot."""
        with self._in_mesh():
            return decode.move(
                state,
                *self._put((move.sources, move.targets)),
                layout=plan.layout(),
                source_class=move.source_class,
                target_class=move.target_class,
                rules=self.rules,
            )

    def _in_mesh(self) -> Any:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _put(self, tree: Any, *, axis: int = 0) -> Any:
        """Put each part's share of host arrays on its devices."""
        if self.mesh is None:
            return tree
        spec = PartitionSpec(*[None] * axis, self.rules.mesh_axes("batch"))
        place = NamedSharding(self.mesh, spec)

        def put(x: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback(x.shape, place, lambda part: x[part])

        return jax.tree.map(put, tree)
