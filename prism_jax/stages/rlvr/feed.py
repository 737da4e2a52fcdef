"""The prompts of a run, and what a step leaves for the next one."""

import base64
import dataclasses
import functools
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from prism_jax import errors
from prism_jax.data import encode as data_encode
from prism_jax.data import processor, steps
from prism_jax.policy import responses
from prism_jax.rewards import score, tags
from prism_jax.rollout import engine
from prism_jax.setup import prompt_mixture
from prism_jax.setup import prompts as prompts_lib
from prism_jax.stages.rlvr import config as rlvr_config
from prism_jax.stages.rlvr import groups as rlvr_groups
from prism_jax.stages.rlvr import reference as rlvr_reference


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """Hold what a step begins with."""

    # None: the groups that are left over are enough, nothing is drawn.
    first: rlvr_groups.Prompts | None
    feed: "Feed"


class Feed:
    """Give the prompts of a run; hold what a step leaves for the next one, and save it."""

    def __init__(
        self,
        prompts: steps.Steps,
        *,
        num_prompts: int,
        is_refilled: bool,
        coefficient: float | None,
        reference: str | None,
        decode: Callable[[rlvr_groups.Json], rlvr_groups.Group],
    ):
        """Start at the first prompts.

        Args:
          num_prompts: that a step learns from.
          is_refilled: groups may be left over and drawn again.
          coefficient: of the KL in the reward, where it is adapted; None where it is not.
          reference: names the parameters of the reference policy; another one is refused.
          decode: undoes `encode`.
        """
        self._prompts, self._num_prompts, self._decode = prompts, num_prompts, decode
        self._is_refilled, self._reference = is_refilled, reference
        self.surplus: list[rlvr_groups.Group] = []
        self.coefficient = coefficient

    def __next__(self) -> Asked:
        """Return the first prompts of a step."""
        is_full = len(self.surplus) >= self._num_prompts
        return Asked(first=None if is_full else self.more(), feed=self)

    def more(self) -> rlvr_groups.Prompts:
        """Return the next prompts."""
        return next(self._prompts)

    def keep(self, *, surplus: Sequence[rlvr_groups.Group], coefficient: float | None) -> None:
        """Hold these for the next step."""
        self.surplus, self.coefficient = list(surplus), coefficient

    def get_state(self) -> dict[str, rlvr_groups.Json]:
        """Return the position of the prompts and what is held, as JSON values."""
        state = self._prompts.get_state()
        if self._is_refilled:
            state["surplus"] = [encode(group) for group in self.surplus]
        if self.coefficient is not None:
            state["kl_coefficient"] = self.coefficient
        if self._reference is not None:
            state["reference"] = self._reference
        return state

    def set_state(self, state: Mapping[str, rlvr_groups.Json]) -> None:
        """Continue at a position.

        Raises:
          InputError: it is of other prompts or of another reference policy.
        """
        self._prompts.set_state(dict(state))
        if self._reference != state.get("reference"):
            raise errors.InputError(
                f"cannot resume: the reference policy was {state.get('reference')} when the "
                f"checkpoint was written and is {self._reference} now"
            )
        self.surplus = [self._decode(group) for group in state.get("surplus", ())]
        if self.coefficient is not None:
            # Absent where a run of another configuration is continued on purpose.
            self.coefficient = state.get("kl_coefficient", self.coefficient)


def open_prompts(
    options: rlvr_config.Config, files: pathlib.Path, *, folder: pathlib.Path | None
) -> tuple[processor.Processor, prompts_lib.Opened]:
    """Return the processor and the validated prompts, each with a ground truth.

    Args:
      files: small files of the policy.
      folder: gets the list of the prompts that are left out.

    Raises:
      InputError: for wrong data, or fewer prompts than a step takes.
    """
    words = processor.processor_of(
        files, min_pixels=options.prompts.min_pixels, max_pixels=options.prompts.max_pixels
    )
    opened = prompts_lib.open_prompts(
        options.prompts.path,
        options.prompts,
        words,
        need_teacher=False,
        need_answer=True,
        folder=folder,
    )
    prompt_mixture.require(opened, options.rollout.num_prompts, field="rollout.num_prompts")
    prompt_mixture.require(opened, _drawn_prompts(options), field="groups.generation_prompts")
    return words, opened


