"""What the stages share that ask a policy a list of prompts: how both are opened.

`begin` finds everything and claims the workdir, `asking.ask` does the work in parts.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import ml_collections
from flax import nnx

from models import inputs
from prism_jax import (
    checkpoint_meta,
    configuration,
    errors,
    model_files,
    pretrained,
    version,
)
from prism_jax.data import encode, processor, records, sources, validate
from prism_jax.rollout import engine, layout, serving
from prism_jax.rollout import sampling as sampling_lib
from prism_jax.stages import asking, corpora, dropped_rows, setup

_CHUNK_TOKENS = 64
_DROPPED = "dropped_prompts.jsonl"
# Keys that may change when a killed job is started again: what they name is compared itself.
_MAY_DIFFER = (
    "policy.folder",
    "prompts.path",
    "prompts.image_root",
    "prompts.cache_dir",
    "line_every_steps",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy(configuration.Section):
    """Say which policy is asked and how it is computed."""

    folder: str  # Hugging Face folder, converted folder, or workdir of a stage
    step: int | None  # of a workdir; None: the newest complete one
    dtype: configuration.Dtype
    attention: Literal["auto", "xla", "splash", "cudnn"]

    def problems(self) -> list[str]:
        """See `Section`."""
        return configuration.not_empty(self, "folder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules(configuration.Section):
    """Say how data sets of prompts are read, and which of their rows are taken."""

    image_root: str | None  # of pictures given by path; None: the folder of the file
    cache_dir: str | None  # where a folder on gs:// is copied to
    max_rows: int | None  # the first so many of a data set; None: all
    max_prompt_tokens: int  # image tokens included
    overlong: Literal["error", "filter"]  # what happens to longer prompts
    max_bad_rows: int  # of a data set
    min_pixels: int | None  # of a picture, others are scaled; None: the checkpoint's own limits
    max_pixels: int | None

    def problems(self) -> list[str]:
        """See `Section`."""
        return configuration.at_least(self, 1, "max_rows", "max_prompt_tokens", "min_pixels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts(Rules):
    """Say what is asked: RL parquet, JSON lines, or a folder that `data build` wrote."""

    path: str

    def problems(self) -> list[str]:
        """See `Section`."""
        return configuration.not_empty(self, "path") + super().problems()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(configuration.Section):
    """Say how responses are drawn."""

    temperature: float
    top_k: int | None
    top_p: float | None

    def problems(self) -> list[str]:
        """See `Section`."""
        try:
            self.with_limit(1, ends=())
        except ValueError as error:
            return [str(error).removeprefix("sampling.")]
        return []

    def with_limit(self, max_tokens: int, *, ends: tuple[int, ...]) -> sampling_lib.Sampling:
        """Return the sampler's own form."""
        return sampling_lib.Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            max_tokens=max_tokens,
            end_token_ids=ends,
        )


# Called once, and only when there is something left to ask.
OpenSampler = Callable[[pretrained.Source, Policy, setup.Devices], asking.Sampler]


def open_sampler(
    source: pretrained.Source, policy: Policy, devices: setup.Devices
) -> asking.Sampler:
    """Load a policy into the form that decoding reads, and return its sampler."""
    _, config = pretrained.config_of(source.files)
    model = pretrained.load(
        source.folder,
        mesh=devices.mesh,
        rules=devices.rules,
        dtype=devices.dtype,
        param_dtype=devices.dtype,
        step=source.step if model_files.is_run(source.folder) else None,
    )
    tensor = layout.choose_tensor(model.params, config, devices=devices.mesh, dtype=devices.dtype)
    mesh = layout.mesh(devices.mesh, tensor=tensor)
    graphdef, params = serving.prepare(
        model.graphdef,
        model.params,
        dtype=devices.dtype,
        donate=True,
        mesh=mesh,
        rules=devices.rules,
    )
    setup.say(f"policy read from {policy.folder}" + _told(source.step))
    built = engine.Engine(
        graphdef=graphdef,
        config=config,
        shapes=engine.Shapes(prompt_tokens=1, prompt_patches=1, prompt_images=1),
        prefill_implementation=devices.attention,
        decode_implementation=devices.decode_attention,
        chunk_tokens=_CHUNK_TOKENS,
        num_slots=None,
        mesh=devices.mesh,
        rules=devices.rules,
        say=setup.say,
    )
    return EngineSampler(engine=built, params=params)


def _told(step: int | None) -> str:
    return "" if not step else f", step {step}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSampler:
    """Ask the engine, with the static shapes of the caller."""

    engine: engine.Engine
    params: nnx.State

    def __call__(
        self,
        prompts: Sequence[inputs.Example],
        sampling: sampling_lib.Sampling,
        key: jax.Array,
        *,
        num_responses: int,
        shapes: engine.Shapes,
    ) -> engine.Rollout:
        """See `Engine.generate`."""
        shaped = dataclasses.replace(self.engine, shapes=shapes)
        return shaped.generate(self.params, prompts, sampling, key, num_responses=num_responses)


