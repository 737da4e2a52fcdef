"""Shared by the commands that sample from a policy: opening the policy and the prompts.

`begin` opens both and claims the workdir; `commands.ask.parts.ask` samples in parts.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import ml_collections
from flax import nnx

from models import inputs
from prism_jax import configuration, errors, progress, version
from prism_jax.checkpoints import meta as checkpoint_meta
from prism_jax.checkpoints import model_files, pretrained
from prism_jax.commands.ask import parts as ask_parts
from prism_jax.data import processor
from prism_jax.rollout import engine, layout, serving
from prism_jax.rollout import sampling as sampling_lib
from prism_jax.setup import agreement
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import prompts as prompts_lib

_CHUNK_TOKENS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy(configuration.Section):
    """The policy that is sampled from, and how it is computed."""

    # Hugging Face folder, converted folder, or workdir of a stage. It may move: its parameters are
    # compared, not its name.
    folder: str = configuration.free()
    step: configuration.Step  # of a workdir
    dtype: configuration.Dtype
    attention: configuration.Attention

    def problems(self) -> list[str]:
        """See `Section`."""
        return configuration.not_empty(self, "folder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(configuration.Section):
    """How responses are sampled."""

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
        """Return these settings in the form that the sampler reads."""
        return sampling_lib.Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            max_tokens=max_tokens,
            end_token_ids=ends,
        )


# Called once, and only when a prompt is left without responses.
OpenSampler = Callable[[pretrained.Source, Policy, devices_lib.Devices], ask_parts.Sampler]


def open_sampler(
    source: pretrained.Source, policy: Policy, devices: devices_lib.Devices
) -> ask_parts.Sampler:
    """Load a policy in the form for decoding and return its sampler."""
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
    progress.say(f"policy read from {policy.folder}" + _at_step(source.step))
    sampler = engine.Engine(
        graphdef=graphdef,
        config=config,
        shapes=engine.Shapes(prompt_tokens=1, prompt_patches=1, prompt_images=1),
        prefill_implementation=devices.attention,
        decode_implementation=devices.decode_attention,
        chunk_tokens=_CHUNK_TOKENS,
        num_slots=None,
        mesh=mesh,
        rules=devices.rules,
        say=progress.say,
    )
    return EngineSampler(engine=sampler, params=params, folder=policy.folder)


def _at_step(step: int | None) -> str:
    return "" if not step else f", step {step}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSampler:
    """A sampler that runs the engine with the static shapes of the caller."""

    engine: engine.Engine
    params: nnx.State
    folder: str  # origin of the parameters, for messages

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
        rollout = shaped.generate(self.params, prompts, sampling, key, num_responses=num_responses)
        if not rollout.is_finite():
            raise errors.InputError(f"{self.folder}: the logits of this model are not finite")
        return rollout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A sampling job: the policy, the prompts and the workdir of the answers."""

    workdir: pathlib.Path
    identity: checkpoint_meta.RunIdentity
    source: pretrained.Source
    words: processor.Processor
    vocab_tokens: int  # rows of the model's vocabulary
    opened: prompts_lib.Opened
    row_parts: int  # parts of the mesh over which the rows of a batch are spread
    sampler: Callable[[], ask_parts.Sampler]  # loads the policy at the first call


def open_rows(
    files: pathlib.Path,
    prompts: prompts_lib.Prompts,
    *,
    need_teacher: bool,
    need_answer: bool,
    folder: pathlib.Path | None,
    place: str = "config",
) -> tuple[processor.Processor, prompts_lib.Opened]:
    """Open the processor of a policy's files, and the prompts as it measures them.

    Args:
      folder: see `prompts_lib.open_prompts`.
    """
    words = processor.Processor.from_folder(
        files,
        min_pixels=prompts.min_pixels,
        max_pixels=prompts.max_pixels,
        place=f"{place}.prompts.",
    )
    opened = prompts_lib.open_prompts(
        [prompts.path],
        prompts,
        words,
        need_teacher=need_teacher,
        need_answer=need_answer,
        folder=folder,
        place=place,
    )
    return words, opened


def begin(
    stage: str,
    config: ml_collections.ConfigDict,
    *,
    policy: Policy,
    prompts: prompts_lib.Prompts,
    mesh: configuration.Mesh,
    workdir: pathlib.Path,
    open_sampler: OpenSampler,
    need_teacher: bool,
    need_answer: bool,
    may_differ: Sequence[str],
    digests: Mapping[str, str] | None = None,
    place: str = "config",
) -> Job:
    """Open the prompts, locate the policy, and claim the folder; no weights are loaded yet.

    A resumed job keeps the checkpoint step it started with, however far the training run has come
    since.

    Args:
      may_differ: the fields of `config` that may change when a killed job is started again.
      digests: of files of the user's that are executed, by the field that names them.
      place: the section that holds `policy`, `prompts` and `mesh`, for messages.

    Raises:
      InputError: policy or data cannot be read, or the folder is of another job.
    """
    if not model_files.is_run(policy.folder) and policy.step is not None:
        raise errors.InputError(
            f"{place}.policy.step = {policy.step}: {policy.folder} is not the workdir of a stage"
        )
    step = policy.step
    if step in (None, "best") and model_files.is_run(policy.folder):
        # The newest and the best step may have changed since.
        recorded = agreement.on_first("step", lambda: ask_parts.recorded_step(workdir))
        step = step if recorded is None else recorded
    source = pretrained.Source.of(policy.folder, role="policy", step=step)
    _, sizes = pretrained.config_of(source.files)
    # A folder that another job may have claimed keeps its list of dropped rows.
    folder = None if ask_parts.is_claimed(workdir) else workdir
    words, opened = open_rows(
        source.files,
        prompts,
        need_teacher=need_teacher,
        need_answer=need_answer,
        folder=folder,
        place=place,
    )
    devices = devices_lib.open_devices(mesh, _model(policy), section="policy", place=place)
    facts = {
        "step": source.step,
        "fingerprint": source.fingerprint(),
        f"rows of {place}.prompts.path": opened.digest,
        **({"files": dict(digests)} if digests else {}),
    }
    identity = checkpoint_meta.RunIdentity(
        project_version=version.VERSION,
        stage=stage,
        config=configuration.plain(config),
        model_config=facts,
        may_differ=tuple(may_differ),
    )
    agreement.require_same("policy and prompts", facts)
    agreement.on_first("claim", lambda: ask_parts.claim(workdir, identity))
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


def _model(policy: Policy) -> configuration.Model:
    """Return a policy that is only sampled from as the model of a stage."""
    return configuration.Model(
        folder=policy.folder,
        init="pretrained",
        sizes=None,
        dtype=policy.dtype,
        param_dtype=policy.dtype,
        attention=policy.attention,
        remat="none",
        lora=configuration.NO_LORA,
        step=policy.step,
    )
