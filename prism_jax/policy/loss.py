"""The policy's loss over packed responses, for `training.train_step.make_train_step`.

Hidden states at the places that predict a response token go through the head, nothing else does;
the log-probs are then laid out one response a row, the form that `losses.policy` reads:

    row        P P P a b c  Q Q d e  .         P, Q prompts, a … e response tokens
    hidden         * * *      * *              predict a b c, d e
    logprobs   [a b c], [d e .]                float32[responses, max_response_tokens]

With one update after each rollout the old log-probs are the new ones without their gradient, and no
other forward pass is needed. With several, `make_logprobs` computes them before the first. The
responses carried over from an earlier step (`PolicyBatch.is_older`) are those of an older policy:
their old log-probs are the sampler's of that time, so ratio and clip are those of PPO.

An open teacher adds to the advantages or to the loss, see `policy.teaching`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from models import attention
from models.text import Remat
from prism_jax import configuration, metrics
from prism_jax.losses import kl, logprob, mismatch, policy, reduce
from prism_jax.policy import hidden as policy_hidden
from prism_jax.policy import teaching as teaching_lib
from prism_jax.policy.batch import PolicyBatch
from prism_jax.training import train_step

TERM = "policy"
KL_TERM = "reference_kl"
TEACHER_TERM = "teacher"
# The aggregations of `reduce`, plus "official": the token mean of each packed row, rows weighted by
# their number of responses. It depends on the packing, as it did on GPUs in the release.
# Source: PRISM verl/verl/workers/actor/dp_actor.py:434.
Aggregation = Literal[
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "official",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weighing(configuration.Section):
    """The weights of response tokens in the loss."""

    aggregation: Aggregation
    norm_tokens: int | None
    # Each token weighs trainer probability / sampler probability: at most `sampler_high`
    # ("truncate"), or 0 out of [sampler_low, sampler_high] ("mask").
    sampler_weights: Literal["off", "truncate", "mask"]
    sampler_level: Literal["token", "sequence"]  # of the ratio, see `losses.mismatch`
    sampler_low: float | None
    sampler_high: float | None

    def problems(self) -> list[str]:
        """See `configuration.Section`."""
        problems = []
        if (self.norm_tokens is None) == (self.aggregation == "seq-mean-token-sum-norm"):
            problems.append(
                "norm_tokens must be given for the aggregation seq-mean-token-sum-norm and be "
                f"None for any other, got {self.norm_tokens} with {self.aggregation}"
            )
        if (self.sampler_high is None) != (self.sampler_weights == "off"):
            problems.append(
                "sampler_high must be given for the sampler_weights 'truncate' and 'mask' and be "
                f"None for 'off', got {self.sampler_high}"
            )
        if (self.sampler_low is None) == (self.sampler_weights == "mask"):
            problems.append(
                "sampler_low must be given for the sampler_weights 'mask' and be None otherwise, "
                f"got {self.sampler_low}"
            )
        return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm(Weighing):
    """A loss of `losses.policy` and its numbers; a number that the loss does not read is None."""

    loss: Literal["ppo", "gspo", "cispo", "reinforce"]
    clip_low: float | None
    clip_high: float | None
    dual_clip: float | None

    def problems(self) -> list[str]:
        """See `configuration.Section`."""
        needed = {"clip_low": ("ppo", "gspo"), "clip_high": ("ppo", "gspo", "cispo")}
        optional = {"clip_low": ("cispo",), "dual_clip": ("ppo",)}
        problems = []
        for name, value in dataclasses.asdict(self).items():
            if name not in ("clip_low", "clip_high", "dual_clip"):
                continue
            is_needed = self.loss in needed.get(name, ())
            if value is None and is_needed:
                problems.append(f"{name} must be given for {self.loss}, got None")
            if value is not None and not is_needed and self.loss not in optional.get(name, ()):
                problems.append(f"{name} must be None for {self.loss}, got {value}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            problems.append(f"dual_clip must be > 1 or None, got {self.dual_clip}")
        return problems + super().problems()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kl:
    """The distance from a reference policy in the loss."""

    estimator: kl.LossEstimator
    coefficient: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The computation of the loss; none of it changes the value."""

    temperature: float  # of the sampler: log-probs are those of softmax(logits / temperature)
    max_response_tokens: int
    chunk_tokens: int  # through the head at once
    has_entropy: bool  # measure the policy's entropy
    implementation: attention.Implementation
    remat: Remat

    @property
    def through_head(self) -> dict[str, Any]:
        """Return how hidden states go through a head."""
        return {"temperature": self.temperature, "chunk_tokens": self.chunk_tokens}


def weights(
    batch: PolicyBatch,
    algorithm: Algorithm,
    settings: Settings,
    reference: Kl | None,
    teaching: teaching_lib.Teaching | None = None,
) -> dict[str, jax.Array]:
    """Return the weight of each term over the whole batch, from its masks alone."""
    mask = _mask(batch.lengths, settings)
    weight = reduce.weight(mask, **_aggregation(algorithm))
    return dict.fromkeys(coefficients(reference, teaching), weight)


