"""Scores of a discriminator: a prompt and a response, scored segment by segment.

    {"messages": [...], "response": "<caption>…</caption><think>…", "view": "caption_cot"}
    {"format_ok": true, "scores": {"caption": 0.7, "cot": -0.2}, …}

A malformed response has no segments, as in alignment: `format_ok` is false and `scores` is null.
"""

import asyncio
import concurrent.futures
import dataclasses
import pathlib
import secrets
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from models.config import Qwen3VLConfig
from models.inputs import Example
from prism_jax import batches
from prism_jax.checkpoints import pretrained
from prism_jax.commands import loaded
from prism_jax.commands.serve import chat_request
from prism_jax.commands.serve.encoding import Encoder
from prism_jax.commands.serve.exchange import Reply
from prism_jax.commands.serve.fields import Fields
from prism_jax.commands.serve.refusals import Refusal
from prism_jax.data import processor, records
from prism_jax.discriminator import batch as discriminator_batch
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.discriminator import segments
from prism_jax.rewards import tags
from prism_jax.rollout import prefill
from prism_jax.rows import RowShape

# Rows have powers of two of tokens and patches, so that few shapes are compiled.
_LEAST_TOKENS, _LEAST_PATCHES, _LEAST_FRAMES = 256, 256, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How the discriminator reads responses; as in its training."""

    gate: tags.Gate
    scored_token: segments.ScoredToken
    positions: discriminator_batch.Positions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Discriminator:
    """A discriminator in memory."""

    config: Qwen3VLConfig
    params: nnx.State
    score: Callable[[nnx.State, discriminator_batch.SegmentBatch], jax.Array]
    place: loaded.Place

    @classmethod
    def load(
        cls, folder: pathlib.Path, place: loaded.Place, say: Callable[[str], None]
    ) -> "Discriminator":
        """Read a discriminator from a folder of any form.

        Raises:
          InputError: the folder is not safe and whole, or holds a policy.
        """
        begun = time.perf_counter()
        source = pretrained.Source.of(folder, role="discriminator")
        _, config = pretrained.config_of(source.files)
        dtype = jax.numpy.dtype(source.dtype) if place.dtype is None else place.dtype
        graphdef, params = pretrained.abstract(
            config, is_discriminator=True, rules=place.rules, dtype=dtype, param_dtype=dtype
        )
        params = source.load(params, shardings=place.shardings(params), param_dtype=place.dtype)
        jax.block_until_ready(params)
        settings = discriminator_loss.Settings(
            implementation=place.prefill, remat="none", head_dropout=0.0, score_dtype="float32"
        )
        say(f"loaded {folder} in {time.perf_counter() - begun:.1f} s: {dtype.name}")
        return cls(
            config=config,
            params=params,
            score=discriminator_loss.make_scorer(graphdef, settings),
            place=place,
        )

    def scores(
        self,
        prompt: Example,
        cut: segments.Cut,
        form: segments.Form,
        positions: discriminator_batch.Positions,
    ) -> np.ndarray:
        """Return the score of each segment of the view."""
        names = form.names
        packed = discriminator_batch.segment_rows(
            [prompt],
            [[segments.continuation(0, cut, name)] for name in names],
            range(len(names)),
            form.kinds,
            self._shape(prompt, cut, len(names)),
            self.config,
            positions=positions,
        )
        batch = packed.batch
        if self.place.mesh is not None:
            batch = batches.to_devices(batch, self.place.mesh, self.place.rules, num_rows=1)
        return packed.read(jax.device_get(self.score(self.params, batch)))

    def _shape(self, prompt: Example, cut: segments.Cut, num_segments: int) -> RowShape:
        tokens, patches, frames = prefill.measure(prompt)
        # Every segment repeats the tokens of the prompt.
        row_tokens = _bucket(num_segments * (tokens + cut.longest), _LEAST_TOKENS)
        has_vision = self.config.vision is not None
        return RowShape(
            num_microbatches=1,
            microbatch_rows=1,
            row_tokens=row_tokens,
            row_sequences=num_segments,
            row_continued_tokens=row_tokens,
            row_patches=_bucket(patches, _LEAST_PATCHES) if has_vision else 0,
            row_frames=_bucket(frames, _LEAST_FRAMES),
            row_prompt_tokens=None,
            row_prompts=None,
        )


class Score:
    """The discriminator behind `/v1/score`."""

    def __init__(
        self,
        *,
        name: str,
        encoder: Encoder,
        words: processor.Processor,
        discriminator: Discriminator,
        reading: Reading,
        limits: chat_request.Limits,
    ):
        self._name, self._encoder, self._discriminator = name, encoder, discriminator
        self._reading, self._limits = reading, limits
        self._forms: dict[str, segments.Form] = {
            view: segments.Form(
                view=view, scored_token=reading.scored_token, teacher_max_tokens=None
            )
            for view in segments.VIEWS
        }
        vocab_tokens = discriminator.config.text.vocab_size
        self._readers = {
            view: segments.Reader(words, vocab_tokens=vocab_tokens, gate=reading.gate, form=form)
            for view, form in self._forms.items()
        }
        # The device scores one request after the other.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "scorer")

    async def __call__(self, value: Any, begun: float, reply: Reply) -> None:
        """Answer a request; see `exchange.Work`."""
        del begun
        fields = Fields(value, "")
        chat_request.take_model(fields, self._name)
        prompt = chat_request.read_prompt(fields, self._limits)
        response = chat_request.checked(fields, "response", fields.needed("response"))
        view = fields.choice("view", list(segments.VIEWS)) or "caption_cot"
        fields.text("user")
        fields.close()
        sees_images = self._discriminator.config.vision is not None
        example = await self._encoder.encode(prompt, sees_images=sees_images)
        loop = asyncio.get_running_loop()
        cut, scores = await loop.run_in_executor(self._thread, self._score, example, response, view)
        num_tokens = 0 if cut is None else sum(map(len, cut.tokens.values()))
        await reply.whole(
            {
                "id": f"score-{secrets.token_hex(12)}",
                "object": "score",
                "created": int(time.time()),
                "model": self._name,
                "view": view,
                "format_ok": cut is not None,
                "scores": scores,
                "usage": {
                    "prompt_tokens": len(example.tokens),
                    "response_tokens": num_tokens,
                    "total_tokens": len(example.tokens) + num_tokens,
                },
            }
        )

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown()

    def _score(
        self, prompt: Example, response: str, view: segments.View
    ) -> tuple[segments.Cut | None, dict[str, float] | None]:
        """Return the segments of a response and their scores; None twice if it is malformed."""
        limit = self._limits.max_tokens
        form = self._forms[view]
        try:
            cut = self._readers[view].student(segments.Text.of_whole(response))
        except records.RowError:
            return None, None
        if cut.longest > limit:
            raise Refusal(
                f"response must have at most {limit} tokens, got {cut.longest}", field="response"
            )
        scores = self._discriminator.scores(prompt, cut, form, self._reading.positions)
        if not np.isfinite(scores).all():
            raise Refusal("the scores of this model are not finite", status=500, code="not_finite")
        return cut, dict(zip(form.names, map(float, scores), strict=True))


def _bucket(size: int, least: int) -> int:
    """Return the power of two that holds the size."""
    return max(least, 1 << (max(size, 1) - 1).bit_length())
