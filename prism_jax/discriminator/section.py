"""The section of a discriminator that learns with the policy."""

import dataclasses

import jax
import jax.numpy as jnp

from prism_jax import configuration
from prism_jax.discriminator import batch as discriminator_batch
from prism_jax.discriminator import config as discriminator_config
from prism_jax.discriminator import lengths as lengths_lib
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.discriminator import segments, steadying
from prism_jax.losses import pairwise
from prism_jax.setup import models as setup_models
from prism_jax.setup import row_shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Discriminator(configuration.Trained, discriminator_config.Pairs):
    """The discriminator: its origin, its view of a response, and its updates.

    `folder` is the workdir of `warmup` or `align`, or a folder with a score head. Types and
    attention are those of `config.model`. With `head_dropout` each update computes its scores anew.
    """

    sees_images: bool  # False: prompts are read without their pictures
    min_pixels: int | None  # of a picture, others are scaled; None: as in its folder
    max_pixels: int | None
    view: segments.View  # the segments that are scored, see `discriminator.segments`
    scored_token: segments.ScoredToken  # the token that carries the score, see there
    teacher_max_tokens: int | None  # of a segment; the rest is not read
    positions: discriminator_batch.Positions
    # None: the loss is a mean over all pairs of a step; n: over those among n responses each,
    # averaged over responses.
    microbatch_pairs: int | None
    all_invalid: pairwise.AllInvalid  # the loss of a step without a pair, see `losses.pairwise`
    rows: row_shapes.Rows
    optim: configuration.Optim
    lengths: lengths_lib.Lengths  # see `discriminator.lengths`
    steadying: steadying.Steadying  # see there

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = configuration.Trained.problems(self)
        problems += discriminator_config.Pairs.problems(self)
        problems += configuration.at_least(self, 1, "teacher_max_tokens", "microbatch_pairs")
        problems += segments.problems_of_length("length_beta", self.length_beta, self.view)
        return problems + self._problems_of_lengths()

    def _problems_of_lengths(self) -> list[str]:
        problems, options = [], self.lengths
        if options.is_fitted and self.length_beta:
            problems.append(
                f"length_beta must be empty where lengths.is_fitted, got {self.length_beta}"
            )
        if options.is_fitted and (self.microbatch_pairs or self.score_dtype != "float32"):
            problems.append(
                "lengths.is_fitted needs microbatch_pairs = None and score_dtype = 'float32', the "
                f"fit is over a whole step, got {self.microbatch_pairs} and {self.score_dtype!r}"
            )
        if options.swap_coefficient is not None and not self.sees_images:
            problems.append("lengths.swap_coefficient must be None without pictures, sees_images")
        if options.swap_coefficient is not None and self.rows.has_shared_prompts:
            problems.append(
                "rows.has_shared_prompts must be False with lengths.swap_coefficient: a prompt "
                "with another picture stands once, with one segment"
            )
        return problems

    def is_split_seen(self, model: setup_models.Model) -> bool:
        """See `config.Pairs`; the noise of a gradient penalty follows the split, too."""
        has_noise = self.steadying.penalty is not None
        return has_noise or discriminator_config.Pairs.is_split_seen(self, model)

    @property
    def form(self) -> segments.Form:
        """Return the form of segments."""
        return segments.Form(
            view=self.view,
            scored_token=self.scored_token,
            teacher_max_tokens=self.teacher_max_tokens,
        )

    def model(self, policy: configuration.Model) -> configuration.Model:
        """Return the section of the model, computed as the policy is, but trained whole."""
        return dataclasses.replace(
            policy,
            folder=self.folder,
            init=self.init,
            sizes=self.sizes,
            remat=self.remat,
            lora=configuration.NO_LORA,
            step=None,
        )

    def rule(self, model: setup_models.Model) -> discriminator_loss.PairRule:
        """Return the rule of the loss for this discriminator."""
        rule = self.pair_rule(
            model,
            microbatch_pairs=self.microbatch_pairs,
            all_invalid=self.all_invalid,
            lengths=self.lengths,
        )
        return dataclasses.replace(
            rule,
            is_fitted=self.lengths.is_fitted,
            swap_coefficient=self.lengths.swap_coefficient,
        )

    def corrected_scores(
        self, scores: discriminator_loss.ByName
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Return scores as the pair loss reads them: of teachers, and of responses, by segment.

        They are corrected for length, then clipped. A response without the segment gets 0, as in
        the released code.
        """
        of_teachers, of_responses = {}, {}
        betas = dict(self.length_beta)
        for name, segment in scores.items():
            if self.lengths.is_fitted:
                segment, _ = segment.without_length()
            # Not rounded again: the released rewards leave bfloat16 right behind the head.
            of_teachers[name], responses = pairwise.corrected_scores(
                segment.segment(),
                beta=betas.get(name),
                score_clip=self.score_clip,
                score_dtype="float32",
            )
            of_responses[name] = jnp.where(segment.is_pair, responses, 0.0)
        return of_teachers, of_responses
