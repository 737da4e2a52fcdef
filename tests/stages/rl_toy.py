"""A closed problem for RLVR: a policy that is a table, and everything behind the sampler real.

The next token depends on the last one alone: table[last] holds its logits. Token 0 ends a response,
1 to 4 are the letters a to d; a prompt is one letter. A response that begins with b is right.
"""

import dataclasses
import functools
import importlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import inputs, presets, sharding
from prism_jax import configuration, metrics
from prism_jax import rows as packed_rows
from prism_jax.data import encode, records
from prism_jax.policy import distill as policy_distill
from prism_jax.policy import rollouts
from prism_jax.rewards import score, tags
from prism_jax.rollout import engine
from prism_jax.running import dump
from prism_jax.setup import agreement
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.rlvr import carry as rlvr_carry
from prism_jax.stages.rlvr import config as rlvr_config
from prism_jax.stages.rlvr import feed as rlvr_feed
from prism_jax.stages.rlvr import groups as rlvr_groups
from prism_jax.stages.rlvr import main as rlvr_main
from prism_jax.stages.rlvr import step as rlvr_step
from prism_jax.stages.rlvr import updates as rlvr_updates
from prism_jax.training import train_state

NUM_TOKENS = 5
MAX_TOKENS = 4

_USUAL = {
    "rollout.num_prompts": 4,
    "rollout.num_responses": 4,
    "rollout.max_response_tokens": MAX_TOKENS,
    "rollout.dump_every_steps": None,
    "rows.row_tokens": 20,
    "rows.row_sequences": 4,
    "rows.num_rows": 4,
    "optim.no_decay": (),
    "optim.weight_decay": 0.0,
    "optim.peak": 0.3,
}


class Table(nnx.Module):
    """Give the logits of the next token, in the form of a language model."""

    def __init__(self, values: jax.Array):
        self.logits = nnx.Param(values)

    def __call__(self, text: inputs.TextInput, vision: None, *, implementation: str, remat: str):
        """Return the hidden states, here the logits themselves."""
        return self.logits[...][text.tokens], None

    def head(self) -> jax.Array:
        """Return the identity."""
        return jnp.eye(NUM_TOKENS)


def options_of(
    arg: str, changes: Mapping[str, Any], *, usual: Mapping[str, Any] = _USUAL
) -> rlvr_config.Config:
    """Return the tiny configuration of an algorithm on the closed problem."""
    config = importlib.import_module("configs.rlvr").get_config(f"tiny,{arg}" if arg else "tiny")
    config.model.folder, config.prompts.path = "none", ("none",)
    with config.ignore_type():
        config.update_from_flattened_dict({**usual, **changes})
    return configuration.parse(rlvr_config.Config, config)


def first_table(seed: int = 0) -> np.ndarray:
    """Return a policy that prefers nothing much."""
    return 0.3 * np.random.default_rng(seed).normal(size=(NUM_TOKENS,) * 2).astype(np.float32)


def success(table: np.ndarray) -> float:
    """Return how often a response is right, over the four prompts."""
    return float(np.exp(log_softmax(table))[1:, 2].mean())


