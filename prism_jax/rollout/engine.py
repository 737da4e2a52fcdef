"""The sampler: prompts in, responses out. Parameters are passed with every call, never kept."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models import attention, inputs, positions, sharding
from models.config import Qwen3VLConfig
from models.inputs import Example
from prism_jax.rollout import decode
from prism_jax.rollout.sampling import Sampling

_SPLASH_ROW = 128  # of which splash attention reads multiples, see `models.attention`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
    """Hold the responses on the host; those of one prompt side by side, N = prompts x responses."""

    tokens: np.ndarray  # int32[N, max_tokens]  0 behind the response
    logprobs: np.ndarray  # float32[N, max_tokens]  of each token when it was drawn
    lengths: np.ndarray  # int32[N]  tokens of the response, its end token included
    ended: np.ndarray  # bool[N]  False where `max_tokens` cut the response

    def is_finite(self) -> bool:
        """Return whether every token came from finite logits; others mean nothing."""
        return bool(np.isfinite(self.logprobs).all())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """Round the sizes of a batch up, so that few shapes are compiled.

    Give the largest sizes that can come to compile one shape only. Splash attention rounds further.
    """

    prompt_tokens: int  # the longest prompt is rounded up to a multiple
    row_patches: int  # so are the patches of the fullest vision row
    row_images: int  # and its images, one frame of a video counting as one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """Sample from a model whose layers were laid out by `serving.prepare`.

    Args:
      prefill_implementation, decode_implementation: see `models.attention`.
      chunk_tokens: tokens decoded between two looks of the host; hardly matters for speed.
      mesh, rules: rows are spread over the mesh axes of the logical axis "batch"; None without.
    """

    graphdef: nnx.GraphDef
    config: Qwen3VLConfig
    shapes: Shapes
    prefill_implementation: attention.Implementation
    decode_implementation: attention.Implementation
    chunk_tokens: int
    mesh: Mesh | None
    rules: sharding.Rules

    def generate(
        self,
        params: nnx.State,
        prompts: Sequence[Example],
        sampling: Sampling,
        key: jax.Array,
        *,
        num_responses: int,
        first_prompt: int = 0,
        on_chunk: Callable[[int, int], None] | None = None,
    ) -> Rollout:
        """Draw `num_responses` responses to each prompt, read once each.

        Args:
          key: the same key gives a prompt at the same place among the prompts the same responses,
            whatever the other prompts are.
          first_prompt: the place of the first of these prompts among all that the key is for: drawn
            in parts, prompts get the responses that they get together.
          on_chunk: told after each chunk how many tokens a response may have and how many
            responses have ended.
        """
        num_rows = len(prompts)
        if num_rows == 0 or num_responses < 1:
            raise ValueError(
                f"generate needs prompts and responses, got {num_rows}, {num_responses}"
            )
        text, vision = self._pack(prompts)
        rows = text.tokens.shape[0]
        first = first_prompt * num_responses
        numbers = np.arange(first, first + rows * num_responses, dtype=np.uint32)
        keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)
        text, vision, keys = self._to_devices(text, vision, keys)
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            state = decode.start(
                self.graphdef,
                params,
                text,
                vision,
                keys,
                sampling=sampling,
                num_responses=num_responses,
                implementation=self.prefill_implementation,
                cache_tokens=text.tokens.shape[1] + sampling.max_tokens,
            )
            advance = decode.advance(jax.default_backend())
            while True:
                state = advance(
                    self.graphdef,
                    params,
                    state,
                    sampling=sampling,
                    implementation=self.decode_implementation,
                    chunk_tokens=self.chunk_tokens,
                )
                step, num_ended = int(state.step), int(state.is_ended.sum())
                if on_chunk is not None:
                    on_chunk(step, num_ended)
                if step >= sampling.max_tokens or num_ended == rows * num_responses:
                    break
        wanted = num_rows * num_responses
        tokens, logprobs, lengths, ended = jax.device_get(
            (state.tokens, state.logprobs, state.lengths, state.is_ended)
        )
        return Rollout(
            tokens=tokens[:wanted],
            logprobs=logprobs[:wanted],
            lengths=lengths[:wanted],
            ended=ended[:wanted],
        )

    def _pack(
        self, prompts: Sequence[Example]
    ) -> tuple[inputs.TextInput, inputs.VisionInput | None]:
        """Lay one prompt a row; the last is repeated until the rows divide over the mesh."""
        parts = self._row_parts()
        padding = -len(prompts) % parts
        rows = [[prompt] for prompt in [*prompts, *[prompts[-1]] * padding]]
        each = len(rows) // parts
        groups = [rows[i : i + each] for i in range(0, len(rows), each)]
        patches = [sum(positions.num_patches(g) for [e] in row for g in e.grids) for row in groups]
        frames = [sum(grid[0] for [e] in row for grid in e.grids) for row in groups]
        text = inputs.pack_text(
            rows,
            config=self.config,
            row_tokens=self._row(max(len(e.tokens) for e in prompts), self.shapes.prompt_tokens),
            max_segments=2,
            num_vision_rows=parts,
        )
        vision = inputs.pack_vision(
            rows,
            config=self.config,
            row_patches=self._row(max(patches), self.shapes.row_patches),
            max_segments=_round_up(max(frames), self.shapes.row_images) + 1,
            num_vision_rows=parts,
        )
        return text, vision

    def _row(self, size: int, multiple: int) -> int:
        """Return the length of a row that attention in prefill can read."""
        kernel = _SPLASH_ROW if self.prefill_implementation == "splash" else 1
        return _round_up(_round_up(size, multiple), kernel)

    def _row_parts(self) -> int:
        """Return over how many parts of the mesh rows are spread."""
        if self.mesh is None:
            return 1
        axes = self.rules.mesh_axes("batch")
        return math.prod(
            self.mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ())
        )

    def _to_devices(
        self, text: inputs.TextInput, vision: inputs.VisionInput | None, keys: jax.Array
    ) -> tuple[inputs.TextInput, inputs.VisionInput | None, jax.Array]:
        """Put each row on its devices."""
        if self.mesh is None:
            return jax.tree.map(jax.numpy.asarray, (text, vision, keys))
        rows = self.rules.mesh_axes("batch")
        by_row = NamedSharding(self.mesh, PartitionSpec(rows))
        rows_second = NamedSharding(self.mesh, PartitionSpec(None, rows))
        places = jax.device_put(text.positions, rows_second)
        text, vision, keys = jax.device_put(
            (dataclasses.replace(text, positions=None), vision, keys), by_row
        )
        return dataclasses.replace(text, positions=places), vision, keys


def _round_up(size: int, multiple: int) -> int:
    return -(-max(size, 1) // multiple) * multiple