def open_feed(
    options: rlvr_config.Config,
    words: processor.Processor,
    opened: prompts_lib.Opened,
    reader: responses.Reader,
    reference: rlvr_reference.Reference | None,
) -> Feed:
    """Return the prompts of the run, and what its steps leave for one another."""

    def ask(indices: Sequence[int]) -> rlvr_groups.Prompts:
        rows = [opened.rows[index] for index in indices]
        return rlvr_groups.Prompts(
            indices=list(indices), rows=rows, prompts=data_encode.encode_prompts(rows, words)
        )

    is_refilled = options.groups.keep != "all"
    num_generations = options.groups.max_generations if is_refilled else 1
    is_adapted = options.reference.reward_target is not None
    return Feed(
        prompt_mixture.index_steps(
            opened,
            ask,
            weights=options.prompts.weights,
            num_prompts=_drawn_prompts(options),
            num_steps=options.train.num_steps * num_generations,
            seed=options.seed,
            num_threads=options.train.num_threads,
        ),
        num_prompts=options.rollout.num_prompts,
        is_refilled=is_refilled,
        coefficient=options.reference.reward_coefficient if is_adapted else None,
        reference=None if reference is None else reference.fingerprint,
        decode=functools.partial(decode, opened=opened, words=words, reader=reader),
    )


def _drawn_prompts(options: rlvr_config.Config) -> int:
    """Return how many prompts are drawn from together."""
    chosen = options.groups.generation_prompts
    return options.rollout.num_prompts if chosen is None else chosen


def encode(group: rlvr_groups.Group) -> dict[str, rlvr_groups.Json]:
    """Return a group as JSON values; its prompt is named by the number of the row."""
    found = group.responses
    return {
        "index": group.index,
        "step": group.step,
        "lengths": [len(one.tokens) for one in found],
        "ended": [one.segments.ended for one in found],
        "tokens": _text([one.tokens for one in found], np.int32),
        "logprobs": _text([one.logprobs for one in found], np.float32),
        "rewards": [
            [one.reward.total, one.reward.accuracy, one.reward.format, one.reward.reason.value]
            for one in found
        ],
    }


def decode(
    saved: Mapping[str, rlvr_groups.Json],
    *,
    opened: prompts_lib.Opened,
    words: processor.Processor,
    reader: responses.Reader,
) -> rlvr_groups.Group:
    """Return the group that `encode` was given."""
    row = opened.rows[saved["index"]]
    (prompt,) = data_encode.encode_prompts([row], words)
    return rlvr_groups.Group(
        index=saved["index"],
        row=row,
        prompt=prompt,
        responses=responses_of(saved, reader.read),
        step=saved["step"],
    )


def responses_of(
    saved: Mapping[str, rlvr_groups.Json], read: Callable[[engine.Rollout], list[tags.Segments]]
) -> tuple[rlvr_groups.Response, ...]:
    """Return the responses of a group that `encode` was given; `read` cuts them into segments."""
    lengths = np.array(saved["lengths"], np.int32)
    tokens = _arrays(saved["tokens"], np.int32, lengths)
    logprobs = _arrays(saved["logprobs"], np.float32, lengths)
    padded = np.zeros((len(lengths), max(lengths)), np.int32)
    for number, one in enumerate(tokens):
        padded[number, : len(one)] = one
    segments = read(
        engine.Rollout(
            tokens=padded,
            logprobs=np.zeros(padded.shape, np.float32),
            lengths=lengths,
            ended=np.array(saved["ended"], bool),
        )
    )
    rewards = [
        score.Reward(total=total, accuracy=accuracy, format=form, reason=score.Reason(reason))
        for total, accuracy, form, reason in saved["rewards"]
    ]
    return tuple(
        rlvr_groups.Response(
            tokens=tokens[number],
            logprobs=logprobs[number],
            segments=segments[number],
            reward=rewards[number],
        )
        for number in range(len(lengths))
    )


def _text(arrays: Sequence[np.ndarray], dtype: type) -> str:
    """Return arrays behind one another as text, every bit of them."""
    joined = np.concatenate(arrays).astype(np.dtype(dtype).newbyteorder("<"))
    return base64.b64encode(zlib.compress(joined.tobytes())).decode()


def _arrays(text: str, dtype: type, lengths: np.ndarray) -> list[np.ndarray]:
    """Undo `_text`."""
    data = zlib.decompress(base64.b64decode(text))
    joined = np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).astype(dtype)
    return np.split(joined, np.cumsum(lengths)[:-1])