def log_softmax(table: np.ndarray) -> np.ndarray:
    """Return the log-probs of the next token, row by row."""
    return table - np.log(np.exp(table).sum(-1, keepdims=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """Draw from a table; the log-probs that it tells are wrong by some noise."""

    num_responses: int
    noise: float

    def prepare(self, params: nnx.State):
        """Return (prompts, key) -> responses."""
        logprobs = log_softmax(np.asarray(params["logits"][...]))

        def draw(prompts: Sequence[inputs.Example], key: jax.Array) -> rollouts.Responses:
            rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
            size = len(prompts) * self.num_responses
            tokens = np.zeros((size, MAX_TOKENS), np.int32)
            told, lengths = np.zeros(tokens.shape, np.float32), np.zeros(size, np.int32)
            for number in range(size):
                last = int(prompts[number // self.num_responses].tokens[-1])
                for place in range(MAX_TOKENS):
                    chosen = int(rng.choice(NUM_TOKENS, p=np.exp(logprobs[last])))
                    tokens[number, place] = chosen
                    told[number, place] = logprobs[last, chosen] + self.noise * rng.normal()
                    lengths[number], last = place + 1, chosen
                    if chosen == 0:
                        break
            ended = tokens[np.arange(size), lengths - 1] == 0
            return rollouts.Responses(
                rollout=engine.Rollout(tokens=tokens, logprobs=told, lengths=lengths, ended=ended),
                segments=[
                    segments_of(tokens[number, :length]) for number, length in enumerate(lengths)
                ],
                num_prompts=len(prompts),
                seconds=0.0,
            )

        return draw


def segments_of(tokens: np.ndarray) -> tags.Segments:
    """Return what a response says, letter by letter."""
    ended = bool(tokens[-1] == 0)
    return tags.Segments(
        text="".join(" abcd"[token] for token in tokens if token),
        format_ok=ended,
        ended=ended,
        caption_chars=0,
        caption_tokens=1,
        cot_tokens=len(tokens) - 1,
        response_tokens=len(tokens),
    )


class Judge:
    """Reward a first letter b, and a little the end of a response."""

    def grade(self, tasks: Sequence[score.Task]) -> list[score.Reward]:
        """See `rewards.workers.JudgePool`."""
        return [reward_of(task.response, task.ended) for task in tasks]


def reward_of(text: str, ended: bool) -> score.Reward:
    """Return 0.8 for a right response and 0.2 for one that ends."""
    accuracy = float(text.startswith("b"))
    reason = score.Reason.CORRECT if accuracy else score.Reason.WRONG
    total = 0.8 * accuracy + 0.2 * ended
    return score.Reward(total=total, accuracy=accuracy, format=float(ended), reason=reason)


class Prompts:
    """Give the letters a to d in turn, as `data.steps.Steps` would."""

    def __init__(self, num_prompts: int):
        self._num_prompts, self._next = num_prompts, 0

    def __next__(self) -> rlvr_groups.Prompts:
        first = self._next * self._num_prompts
        indices = [place % (NUM_TOKENS - 1) for place in range(first, first + self._num_prompts)]
        self._next += 1
        return rlvr_groups.Prompts(
            indices=indices,
            rows=[row_of(index) for index in indices],
            prompts=[prompt_of(index) for index in indices],
        )

    def get_state(self):
        return {"next_step": self._next}

    def set_state(self, state):
        self._next = state["next_step"]


def prompt_of(index: int) -> inputs.Example:
    """Return the prompt of a row: one letter."""
    tokens = np.array([index + 1], np.int32)
    return inputs.Example(tokens=tokens, token_types=np.zeros(1, np.int32), grids=(), pixels=())


def row_of(index: int) -> records.PromptRow:
    """Return the row of a prompt."""
    return records.PromptRow(
        id=str(index),
        source="",
        prompt=(),
        images=(),
        teacher_response=None,
        teacher_caption=None,
        teacher_cot=None,
        data_source=None,
        ground_truth="b",
        equivalent_answers=(),
        extra_info={},
    )


def decode(saved) -> rlvr_groups.Group:
    """Return a group that a `Feed` saved, its responses alone."""

    def read(rollout: engine.Rollout) -> list[tags.Segments]:
        pairs = zip(rollout.tokens, rollout.lengths, strict=True)
        return [segments_of(tokens[:length]) for tokens, length in pairs]

    index = saved["index"]
    return rlvr_groups.Group(
        index=index,
        row=row_of(index),
        prompt=prompt_of(index),
        responses=rlvr_carry.responses_of(saved, read),
        step=saved["step"],
    )


def feed_of(options: rlvr_config.Config) -> rlvr_feed.Feed:
    """Return the prompts of a run."""
    is_refilled = options.groups.keep != "all"
    return rlvr_feed.Feed(
        Prompts(options.generation_prompts),
        num_prompts=options.rollout.num_prompts,
        is_refilled=is_refilled,
        coefficient=options.reference.reward_coefficient,
        is_adapted=options.reference.reward_target is not None,
        reference=None,
        decode=decode,
    )


@functools.cache
def devices() -> devices_lib.Devices:
    """Return the first device."""
    mesh = jax.sharding.Mesh([[[[jax.devices()[0]]]]], ("data", "fsdp", "tensor", "expert"))
    return devices_lib.Devices(
        mesh=mesh,
        rules=sharding.REPLICATED,
        dtype=jnp.dtype("float32"),
        param_dtype=jnp.dtype("float32"),
        attention="xla",
        decode_attention="xla",
    )


START = setup_models.Start(abstract=None, make=lambda: None, shardings=None)


class Run:
    """Take steps of RLVR on the closed problem."""

    def __init__(
        self,
        options: rlvr_config.Config,
        *,
        noise: float = 0.0,
        table: np.ndarray | None = None,
        reference: np.ndarray | None = None,
        teacher: np.ndarray | None = None,
    ):
        """Begin with a table; `reference` and `teacher` are the tables of such policies."""
        values = first_table() if table is None else table
        self.model = _model(options)
        self.shape = rlvr_updates.shape_of(
            options, [encode.Size(tokens=1, patches=0, images=0)], devices()
        )
        # Only these decide the update: runs that share them share what is compiled.
        plain = options_of("", {}, usual=_USUAL | {"rollout.num_prompts": 4})
        deciding = dataclasses.replace(
            plain,
            rollout=options.rollout,
            algorithm=options.algorithm,
            reference=options.reference if options.reference.loss else plain.reference,
            train=options.train,
            optim=options.optim,
            distill=dataclasses.replace(
                plain.distill,
                kind=options.distill.kind,
                teacher_share=options.distill.teacher_share,
            ),
        )
        self.optimizer, self.update = _update_of(
            deciding, self.shape, has_teacher=teacher is not None
        )
        self.feed = feed_of(options)
        self.experience = rlvr_main.open_experience(
            options,
            devices(),
            self.model,
            feed=self.feed,
            sampler=Sampler(num_responses=options.rollout.num_responses, noise=noise),
            judge=Judge(),
            shape=self.shape,
            reference=None if reference is None else _params_of(reference),
            teacher=None if teacher is None else _teacher(self.model, teacher),
            dump=dump.Dump(pathlib.Path(), None, inputs=agreement.Inputs(), tables=None),
        )
        state = train_state.from_params(_params_of(values), self.optimizer, shardings=None)
        # Where an update leaves it: a step is compiled once.
        self.state = jax.device_put(state, devices().replicated)
        self.rows: list[dict[str, float]] = []

    @property
    def table(self) -> np.ndarray:
        """Return the policy as it is."""
        return np.array(self.state.params["logits"][...])

    def take(self, num_steps: int) -> "Run":
        """Take steps as the loop does."""
        for _ in range(num_steps):
            key = jax.random.fold_in(jax.random.key(0), len(self.rows))
            experience_key, update_key = jax.random.split(key)
            batches, sampled = self.experience(self.state, next(self.feed), experience_key)
            self.state, updated = self.update(self.state, batches, update_key)
            self.rows.append(metrics.read(jax.device_get(sampled | updated)))
        return self


def _teacher(model: setup_models.Model, table: np.ndarray) -> policy_distill.Teacher:
    return policy_distill.Teacher(
        graphdef=model.graphdef, params=_params_of(table), fingerprint="a table"
    )


@functools.cache
def _update_of(options: rlvr_config.Config, shape: packed_rows.RowShape, *, has_teacher: bool):
    """Return the optimizer and the updates of a rollout."""
    model = _model(options)
    num_steps = options.train.num_steps * options.train.num_updates
    optimizer = setup_models.make_optimizer(options.optim, model.params, num_steps=num_steps)
    teacher = _teacher(model, first_table()) if has_teacher else None
    update = rlvr_updates.make_update(options, devices(), model, optimizer, START, shape, teacher)
    return optimizer, functools.partial(
        rlvr_step.update, update, num_epochs=options.train.num_epochs
    )


def _model(options: rlvr_config.Config) -> setup_models.Model:
    graphdef, params = train_state.split_model(Table(jnp.asarray(first_table())))
    return setup_models.Model(
        config=presets.TINY,
        values={},
        graphdef=graphdef,
        params=params,
        build=lambda rngs: None,
        source=options.model,
        is_discriminator=False,
    )


def _params_of(table: np.ndarray) -> nnx.State:
    return train_state.split_model(Table(jnp.array(table)))[1]
