"""The section of the pair loss, which warm-up and alignment share."""

import dataclasses

from prism_jax import configuration
from prism_jax.discriminator import lengths as lengths_lib
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.losses import pairwise
from prism_jax.setup import models as setup_models


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs(configuration.Section):
    """The numbers of the pair loss; see `discriminator.loss.PairRule`."""

    score_clip: float | None
    regulariser: float
    router: float  # coefficient of the router's load balance; of no effect without experts
    length_beta: tuple[tuple[str, float], ...]  # segment, coefficient: see `correct_length`
    score_dtype: pairwise.ScoreDtype  # of the head and of the loss, see `losses.pairwise`
    head_dropout: float  # while learning

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = configuration.at_least(self, 0, "regulariser", "router")
        if self.score_clip is not None and not self.score_clip > 0:
            problems.append(f"score_clip must be > 0 or None, got {self.score_clip}")
        if not 0 <= self.head_dropout < 1:
            problems.append(f"head_dropout must be in [0, 1), got {self.head_dropout}")
        return problems

    def is_split_seen(self, model: setup_models.Model) -> bool:
        """Return whether the training depends on the split of a step into microbatches."""
        has_router = self.router > 0 and model.config.text.moe is not None
        return has_router or self.head_dropout > 0

    def pair_rule(
        self,
        model: setup_models.Model,
        *,
        microbatch_pairs: int | None,
        all_invalid: pairwise.AllInvalid,
        lengths: lengths_lib.PairLengths,
    ) -> discriminator_loss.PairRule:
        """Return the rule of the loss for this discriminator."""
        return discriminator_loss.PairRule(
            score_clip=self.score_clip,
            regulariser=self.regulariser,
            router=self.router if model.config.text.moe is not None else 0.0,
            length_beta=self.length_beta,
            microbatch_pairs=microbatch_pairs,
            all_invalid=all_invalid,
            score_dtype=self.score_dtype,
            match_ratio=lengths.match_ratio,
        )
