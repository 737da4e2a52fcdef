"""An open teacher in the policy's loss: it reads the rows of the update, in the same microbatch.

    kind      effect on each response token
    k1        advantage += coefficient × (log p_teacher(token) − log p_old(token))
    forward   loss += coefficient × KL(teacher ‖ policy), over the whole vocabulary
    reverse   loss += coefficient × KL(policy ‖ teacher)
    jsd       loss += coefficient × the generalised Jensen-Shannon divergence

k1 is an estimate of the reverse KL from the one token that was sampled: its policy gradient has the
mean of that of `reverse` at each place, and a variance. Both need tokens of the policy itself. The
teacher has no gradient, and nothing of it is kept between microbatches. A coefficient of 0 skips
its forward pass in the same program.
Source: arXiv 2306.13649 (GKD, on-policy distillation); 2306.08543 (reverse KL).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from models import attention
from prism_jax.losses import divergence, logprob
from prism_jax.policy import hidden as policy_hidden
from prism_jax.policy.batch import PolicyBatch

Kind = Literal["k1", "forward", "reverse", "jsd"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teaching:
    """The part of a teacher in the loss."""

    graphdef: nnx.GraphDef  # of the teacher
    kind: Kind
    teacher_share: float | None  # of the mixture of "jsd", see `losses.divergence`

    @property
    def has_term(self) -> bool:
        """Return whether the loss has a term of its own for the teacher."""
        return self.kind != "k1"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Lesson:
    """The arrays of a teacher, the same for all microbatches of an update."""

    params: Any  # of the teacher
    coefficient: Any  # float32[]

    @property
    def is_given(self) -> jax.Array:
        """Return bool[], whether the teacher counts in this update."""
        return self.coefficient > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """A teacher that has read a microbatch."""

    kind: Kind
    teacher_share: float | None
    is_given: jax.Array
    hidden: jax.Array  # [B * Z, F] behind each response token; zeros where it does not count
    head: jax.Array  # [V, F]

    def pull(
        self, weights: jax.Array, *, temperature: float, chunk_tokens: int
    ) -> Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        """Return (hidden, head) of the policy -> the weighted sum of divergences, and each, [B, Z].

        Args:
          weights: float32[B, Z] of the divergences in the sum.
        """

        def measure(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
            total, values = divergence.weighted_divergences(
                hidden,
                head,
                self.hidden,
                self.head,
                weights.reshape(-1),
                divergence=self.kind,
                teacher_share=self.teacher_share,
                temperature=temperature,
                chunk_tokens=chunk_tokens,
            )
            return total, values.reshape(weights.shape)

        def nothing(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
            del hidden, head
            return jnp.zeros(()), jnp.zeros(weights.shape)

        return lambda hidden, head: jax.lax.cond(self.is_given, measure, nothing, hidden, head)

    def logprobs(self, tokens: jax.Array, *, temperature: float, chunk_tokens: int) -> jax.Array:
        """Return the log-prob of each response token, float32[B, Z]; 0 where it does not count."""

        def measure(hidden: jax.Array, head: jax.Array) -> jax.Array:
            by_token, _ = logprob.token_logprobs(
                hidden,
                head,
                tokens.reshape(-1),
                temperature=temperature,
                chunk_tokens=chunk_tokens,
                with_entropy=False,
            )
            return by_token.reshape(tokens.shape)

        def nothing(hidden: jax.Array, head: jax.Array) -> jax.Array:
            del hidden, head
            return jnp.zeros(tokens.shape)

        return jax.lax.cond(self.is_given, measure, nothing, self.hidden, self.head)


def read(
    teaching: Teaching,
    lesson: Lesson,
    batch: PolicyBatch,
    implementation: attention.Implementation,
) -> Teacher:
    """Let the teacher read a microbatch; nothing is computed where it does not count."""
    params = jax.lax.stop_gradient(lesson.params)

    def hidden_states(params: nnx.State) -> jax.Array:
        model = nnx.merge(teaching.graphdef, params)
        return policy_hidden.at_predictors(
            model, batch, implementation=implementation, remat="none"
        )

    def nothing(params: nnx.State) -> jax.Array:
        shape = jax.eval_shape(hidden_states, params)
        return jnp.zeros(shape.shape, shape.dtype)

    is_needed = lesson.is_given & (batch.lengths > 0).any()
    return Teacher(
        kind=teaching.kind,
        teacher_share=teaching.teacher_share,
        is_given=lesson.is_given,
        hidden=jax.lax.cond(is_needed, hidden_states, nothing, params),
        head=nnx.merge(teaching.graphdef, params).head(),
    )
