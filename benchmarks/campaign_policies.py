"""The policies of the campaign: which steps make each of them, derived from those of a chain.

A step that differs from the chain's is that step with the named arguments changed and nothing else,
so budgets are equal unless a policy says that it changes them.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from prism_jax.commands.pipeline import steps as pipeline_steps

WORKDIR = pipeline_steps.WORKDIR
GROUPS = ("core", "algorithms", "controls", "ablations", "options")
ALGORITHMS = ("grpo", "dapo", "gspo")
# Folder of the discriminator, and the ratio of lengths up to which a pair counts.
_FOLDER = "--config.discriminator.folder"
_RATIO = 1.5
# Each option of alignment, with the warm-up that it needs; "" is the chain's.
_OPTIONS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "segment": ("segment-wise credit", ("advantage.credit=segment",), ()),
    "matched": (
        "length-matched pairs",
        (f"discriminator.lengths.match_ratio={_RATIO}",),
        (f"pairs.lengths.match_ratio={_RATIO}",),
    ),
    "equal": (
        "segments cut to equal lengths",
        ("discriminator.lengths.equal_min_tokens=12",),
        ("pairs.lengths.equal_min_tokens=12",),
    ),
    "fitted": ("fitted length removed", ("discriminator.lengths.is_fitted=True",), ()),
    "swap": ("swapped pictures", ("discriminator.lengths.swap_coefficient=0.5",), ()),
    "steady": (
        "stabilisers",
        (
            "discriminator.steadying.gradient_penalty=0.1",
            "discriminator.steadying.penalty_noise=0.1",
            "discriminator.steadying.ema_decay=0.9",
            "discriminator.steadying.replay_prompts=2",
            "discriminator.steadying.replay_steps=4",
            "pace.discriminator_max_accuracy=0.9",
            "pace.policy_min_accuracy=0.55",
        ),
        (),
    ),
    "gate": ("teacher gate", ("advantage.teacher_gate=verify",), ()),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """A line of the table: the steps that make a policy, and its evaluation."""

    name: str
    title: str
    group: str
    after: tuple[str, ...]  # policies whose steps come first
    steps: tuple[pipeline_steps.Step, ...]  # the last one evaluates
    trained: str | None  # the folder whose metrics.jsonl is its own; None: it is not trained

    @property
    def evaluation(self) -> str:
        """Return the name of the step that evaluates it."""
        return self.steps[-1].name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Control:
    """The numbers of the controls: what alignment has and RLVR after SFT has not."""

    longer_steps: int  # of RLVR, with the responses of alignment besides its own
    demonstrations: int  # as many as alignment and warm-up see texts of the teacher
    sft_steps: int  # in which SFT sees them about once


CONTROLS = {
    "tiny": Control(longer_steps=3, demonstrations=8, sft_steps=2),
    # 16 x 48 + 14 x 24 responses; 384 pairs and 14 x 4 prompts; 16 demonstrations a step.
    "demo": Control(longer_steps=23, demonstrations=440, sft_steps=28),
    # 24 x 128 + 30 x 64 responses; 600 pairs and 30 x 8 prompts; about 128 a step.
    "small": Control(longer_steps=39, demonstrations=840, sft_steps=7),
}


def varied(
    step: pipeline_steps.Step,
    name: str,
    *,
    options: Sequence[str] = (),
    changes: Mapping[str, str] | None = None,
    extra: Iterable[str] = (),
) -> pipeline_steps.Step:
    """Return a step of another name and folder.

    Args:
      options: of its configuration, as in `demo,text_only`.
      changes: new values by argument, each of which the step has.
      extra: further fields of the configuration, FIELD=VALUE.
    """
    changes = dict(changes or {})
    arguments = []
    for argument in step.arguments:
        flag, _, value = argument.partition("=")
        if flag == "--config":
            value = ",".join((value, *options))
        elif flag == "--workdir":
            value = f"{WORKDIR}/{name}"
        elif flag in changes:
            value = changes.pop(flag)
        arguments.append(f"{flag}={value}" if value else flag)
    if changes:
        raise ValueError(f"{step.name} has no argument {', '.join(changes)}")
    arguments += (f"--config.{field}" for field in extra)
    return pipeline_steps.Step(name=name, arguments=tuple(arguments))


class Campaign:
    """The policies of one seed."""

    def __init__(self, config: pipeline_steps.Config):
        """Derive them from the chain of this configuration."""
        self._config = config
        self._chain = {step.name: step for step in pipeline_steps.plan(config)}
        self._control = CONTROLS[config.size]

    def policies(self) -> list[Policy]:
        """Return all policies, in the order in which they are made."""
        return [
            *self._core(),
            *self._algorithms(),
            *self._controls(),
            *self._ablations(),
            *self._options(),
        ]

    def _policy(
        self,
        name: str,
        title: str,
        group: str,
        *steps: pipeline_steps.Step,
        after: Sequence[str],
    ) -> Policy:
        """Return a policy whose last step trains it, with its evaluation."""
        evaluation = varied(
            self._chain["evaluate_sft"],
            f"evaluate_{steps[-1].name}",
            changes={"--config.policy.folder": f"{WORKDIR}/{steps[-1].name}"},
        )
        return Policy(
            name=name,
            title=title,
            group=group,
            after=tuple(after),
            steps=(*steps, evaluation),
            trained=steps[-1].name,
        )

    def _core(self) -> list[Policy]:
        chain = self._chain
        base = Policy(
            name="base",
            title="base",
            group="core",
            after=(),
            steps=(chain["data"], chain["evaluate_base"]),
            trained=None,
        )
        before = [chain[name] for name in ("upcycle", "pairs", "warmup", "align")]
        return [
            base,
            self._policy("sft", "SFT", "core", chain["sft"], after=("base",)),
            self._rlvr("sft_grpo", "SFT → GRPO", "core", start="sft"),
            self._policy("prism", "PRISM", "core", *before, after=("sft",)),
            # The chain's own, so that `report` on the seed's folder shows it.
            self._policy("prism_grpo", "PRISM → GRPO", "core", chain["rlvr"], after=("prism",)),
        ]

    def _rlvr(
        self,
        name: str,
        title: str,
        group: str,
        *,
        start: str,
        folder: str | None = None,
        algorithm: str = "grpo",
        options: Sequence[str] = (),
        extra: Sequence[str] = (),
    ) -> Policy:
        """Return a policy of RLVR from the folder of another, `start`."""
        fields = list(extra)
        if algorithm == "dapo":
            # One generation a step: as many responses as the others, and learning from those
            # groups among them that vary.
            prompts = _value(self._chain["rlvr"], "rollout.num_prompts")
            fields += [
                f"groups.generation_prompts={prompts}",
                "groups.max_generations=1",
                "groups.surplus_steps=0",
            ]
        step = varied(
            self._chain["rlvr"],
            name,
            options=(algorithm, *options),
            changes={"--config.model.folder": f"{WORKDIR}/{folder or start}"},
            extra=fields,
        )
        return self._policy(name, title, group, step, after=(start,))

    def _algorithms(self) -> list[Policy]:
        return [
            self._rlvr(
                f"{start}_{algorithm}",
                f"{title} → {algorithm.upper()}",
                "algorithms",
                start=start,
                folder=folder,
                algorithm=algorithm,
            )
            for algorithm in ALGORITHMS[1:]
            for start, folder, title in (("sft", "sft", "SFT"), ("prism", "align", "PRISM"))
        ]

    def _controls(self) -> list[Policy]:
        control = self._control
        data = pipeline_steps.Step(
            name="data_more",
            arguments=(
                *("data", "numerals", f"--out={WORKDIR}/corpus_more"),
                f"--level={self._config.corpus.level}",
                f"--seed={self._config.seed + 1000}",
                *(f"--rows={part}=0" for part in ("base", "public", "align", "rl_train")),
                *("--rows=rl_test=0", f"--rows=teacher={control.demonstrations}"),
            ),
        )
        sft = self._chain["sft"]
        arguments = (
            *(a for a in sft.arguments if not a.startswith("--config.data.train=")),
            f"--config.data.train={WORKDIR}/corpus_more/sft/dataset_info.json#numerals_teacher",
        )
        more = varied(
            dataclasses.replace(sft, arguments=arguments),
            "more_sft",
            changes={"--config.model.folder": f"{WORKDIR}/sft"},
            extra=(f"train.num_steps={control.sft_steps}",),
        )
        title = "SFT → SFT on the teacher"
        return [
            self._rlvr(
                "sft_grpo_longer",
                "SFT → GRPO, longer",
                "controls",
                start="sft",
                extra=(f"train.num_steps={control.longer_steps}",),
            ),
            self._policy("more_sft", title, "controls", data, more, after=("sft",)),
            self._rlvr("more_sft_grpo", f"{title} → GRPO", "controls", start="more_sft"),
        ]

    def _aligned(
        self,
        name: str,
        title: str,
        group: str,
        *,
        options: Sequence[str] = (),
        trunk: str | None = None,
        extra: Sequence[str] = (),
        warmup_extra: Sequence[str] = (),
    ) -> list[Policy]:
        """Return a policy of another alignment, and GRPO from it.

        Args:
          options: of both configurations, warm-up's and alignment's.
          trunk: the folder that is warmed up in place of the mixture.
          extra, warmup_extra: fields of alignment and of warm-up.
        """
        steps, changes = [], {"--config.model.folder": f"{WORKDIR}/sft"}
        if options or trunk or warmup_extra:
            warmup = varied(
                self._chain["warmup"],
                f"warmup_{name}",
                options=options,
                changes={} if trunk is None else {"--config.model.folder": trunk},
                extra=warmup_extra,
            )
            steps, changes = [warmup], {_FOLDER: f"{WORKDIR}/warmup_{name}"}
        align = varied(
            self._chain["align"], f"align_{name}", options=options, changes=changes, extra=extra
        )
        return [
            self._policy(name, title, group, *steps, align, after=("prism",)),
            self._rlvr(
                f"{name}_grpo", f"{title} → GRPO", group, start=name, folder=f"align_{name}"
            ),
        ]

    def _ablations(self) -> list[Policy]:
        """Return three of the paper's ablations; the fourth, no alignment, is `sft_grpo`."""
        base = _value(self._chain["evaluate_base"], "policy.folder")
        return [
            *self._aligned("dense", "PRISM, dense discriminator", "ablations", trunk=base),
            *self._aligned("text_only", "PRISM, text-only", "ablations", options=("text_only",)),
            *self._aligned("whole", "PRISM, whole response", "ablations", options=("whole",)),
        ]

    def _options(self) -> list[Policy]:
        policies = []
        for name, (title, extra, warmup_extra) in _OPTIONS.items():
            policies += self._aligned(
                name, f"PRISM, {title}", "options", extra=extra, warmup_extra=warmup_extra
            )
        steps = int(_value(self._chain["rlvr"], "train.num_steps"))
        adversary = self._rlvr(
            "adversary_grpo",
            "SFT → GRPO with adversary",
            "options",
            start="sft",
            options=("adversary",),
            extra=(
                f"adversary.discriminator.folder={WORKDIR}/warmup",
                f"adversary.decay_steps={max(1, steps // 2)}",
            ),
        )
        return [*policies, dataclasses.replace(adversary, after=("prism",))]


def _value(step: pipeline_steps.Step, field: str) -> str:
    """Return a field that the step's arguments set."""
    start = f"--config.{field}="
    values = [a.removeprefix(start) for a in step.arguments if a.startswith(start)]
    if not values:
        raise ValueError(f"step {step.name} must set {field}")
    return values[-1]


def chosen(policies: Sequence[Policy], names: Sequence[str]) -> list[Policy]:
    """Return the policies with these names, or of these groups, and those that they follow."""
    by_name = {policy.name: policy for policy in policies}
    unknown = sorted(set(names) - by_name.keys() - set(GROUPS))
    if unknown:
        raise ValueError(
            f"policies must be among {', '.join((*GROUPS, *by_name))}, got {', '.join(unknown)}"
        )
    needed = [p.name for p in policies if p.name in names or p.group in names]
    for name in needed:  # grows
        needed += [before for before in by_name[name].after if before not in needed]
    return [policy for policy in policies if policy.name in needed]


def steps_of(policies: Sequence[Policy]) -> list[pipeline_steps.Step]:
    """Return the steps of policies in their order, each once."""
    steps = {step.name: step for policy in policies for step in policy.steps}
    return list(steps.values())
