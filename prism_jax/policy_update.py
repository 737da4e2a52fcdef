"""The policy's loss over packed responses, for `train_step.make_train_step`.

A row holds several prompts with their responses. Hidden states at the places that predict a
response token go through the head, nothing else does; the log-probs are then laid out one response
a row, the form that `losses.policy` reads:

    row        P P P a b c  Q Q d e  .         P, Q prompts, a … e response tokens
    hidden         * * *      * *              predict a b c, d e
    logprobs   [a b c], [d e .]                float32[responses, max_response_tokens]
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import attention
from models.config import Qwen3VLConfig
from models.inputs import Example
from models.text import Remat
from prism_jax import configuration, continuations, metrics, train_step
from prism_jax.continuations import Continuation, RowShape
from prism_jax.losses import logprob, mismatch, policy, reduce

TERM = "policy"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm(configuration.Section):
    """Name a loss of `losses.policy` and its numbers; what that loss does not read is None."""

    loss: Literal["ppo", "gspo", "cispo", "reinforce"]
    clip_low: float | None
    clip_high: float | None
    dual_clip: float | None
    aggregation: reduce.Aggregation
    norm_tokens: int | None

    def problems(self) -> list[str]:
        """See `configuration.Section`."""
        needed = {"clip_low": ("ppo", "gspo"), "clip_high": ("ppo", "gspo", "cispo")}
        optional = {"clip_low": ("cispo",), "dual_clip": ("ppo",)}
        found = []
        for name, value in dataclasses.asdict(self).items():
            if name not in ("clip_low", "clip_high", "dual_clip"):
                continue
            is_needed = self.loss in needed.get(name, ())
            if value is None and is_needed:
                found.append(f"{name} must be given for {self.loss}, got None")
            if value is not None and not is_needed and self.loss not in optional.get(name, ()):
                found.append(f"{name} must be None for {self.loss}, got {value}")
        if (self.norm_tokens is None) == (self.aggregation == "seq-mean-token-sum-norm"):
            found.append(
                "norm_tokens must be given for the aggregation seq-mean-token-sum-norm and be "
                f"None for any other, got {self.norm_tokens} with {self.aggregation}"
            )
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Hold how the loss is computed; none of it changes what the loss is."""

    temperature: float  # of the sampler: log-probs are those of softmax(logits / temperature)
    max_response_tokens: int
    chunk_tokens: int  # through the head at once
    with_entropy: bool  # measure the policy's entropy
    implementation: attention.Implementation
    remat: Remat


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyBatch:
    """Hold packed responses in M microbatches of B rows, each with S places for responses.

    K is the room for response tokens in a row, those of a response side by side.
    """

    text: Any  # TextInput [M, B, T]
    vision: Any  # VisionInput [M, B, P] or None
    predictors: Any  # int32[M, B, K]  place in the row that predicts this response token
    tokens: Any  # int32[M, B, K]  the response tokens
    sampler_logprobs: Any  # float32[M, B, K]  from when they were drawn
    offsets: Any  # int32[M, B, S]  first token of each response in K
    lengths: Any  # int32[M, B, S]  its tokens; 0 where there is no response
    advantages: Any  # float32[M, B, S]


def pack(
    prompts: Sequence[Example],
    responses: Sequence[Continuation],
    logprobs: Sequence[np.ndarray],
    advantages: np.ndarray,
    shape: RowShape,
    config: Qwen3VLConfig,
) -> PolicyBatch:
    """Lay prompts with their responses into rows.

    A response that is to count nowhere (overlong filtering) is left out by the caller.

    Args:
      logprobs: float32[n] of the sampler for each response's tokens.
      advantages: float32[N], one a response.
    """
    packed = continuations.pack(prompts, [[response] for response in responses], shape, config)
    by_token = (shape.num_rows, shape.row_continued_tokens)
    by_response = (shape.num_rows, shape.row_sequences)
    predictors, tokens = np.zeros(by_token, np.int32), np.zeros(by_token, np.int32)
    sampler_logprobs = np.zeros(by_token, np.float32)
    offsets, lengths = np.zeros(by_response, np.int32), np.zeros(by_response, np.int32)
    kept_advantages = np.zeros(by_response, np.float32)
    for number, place in enumerate(packed.places):
        part = slice(place.offset, place.offset + place.num_tokens)
        predictors[place.row, part] = place.start - 1 + np.arange(place.num_tokens)
        tokens[place.row, part] = responses[number].tokens
        sampler_logprobs[place.row, part] = logprobs[number]
        offsets[place.row, place.slot] = place.offset
        lengths[place.row, place.slot] = place.num_tokens
        kept_advantages[place.row, place.slot] = advantages[number]
    arrays = {
        "predictors": predictors,
        "tokens": tokens,
        "sampler_logprobs": sampler_logprobs,
        "offsets": offsets,
        "lengths": lengths,
        "advantages": kept_advantages,
    }
    return PolicyBatch(text=packed.text, vision=packed.vision, **continuations.split(arrays, shape))