def coefficients(
    reference: Kl | None, teaching: teaching_lib.Teaching | None = None
) -> dict[str, float]:
    """Return the factor of each term."""
    factors = {TERM: 1.0} | ({} if reference is None else {KL_TERM: reference.coefficient})
    # That of the teacher changes from step to step, and is in the term already.
    return factors | ({TEACHER_TERM: 1.0} if teaching is not None and teaching.has_term else {})


def loss(
    model: nnx.Module,
    batch: PolicyBatch,
    algorithm: Algorithm,
    settings: Settings,
    reference: Kl | None,
    teaching: teaching_lib.Teaching | None = None,
    lesson: teaching_lib.Lesson | None = None,
) -> tuple[train_step.Terms, metrics.Metrics]:
    """Return the loss of one microbatch [B, ...].

    Without `old_logprobs` it is strictly on-policy: the ratio is 1, except for older responses.

    Args:
      lesson: given exactly with `teaching`.
    """
    mask = _mask(batch.lengths, settings)
    shares = _row_shares(batch.lengths, mask) if algorithm.aggregation == "official" else None
    teacher = pull = None
    if teaching is not None:
        teacher = teaching_lib.read(teaching, lesson, batch, settings.implementation)
    if teacher is not None and teaching.has_term:
        weights = _place_weights(batch, shares, algorithm, settings)
        pull = teacher.pull(weights, **settings.through_head)
    logprobs, entropy, pulled = _outputs(model, batch, settings, pull)
    new = _by_response(logprobs, batch, settings)
    old, sampler, is_recent, logged = _before(new, batch, settings)
    advantages = _by_response(batch.advantages, batch, settings)
    terms = {}
    if pulled is not None:
        total, distances = pulled
        distances = _by_response(distances, batch, settings)
        weight = reduce.weight(mask, **_aggregation(algorithm))
        terms[TEACHER_TERM] = reduce.Sum(total=lesson.coefficient * total, weight=weight)
    elif teacher is not None:
        logprobs = teacher.logprobs(batch.tokens, **settings.through_head)
        distances = old - _by_response(logprobs, batch, settings)
        advantages -= lesson.coefficient * jnp.where(mask & lesson.is_given, distances, 0.0)
    if teacher is not None:
        logged["policy/teacher_kl"] = metrics.Mean.of(distances, mask & lesson.is_given)
    sampler_weights = _sampler_weights(algorithm, old, sampler, mask)
    token_weights = sampler_weights
    if shares is not None:
        token_weights = shares if sampler_weights is None else shares * sampler_weights
    terms[TERM], loss_metrics = _policy_loss(algorithm, new, old, advantages, mask, token_weights)
    logged |= loss_metrics | mismatch.measure(old, sampler, is_recent, sampler_weights)
    if reference is not None:
        terms[KL_TERM], kl_metrics = kl.loss(
            new,
            _by_response(batch.reference_logprobs, batch, settings),
            mask,
            estimator=reference.estimator,
            token_weights=shares,
            **_aggregation(algorithm),
        )
        logged |= kl_metrics
    if entropy is not None:
        entropy = _by_response(jax.lax.stop_gradient(entropy), batch, settings)
        logged["policy/entropy"] = metrics.Mean.of(entropy, mask)
    return terms, logged


def _before(
    new: jax.Array, batch: PolicyBatch, settings: Settings
) -> tuple[jax.Array, jax.Array, jax.Array, metrics.Metrics]:
    """Return the old log-probs, the sampler's, which tokens are this policy's, and metrics."""
    mask, logged = _mask(batch.lengths, settings), {}
    old = jax.lax.stop_gradient(new)
    if batch.old_logprobs is not None:
        old = _by_response(batch.old_logprobs, batch, settings)
    sampler = _by_response(batch.sampler_logprobs, batch, settings)
    if batch.is_older is None:
        return old, sampler, mask, logged
    # The policy has moved since it gave these responses. That is a metric by itself, and not
    # part of the distance between sampler and trainer, which should be rounding alone.
    is_older = batch.is_older.reshape(-1, 1)
    moved = jnp.abs(jax.lax.stop_gradient(new) - sampler)
    logged["policy/older_logprob_difference_mean"] = metrics.Mean.of(moved, mask & is_older)
    return jnp.where(is_older, sampler, old), sampler, mask & ~is_older, logged


def _place_weights(
    batch: PolicyBatch, shares: jax.Array | None, algorithm: Algorithm, settings: Settings
) -> jax.Array:
    """Return the weights of values [B, Z] in the total of a term, which is linear in them."""

    def total(values: jax.Array) -> jax.Array:
        values = _by_response(values, batch, settings)
        values = values if shares is None else values * shares
        mask = _mask(batch.lengths, settings)
        return reduce.aggregate(values, mask, **_aggregation(algorithm)).total

    return jax.grad(total)(jnp.zeros(batch.tokens.shape, jnp.float32))


