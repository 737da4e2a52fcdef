"""Held-out prompts, answered and judged while a policy trains: when has it learned enough?

A discriminator's gap hovers around 0 and a reward may rise by what it overlooks, so neither tells
when to stop. The accuracy on prompts that are not trained on does; the authors of GAD choose their
checkpoints by an evaluation as well. `running.best` keeps the best step.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from prism_jax import configuration
from prism_jax.data import encode, processor
from prism_jax.policy import responses as policy_responses
from prism_jax.policy import rollouts
from prism_jax.rewards import tags
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.setup import prompts as prompts_lib

METRIC = "eval/accuracy"
WATCHED = (METRIC, "eval/best_step")
_BATCH_PROMPTS = 256  # in memory at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut(configuration.Section):
    """The evaluation of a policy that learns from samples; without `path` there is none.

    Prompts are read by the rules of `prompts`, each needs a ground truth, and the judge is that of
    the stage.
    """

    path: tuple[str, ...]  # of data sets that are not trained on
    every_steps: int | None  # besides the last step; given exactly with `path`
    num_prompts: int | None  # the first of each data set; None: all
    num_responses: int  # to each prompt
    temperature: float  # 0: the most likely token
    is_best_kept: bool  # the state of the best step is saved and kept; see best.json
    patience: int | None  # evaluations without a better one after which the run ends; None: never

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = configuration.at_least(
            self, 1, "every_steps", "num_prompts", "num_responses", "patience"
        )
        problems += configuration.at_least(self, 0, "temperature")
        if (self.every_steps is not None) != bool(self.path):
            problems.append(f"every_steps must be given exactly with path, got {self.every_steps}")
        if self.num_responses > 1 and self.temperature == 0:
            problems.append(
                "num_responses must be 1 with temperature = 0, whose responses are all the same, "
                f"got {self.num_responses}"
            )
        return problems

    def problems_beside(self, trained: Sequence[str]) -> list[str]:
        """Return the problems of these data sets beside those that are trained on."""
        both = sorted(set(self.path) & set(trained))
        return [f"held_out.path must not be trained on, got {both[0]}"] if both else []


class Evaluation:
    """The evaluation of a policy on held-out prompts."""

    def __init__(
        self,
        options: HeldOut,
        rollout: rollouts.Rollout,
        rules: prompts_lib.Rules,
        model: setup_models.Model,
        devices: devices_lib.Devices,
        *,
        words: processor.Processor,
        gate: tags.Gate,
        judge: policy_responses.Judge,
        key: jax.Array,
    ):
        """Open the prompts; nothing is compiled before the first evaluation.

        Args:
          rollout: of the training; a response is as long here.
          key: of the samples, the same in each evaluation.

        Raises:
          InputError: for wrong data.
        """
        self._judge, self._key, self._words = judge, key, words
        self._opened = prompts_lib.open_prompts(
            options.path,
            dataclasses.replace(rules, max_rows=options.num_prompts),
            words,
            need_teacher=False,
            need_answer=True,
            folder=None,
            place="config.held_out",
        )
        self._sampler = rollouts.Sampler(
            dataclasses.replace(
                rollout, num_responses=options.num_responses, temperature=options.temperature
            ),
            model,
            devices,
            words=words,
            sizes=self._opened.sizes,
            gate=gate,
        )

    def __call__(self, params: Any) -> dict[str, float]:
        """Return the accuracy of a policy, the share of valid formats, and mean tokens."""
        begun = time.monotonic()
        respond = self._sampler.prepare(params)
        accuracy, format_ok, lengths = [], [], []
        rows = self._opened.rows
        for start in range(0, len(rows), _BATCH_PROMPTS):
            part = [rows[n] for n in range(start, min(start + _BATCH_PROMPTS, len(rows)))]
            responses = respond(
                encode.encode_prompts(part, self._words), jax.random.fold_in(self._key, start)
            )
            rewards, _ = policy_responses.judge(self._judge, part, responses.segments)
            accuracy += [reward.accuracy for reward in rewards]
            format_ok += [segments.format_ok for segments in responses.segments]
            lengths += responses.rollout.lengths.tolist()
        return {
            METRIC: float(np.mean(accuracy)),
            "eval/format_fraction": float(np.mean(format_ok)),
            "eval/response_tokens": float(np.mean(lengths)),
            "eval/num_prompts": float(len(rows)),
            "time/evaluate_seconds": time.monotonic() - begun,
        }