def open_prompts(
    texts: Sequence[str],
    options: Rules,
    words: processor.Processor,
    *,
    need_teacher: bool,
    need_answer: bool,
    folder: pathlib.Path | None,
    check: Callable[[records.PromptRow], None] | None = None,
    place: str = "config",
) -> asking.Opened:
    """Validate every row and measure its prompt; rows that are left out are counted by reason.

    Args:
      texts: the data sets, as a configuration names them; their rows count on from each other.
      need_teacher: rows need the teacher's caption and cot; for `need_answer` a ground truth.
      folder: gets `dropped_prompts.jsonl`, which lists them; None: standard error does.
      check: raises RowError for a row that is wrong in another way; called in threads.
      place: what holds the section `prompts`, for messages.

    Raises:
      InputError: the data cannot be read, or more rows are wrong than allowed.
    """

    def count_tokens(row: records.PromptRow) -> tuple[int, int, int, int]:
        if check is not None:
            check(row)
        size = encode.measure(row.prompt, row.images, words, add_generation_prompt=True)
        return size.tokens, size.patches, size.images, _digest(row)

    found = corpora.open_all(
        texts,
        validate.Rules(
            max_bad_rows=options.max_bad_rows,
            option=f"{place}.prompts.max_bad_rows",
            count_tokens=count_tokens,
            max_tokens=options.max_prompt_tokens,
            overlong=options.overlong,
            need_teacher=need_teacher,
            need_answer=need_answer,
        ),
        kind="prompts",
        image_root=options.image_root or "",
        cache_dir=options.cache_dir or "",
        dropped=None if folder is None else folder / _DROPPED,
    )
    kept = []
    for _, opened in found:
        if folder is None and jax.process_index() == 0:
            dropped_rows.tell(opened.report, None)
        kept.append(range(len(opened.rows))[: options.max_rows])
    counted = [
        one
        for (_, opened), taken in zip(found, kept, strict=True)
        for one in opened.report.counted[: len(taken)]
    ]
    digests = "".join(f"{digest:064x}" for *_, digest in counted)
    return asking.Opened(
        rows=sources.Joined(
            [
                sources.Selection(opened.rows, taken)
                for (_, opened), taken in zip(found, kept, strict=True)
            ]
        ),
        lengths=tuple(len(taken) for taken in kept),
        sizes=[
            encode.Size(tokens=tokens, patches=patches, images=images)
            for tokens, patches, images, _ in counted
        ],
        report=corpora.joined([opened.report for _, opened in found]),
        digest=hashlib.sha256(digests.encode()).hexdigest()[:16],
    )


def _digest(row: records.PromptRow) -> int:
    plain = dataclasses.asdict(row) | {"images": [image.sha256 for image in row.images]}
    # The file's name and place are no part of the content.
    plain["source"] = ""
    return int(hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest(), 16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Hold what is asked of whom."""

    workdir: pathlib.Path
    identity: checkpoint_meta.RunIdentity
    source: pretrained.Source
    words: processor.Processor
    vocab_tokens: int  # rows of the model's vocabulary
    opened: asking.Opened
    row_parts: int  # over which the rows of a batch are spread
    sampler: Callable[[], asking.Sampler]  # loads the policy at the first call


def begin(
    stage: str,
    config: ml_collections.ConfigDict,
    *,
    policy: Policy,
    prompts: Prompts,
    mesh: configuration.Mesh,
    workdir: pathlib.Path,
    open_sampler: OpenSampler,
    need_teacher: bool,
    need_answer: bool,
    may_differ: Sequence[str],
    place: str = "config",
) -> Job:
    """Open the prompts, find the policy, and claim the folder; nothing is loaded yet.

    A job that is continued asks the step of a training run that it began with, however far that
    run has come since.

    Args:
      place: what holds the sections `policy`, `prompts` and `mesh`, for messages.

    Raises:
      InputError: policy or data cannot be read, or the folder is of another job.
    """
    if not model_files.is_run(policy.folder) and policy.step is not None:
        raise errors.InputError(
            f"{place}.policy.step = {policy.step}: {policy.folder} is not the workdir of a stage"
        )
    step = policy.step
    if step is None and model_files.is_run(policy.folder):
        step = asking.recorded_step(workdir)
    source = pretrained.Source.of(policy.folder, role="policy", step=step)
    _, sizes = pretrained.config_of(source.files)
    words = _with_limits(processor.Processor.from_folder(source.files), prompts, place=place)
    opened = open_prompts(
        [prompts.path],
        prompts,
        words,
        need_teacher=need_teacher,
        need_answer=need_answer,
        # The list in a folder that may be of another job stays as it is.
        folder=None if asking.is_claimed(workdir) else workdir,
        place=place,
    )
    model = configuration.Model(
        folder=policy.folder,
        init="pretrained",
        sizes=None,
        dtype=policy.dtype,
        param_dtype=policy.dtype,
        attention=policy.attention,
        remat="none",
    )
    devices = setup.open_devices(mesh, model, section="policy", place=place)
    if jax.process_count() > 1:
        raise errors.InputError(f"{stage} runs in one process, got {jax.process_count()}")
    facts = {
        "step": source.step,
        "fingerprint": source.fingerprint(),
        "prompts_digest": opened.digest,
    }
    identity = checkpoint_meta.RunIdentity(
        project_version=version.VERSION,
        stage=stage,
        config=configuration.plain(config),
        model_config=facts,
        may_differ=(*_MAY_DIFFER, *may_differ),
    )
    asking.claim(workdir, identity)
    return Job(
        workdir=workdir,
        identity=identity,
        source=source,
        words=words,
        vocab_tokens=sizes.text.vocab_size,
        opened=opened,
        row_parts=devices.row_parts(),
        sampler=functools.cache(lambda: open_sampler(source, policy, devices)),
    )


def _with_limits(
    words: processor.Processor, prompts: Prompts, *, place: str
) -> processor.Processor:
    """Return the processor with the limits on the size of a picture."""
    own = words.image_settings
    least = own.min_pixels if prompts.min_pixels is None else prompts.min_pixels
    most = own.max_pixels if prompts.max_pixels is None else prompts.max_pixels
    if least > most:
        raise errors.InputError(
            f"{place}.prompts.min_pixels must be <= max_pixels, got {least} and {most} with those "
            "of the checkpoint's image settings"
        )
    settings = dataclasses.replace(own, min_pixels=least, max_pixels=most)
    return dataclasses.replace(words, image_settings=settings)