@functools.cache
def make_logprobs(
    graphdef: nnx.GraphDef, settings: Settings
) -> Callable[[nnx.State, PolicyBatch], jax.Array]:
    """Return the jitted (params, batch) -> float32[M, B, Z], the response tokens' log-probs."""
    settings = dataclasses.replace(settings, has_entropy=False)

    def run(params: nnx.State, batch: PolicyBatch) -> jax.Array:
        def of_microbatch(_, microbatch: PolicyBatch):
            model = nnx.merge(graphdef, params)
            return None, response_logprobs(model, microbatch, settings)[0]

        # In the microbatches of the update: a forward pass over all rows would not fit memory.
        return jax.lax.scan(of_microbatch, None, batch)[1]

    return jax.jit(run)


def _aggregation(algorithm: Algorithm) -> dict[str, Any]:
    """Return the arguments of `reduce`; "official" is a sum with `_row_shares`."""
    is_official = algorithm.aggregation == "official"
    return {
        "aggregation": "seq-mean-token-sum" if is_official else algorithm.aggregation,
        "norm_tokens": algorithm.norm_tokens,
    }


def _row_shares(lengths: jax.Array, mask: jax.Array) -> jax.Array:
    """Return responses / tokens of the row [B, U] that each response lies in, as the mask's shape.

    A sum of token losses with these weights, over all responses, is the rows' means weighted by
    their responses.
    """
    num_responses = (lengths > 0).sum(-1, keepdims=True).astype(jnp.float32)
    num_tokens = jnp.maximum(lengths.sum(-1, keepdims=True), 1).astype(jnp.float32)
    shares = jnp.broadcast_to(num_responses / num_tokens, lengths.shape)
    return jnp.broadcast_to(shares.reshape(-1, 1), mask.shape)


def _sampler_weights(
    algorithm: Algorithm, old_logprobs: jax.Array, sampler_logprobs: jax.Array, mask: jax.Array
) -> jax.Array | None:
    """Return the weight that corrects each token for the sampler's log-probs; None: all 1."""
    if algorithm.sampler_weights == "off":
        return None
    ratio = mismatch.ratios(old_logprobs, sampler_logprobs, mask, level=algorithm.sampler_level)
    if algorithm.sampler_weights == "truncate":
        return mismatch.truncated_weights(ratio, high=algorithm.sampler_high)
    return mismatch.masked_weights(ratio, low=algorithm.sampler_low, high=algorithm.sampler_high)


def _policy_loss(
    algorithm: Algorithm,
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    token_weights: jax.Array | None,
) -> tuple[reduce.Sum, metrics.Metrics]:
    """Return the loss that the algorithm names. This is the one place where it is chosen."""
    shared = {"token_weights": token_weights} | _aggregation(algorithm)
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
    """Return log-prob and, with `has_entropy`, entropy of each response token, float32[B, Z].

    A microbatch without responses is not computed: its log-probs are 0.
    """
    return _outputs(model, batch, settings, None)[:2]


def _outputs(
    model: nnx.Module,
    batch: PolicyBatch,
    settings: Settings,
    pull: Callable[[jax.Array, jax.Array], Any] | None,
) -> tuple[jax.Array, jax.Array | None, Any]:
    """Return `response_logprobs`, and what `pull` makes of the hidden states and the head."""
    graphdef, params = nnx.split(model)

    def forward(params: nnx.State) -> tuple[jax.Array, jax.Array | None, Any]:
        model = nnx.merge(graphdef, params)
        hidden = policy_hidden.at_predictors(
            model, batch, implementation=settings.implementation, remat=settings.remat
        )
        by_token = logprob.token_logprobs(
            hidden,
            model.head(),
            batch.tokens.reshape(-1),
            with_entropy=settings.has_entropy,
            **settings.through_head,
        )
        by_token = jax.tree.map(lambda x: x.reshape(batch.tokens.shape), by_token)
        return *by_token, None if pull is None else pull(hidden, model.head())

    def nothing(params: nnx.State) -> tuple[jax.Array, jax.Array | None, Any]:
        shapes = jax.eval_shape(forward, params)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    return jax.lax.cond((batch.lengths > 0).any(), forward, nothing, params)


def _mask(lengths: jax.Array, settings: Settings) -> jax.Array:
    """Return bool[responses, max_response_tokens], True on the tokens of each response."""
    return jnp.arange(settings.max_response_tokens) < lengths.reshape(-1, 1)


def _by_response(values: jax.Array, batch: PolicyBatch, settings: Settings) -> jax.Array:
    """Return values [B, Z] as [B * U, max_response_tokens]; beyond the mask they are arbitrary."""
    places = batch.offsets[..., None] + jnp.arange(settings.max_response_tokens)
    places = jnp.minimum(places, values.shape[1] - 1).reshape(values.shape[0], -1)
    laid_out = jnp.take_along_axis(values, places, axis=1)
    return laid_out.reshape(-1, settings.max_response_tokens)