def weights(batch: PolicyBatch, algorithm: Algorithm, settings: Settings) -> dict[str, jax.Array]:
    """Return the weight of the loss over the whole batch, from its masks alone."""
    mask = _mask(batch.lengths, settings)
    return {
        TERM: reduce.weight(
            mask, aggregation=algorithm.aggregation, norm_tokens=algorithm.norm_tokens
        )
    }


def loss(
    model: nnx.Module, batch: PolicyBatch, algorithm: Algorithm, settings: Settings
) -> tuple[train_step.Terms, metrics.Metrics]:
    """Return the loss of one microbatch [B, ...], strictly on-policy: the ratio is 1.

    One update follows each rollout, so the old log-probs are the new ones without their gradient
    and no other forward pass is needed. How far the sampler's log-probs are from the trainer's is
    always measured.
    """
    logprobs, entropy = response_logprobs(model, batch, settings)
    mask = _mask(batch.lengths, settings)
    kept = _by_response(logprobs, batch, settings)
    advantages = batch.advantages.reshape(-1, 1)
    sampler = _by_response(batch.sampler_logprobs, batch, settings)
    term, told = _policy_loss(algorithm, kept, jax.lax.stop_gradient(kept), advantages, mask)
    told |= mismatch.measure(kept, sampler, mask, None)
    if entropy is not None:
        entropy = _by_response(jax.lax.stop_gradient(entropy), batch, settings)
        told["policy/entropy"] = metrics.Mean.of(entropy, mask)
    return {TERM: term}, told


def _policy_loss(
    algorithm: Algorithm,
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
) -> tuple[reduce.Sum, metrics.Metrics]:
    """Call the loss that the algorithm names: the one place where it is chosen."""
    shared = {
        "token_weights": None,
        "aggregation": algorithm.aggregation,
        "norm_tokens": algorithm.norm_tokens,
    }
    if algorithm.loss == "reinforce":
        return policy.reinforce(logprobs, advantages, mask, **shared)
    shared |= {"clip_low": algorithm.clip_low, "clip_high": algorithm.clip_high}
    if algorithm.loss == "gspo":
        return policy.gspo(logprobs, old_logprobs, advantages, mask, **shared)
    if algorithm.loss == "cispo":
        return policy.cispo(logprobs, old_logprobs, advantages, mask, **shared)
    return policy.ppo(
        logprobs, old_logprobs, advantages, mask, dual_clip=algorithm.dual_clip, **shared
    )


def response_logprobs(
    model: nnx.Module, batch: PolicyBatch, settings: Settings
) -> tuple[jax.Array, jax.Array | None]:
    """Return log-prob and (when asked) entropy of each response token, float32[B, K].

    A microbatch without responses is not computed: its log-probs are 0.
    """
    graphdef, params = nnx.split(model)

    def forward(params: nnx.State) -> tuple[jax.Array, jax.Array | None]:
        model = nnx.merge(graphdef, params)
        hidden, _ = model(
            batch.text,
            batch.vision,
            implementation=settings.implementation,
            remat=settings.remat,
        )
        hidden = jnp.take_along_axis(hidden, batch.predictors[..., None], axis=1)
        found = logprob.token_logprobs(
            hidden.reshape(-1, hidden.shape[-1]),
            model.head(),
            batch.tokens.reshape(-1),
            temperature=settings.temperature,
            chunk_tokens=settings.chunk_tokens,
            with_entropy=settings.with_entropy,
        )
        return jax.tree.map(lambda x: x.reshape(batch.tokens.shape), found)

    def nothing(params: nnx.State) -> tuple[jax.Array, jax.Array | None]:
        del params
        zeros = jnp.zeros(batch.tokens.shape, jnp.float32)
        return zeros, zeros if settings.with_entropy else None

    return jax.lax.cond((batch.lengths > 0).any(), forward, nothing, params)


def _mask(lengths: jax.Array, settings: Settings) -> jax.Array:
    """Return bool[responses, max_response_tokens], True on the tokens of each response."""
    return jnp.arange(settings.max_response_tokens) < lengths.reshape(-1, 1)


def _by_response(values: jax.Array, batch: PolicyBatch, settings: Settings) -> jax.Array:
    """Lay values [B, K] out as [B * S, max_response_tokens]; the mask says which of them count."""
    places = batch.offsets[..., None] + jnp.arange(settings.max_response_tokens)
    places = jnp.minimum(places, values.shape[1] - 1).reshape(values.shape[0], -1)
    laid_out = jnp.take_along_axis(values, places, axis=1)
    return laid_out.reshape(-1, settings.max_response_tokens)
