"""Effects of docs/fidelity.md on scores and router: bfloat16 scores, a term without a gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.utils import checkpoint

from prism_jax.losses import advantage

Json = Any
_NUM_GROUPS, _NUM_RESPONSES, _EPS = 4000, 16, 1e-6
# Mean and deviation of a group's scores.
_SCORES = ((2.0, 0.1), (5.0, 0.1), (5.0, 0.02), (9.0, 0.1), (9.0, 1.0))


def bfloat16_scores() -> list[dict[str, Json]]:
    """Return the effect of rounding scores to bfloat16 on advantages, against float64."""
    rng = np.random.default_rng(0)
    results = []
    for mean, deviation in _SCORES:
        exact = mean + deviation * rng.normal(size=(_NUM_GROUPS, _NUM_RESPONSES))
        wanted = exact - exact.mean(-1, keepdims=True)
        wanted /= exact.std(-1, ddof=1, keepdims=True) + _EPS
        single = exact.astype(np.float32)
        rounded = torch.from_numpy(single).bfloat16().float().numpy()
        got = _advantages(rounded)
        ties = [len(set(group)) < _NUM_RESPONSES for group in rounded]
        results.append(
            {
                "mean": mean,
                "deviation": deviation,
                "released_error_rms": float(np.sqrt(np.square(got - wanted).mean())),
                "our_error_rms": float(np.sqrt(np.square(_advantages(single) - wanted).mean())),
                "released_groups_with_a_tie": float(np.mean(ties)),
                "released_wrong_signs": float((got * wanted < 0).mean()),
            }
        )
    return results


def _advantages(scores: np.ndarray) -> np.ndarray:
    given = advantage.AlignmentScores(
        prompt_id=jnp.repeat(jnp.arange(_NUM_GROUPS), _NUM_RESPONSES),
        by_segment={"cot": jnp.asarray(scores.reshape(-1))},
        format_ok=jnp.ones(scores.size, bool),
        accuracy=None,
    )
    compare = jax.jit(
        lambda given: advantage.align(
            given, num_groups=_NUM_GROUPS, eps=_EPS, weights={"cot": 1.0}, format_penalty=1.5
        )
    )
    return np.asarray(compare(given)).reshape(scores.shape)


class _Layer(torch.nn.Module):
    """A router over four experts, whose logits are recorded as transformers 4.57.0 does it."""

    def __init__(self):
        super().__init__()
        self.router = torch.nn.Linear(16, 4, bias=False)
        self.experts = torch.nn.Linear(16, 4 * 16, bias=False)
        self.recorded: list[torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.router(x)
        if self.recorded is not None:
            self.recorded.append(logits)
        each = self.experts(x).reshape(*x.shape[:-1], 4, 16)
        return x + (logits.softmax(-1)[..., None] * each).sum(-2)


def router_term() -> dict[str, Json]:
    """Item 10: return whether a load balance of recorded logits has a gradient under checkpointing.

    The logits are recorded in the first pass; the recording ends before the backward pass computes
    the layer again.
    """
    return {
        name: _router_gradient(use_reentrant=is_reentrant)
        for name, is_reentrant in (("reentrant", True), ("not_reentrant", False))
    }


def _router_gradient(*, use_reentrant: bool) -> dict[str, Json]:
    gradients, has_gradient, value = [], None, None
    for coefficient in (0.0, 0.01):
        torch.manual_seed(0)
        layer = _Layer()
        x = torch.randn(64, 16, requires_grad=True)
        layer.recorded = recorded = []
        y = checkpoint.checkpoint(layer, x, use_reentrant=use_reentrant)
        layer.recorded = None
        weights = recorded[0].softmax(-1)
        chosen = torch.nn.functional.one_hot(weights.topk(2).indices, 4).sum(-2).float()
        balance = 4 * (chosen.mean(0) * weights.mean(0)).sum()
        has_gradient, value = balance.requires_grad, balance.item()
        (y.square().mean() + coefficient * balance).backward()
        gradients.append(layer.router.weight.grad)
    return {
        "value": value,
        "has_gradient": has_gradient,
        "changes_the_routers_gradient": not torch.equal(*gradients),
    }
