"""The steps of a chain: the commands, their order and their folders.

Folders are named `$WORKDIR/NAME`, so that a chain's folder can move and its records stay valid.
"""

import dataclasses
import pathlib
from typing import Literal

from prism_jax import configuration
from prism_jax.report import results

WORKDIR = "$WORKDIR"
_CORPUS = f"{WORKDIR}/corpus"
_HELD_OUT = ("align", "rlvr")  # the stages that can name a best step
_DEMONSTRATIONS = f"{_CORPUS}/sft/dataset_info.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base(configuration.Section):
    """The initial model of the chain; exactly one of the two is given."""

    folder: str  # Hugging Face folder
    tokenizer: str  # folder of a tokenizer; a new model is trained on right, untagged answers

    def problems(self) -> list[str]:
        """See `Section`."""
        if bool(self.folder) != bool(self.tokenizer):
            return []
        return ["folder and tokenizer: exactly one must be given"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus(configuration.Section):
    """The corpus that `numerals` writes; see `data numerals --help`."""

    level: Literal["tiny", "small"]
    rows: tuple[str, ...]  # PART=COUNT
    slips: tuple[str, ...]  # NAME=RATE, of the public demonstrations in place of the level's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(configuration.Section):
    """Further arguments of each step's command."""

    base: tuple[str, ...]
    sft: tuple[str, ...]
    upcycle: tuple[str, ...]
    pairs: tuple[str, ...]
    warmup: tuple[str, ...]
    align: tuple[str, ...]
    rlvr: tuple[str, ...]
    evaluate: tuple[str, ...]  # of each of the four


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(configuration.Section):
    """The configuration of `pipeline`."""

    seed: int  # of every step
    size: Literal["tiny", "demo", "small"]  # of every step's configuration
    base: Base
    trunk: Literal["base", "sft"]  # the model that becomes the discriminator's trunk
    corpus: Corpus
    # The step of align with which rlvr begins, and that of each that is evaluated. "best" is that
    # of held-out prompts, which `arguments` must name for both.
    step: Literal["newest", "best"]
    arguments: Arguments
    title: str  # of the report; empty: the folder's name

    def problems(self) -> list[str]:
        """See `Section`."""
        problems = configuration.at_least(self, 0, "seed")
        for name in _HELD_OUT if self.step == "best" else ():
            arguments = dataclasses.asdict(self.arguments)[name]
            if not any(text.startswith("--config.held_out.path=") for text in arguments):
                problems.append(
                    f"arguments.{name} must have --config.held_out.path=… for step 'best', "
                    f"got {arguments}"
                )
            # Otherwise the step would be missed by the stage after it, hours later.
            if any(text.lower() == "--config.held_out.is_best_kept=false" for text in arguments):
                problems.append(
                    f"arguments.{name} must keep the best step for step 'best', got {arguments}"
                )
        return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One command of the chain."""

    name: str
    arguments: tuple[str, ...]  # the command first
    # Folder to remove before each start, for a command that writes it at its end and refuses an
    # existing one; None for commands that resume in their folder.
    removed: str | None = None

    def command(self, workdir: pathlib.Path) -> list[str]:
        """Return the arguments with the chain's folder filled in."""
        return [argument.replace(WORKDIR, str(workdir)) for argument in self.arguments]


def plan(config: Config) -> list[Step]:
    """Return the chain's steps in order."""
    base, sft = config.base.folder, f"{WORKDIR}/sft"
    steps = [_corpus(config)]
    if config.base.tokenizer:
        steps += _base(config)
        base = f"{WORKDIR}/base_model"
    trained = _stage(
        config,
        "sft",
        config.arguments.sft,
        f"--config.model.folder={base}",
        f"--config.data.train={_DEMONSTRATIONS}#numerals_public",
        f"--config.data.train={_DEMONSTRATIONS}#numerals_teacher",
    )
    steps.append(trained)
    if config.trunk == "sft":
        steps.append(_export("sft_model", of="sft"))
    steps += _discriminator(config, trunk=base if config.trunk == "base" else None)
    steps += [
        _stage(
            config,
            "align",
            config.arguments.align,
            f"--config.model.folder={sft}",
            f"--config.discriminator.folder={WORKDIR}/warmup",
            f"--config.prompts.path={_CORPUS}/align/train.parquet",
        ),
        _stage(
            config,
            "rlvr",
            config.arguments.rlvr,
            f"--config.model.folder={WORKDIR}/align",
            *_step(config, "align", "model"),
            f"--config.prompts.path={_CORPUS}/rl/train.parquet",
        ),
    ]
    policies = {"base": base} | {name: f"{WORKDIR}/{name}" for name in ("sft", "align", "rlvr")}
    steps += [_evaluate(config, stage, policies[stage]) for stage in results.STAGES]
    return [*steps, _report(config)]


def _corpus(config: Config) -> Step:
    rows = tuple(f"--rows={text}" for text in config.corpus.rows)
    slips = tuple(f"--slips={text}" for text in config.corpus.slips)
    level = f"--level={config.corpus.level}"
    where = ("data", "numerals", f"--out={_CORPUS}", level, f"--seed={config.seed}")
    return Step(name="data", arguments=(*where, *rows, *slips))


def _base(config: Config) -> list[Step]:
    """Return the steps that train the initial model."""
    train = (
        "sft",
        f"--config=configs/sft.py:{config.size},new",
        f"--workdir={WORKDIR}/base",
        f"--config.seed={config.seed}",
        f"--config.model.folder={config.base.tokenizer}",
        f"--config.data.train={_DEMONSTRATIONS}#numerals_base",
        *config.arguments.base,
    )
    return [Step(name="base", arguments=train), _export("base_model", of="base")]


def _export(name: str, *, of: str) -> Step:
    folders = (f"--workdir={WORKDIR}/{of}", f"--to={WORKDIR}/{name}")
    return Step(name=name, arguments=("export", *folders, "--dtype=as_is"), removed=name)


def _discriminator(config: Config, *, trunk: str | None) -> list[Step]:
    """Return upcycling, pairs and warm-up; without `trunk` the exported SFT policy is the trunk."""
    source = f"{WORKDIR}/sft_model" if trunk is None else trunk
    upcycle = (
        "upcycle",
        f"--from={source}",
        f"--to={WORKDIR}/upcycle",
        f"--seed={config.seed}",
        *config.arguments.upcycle,
    )
    return [
        Step(name="upcycle", arguments=upcycle, removed="upcycle"),
        _stage(
            config,
            "pairs",
            config.arguments.pairs,
            f"--config.policy.folder={WORKDIR}/sft",
            f"--config.prompts.path={_CORPUS}/align/train.parquet",
        ),
        _stage(
            config,
            "warmup",
            config.arguments.warmup,
            f"--config.model.folder={WORKDIR}/upcycle",
            f"--config.data.train={WORKDIR}/pairs/pairs.jsonl",
        ),
    ]


def _evaluate(config: Config, stage: str, policy: str) -> Step:
    return Step(
        name=f"evaluate_{stage}",
        arguments=(
            "evaluate",
            f"--config=configs/evaluate.py:{config.size}",
            f"--workdir={WORKDIR}/evaluate_{stage}",
            f"--config.seed={config.seed}",
            f"--config.policy.folder={policy}",
            *_step(config, stage, "policy"),
            f"--config.prompts.path={_CORPUS}/rl/test.parquet",
            *config.arguments.evaluate,
        ),
    )


def _step(config: Config, stage: str, section: str) -> tuple[str, ...]:
    """Return the argument that names the step of a stage's run; none for the newest."""
    has_best = config.step == "best" and stage in _HELD_OUT
    return (f"--config.{section}.step=best",) if has_best else ()


def _stage(config: Config, name: str, extra: tuple[str, ...], *arguments: str) -> Step:
    """Return a step whose command and folder both have this name."""
    where = (f"--config=configs/{name}.py:{config.size}", f"--workdir={WORKDIR}/{name}")
    return Step(
        name=name,
        arguments=(name, *where, f"--config.seed={config.seed}", *arguments, *extra),
    )


def _report(config: Config) -> Step:
    title = (f"--title={config.title}",) if config.title else ()
    out = (f"--out={WORKDIR}/report.html", f"--summary={WORKDIR}/summary.json")
    where = ("report", f"--workdir={WORKDIR}", *out)
    return Step(name=results.REPORT, arguments=(*where, *title))
