"""A model of a step's time from 8 to 4096 chips, and the page docs/scale.md that is made of it.

    python -m benchmarks.scale_model --out=docs/scale.md

Nothing is run. What a step does is counted from the configuration; how near to the peaks it comes
is taken from measured records (`MEASURED`, `benchmarks/results`), and what no record says is an
assumption with a name (`ASSUMED`). The page states all of them.
"""

import argparse
import dataclasses
import importlib
import json
import math
import pathlib
from collections.abc import Sequence

from models.config import Qwen3VLConfig
from prism_jax.commands.plan import machines, memory, opening

_RESULTS = pathlib.Path(__file__).parent / "results"
CHIPS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_SLICE = 256  # chips of a slice; more are several, joined by the data centre's network
_MAX_TENSOR = 8  # kv heads
_GAIN = 1.10  # from which separate samplers are worth their trouble


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fraction:
    """How much of a peak is reached, and where that is known from."""

    value: float
    source: str


def decoding() -> Fraction:
    """Return the fraction of memory bandwidth that a step of decoding reached."""
    record = json.loads((_RESULTS / "h100_decode_4b.json").read_text())
    (engine,) = (row for row in record["results"] if row["program"] == "engine")
    return Fraction(
        value=engine["of_2.9_terabytes_per_second"],
        source=f"h100_decode_4b.json: 4B, {engine['rows']} rows, {record['device']}",
    )


def training_small() -> Fraction:
    """Return the fraction of the peak arithmetic that an update of 107 million parameters reached.

    The widths of small are a quarter of 4B's: it is the least that is known.
    """
    record = json.loads((_RESULTS / "h100_train_small.json").read_text())
    (best,) = (row for row in record["results"] if row["variant"] == "remat_attention")
    return Fraction(
        value=best["of_989_teraflops"],
        source=f"h100_train_small.json: 107M, {record['device']}",
    )


# One H100 80GB on 2026-11-27, JAX 0.11.2, text of 4B dimensions, the real commands.
MEASURED = {
    # 16.9k tokens a second x 6 x 4.022e9 parameters in matrices, of 989e12.
    "update": Fraction(value=0.41, source="sft, 1 x 8192 tokens, bf16 states: 16.9k tokens/s"),
    # 26.0 s instead of 6.2 where each of about 1024 tokens gathers three quarters of 8.04 GB over
    # NVLink of 450 GB/s one way.
    "link": Fraction(value=0.69, source="rlvr on 4 GPUs, weights gathered a token: 26.0 s not 6.2"),
    # Rollouts on 4 GPUs, weights on each.
    "spread": Fraction(value=0.97, source="rlvr on 4 GPUs, weights on each: 6.2 s not 6.0"),
}
# Of an answer, of processor time: the mean of 400 of tests/rewards/answers.jsonl, drawn with seed
# 0, on a core of a machine without accelerators; 2.64 ms, the slowest 217.
JUDGE_SECONDS = 0.00264
ASSUMED = {
    "mean_tokens": 2000,  # of a response; the longest is the limit
    "judge_workers": 2,  # of each host, as configured
    "sum_seconds": 10e-6,  # of a sum over `tensor` in decoding: its latency
    "network_gigabytes": 6.25,  # a second and chip, between slices (50 Gbit/s)
    "copy_gigabytes": 8.0,  # a second and host, from devices to the host, before a save goes on
    "save_every": 50,  # steps
    "step_seconds": 1.0,  # packing, reading prompts, dispatch, metrics: of a step
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A step of RLVR or of alignment."""

    name: str
    model: Qwen3VLConfig
    judge: Qwen3VLConfig | None  # the discriminator
    num_responses: int
    max_tokens: int
    prompt_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of the parts of a step."""

    rollout: float
    tensor: int  # devices that share the weights in it
    reshard: float
    judge: float
    scores: float
    update: float
    save: float

    @property
    def learning(self) -> float:
        """Return everything behind the rollout."""
        rest = self.judge + self.scores + self.update + self.save
        return rest + ASSUMED["step_seconds"]

    @property
    def total(self) -> float:
        """Return a step on shared chips."""
        return self.rollout + self.reshard + self.learning


def parameters(config: Qwen3VLConfig) -> float:
    """Return the parameters in the text model's matrices, the head included."""
    text = config.text
    layers = text.num_layers * memory.layer_parameters(config)
    return layers + text.hidden_size * text.vocab_size


def rollout(case: Case, kind: machines.Generation, chips: int) -> tuple[float, int]:
    """Return the seconds of a rollout, and how many devices share the weights in the fastest.

    All responses of a device are in flight together. Every step reads its weights; every token
    reads the keys and values before it. The longest response decides the number of steps.
    """
    text = case.model.text
    speed = kind.terabytes * 1e12 * decoding().value * MEASURED["spread"].value
    place = 2 * 2 * text.num_layers * text.num_kv_heads * text.head_dim
    mean, most = ASSUMED["mean_tokens"], case.max_tokens
    estimates = []
    tensor = 1
    while tensor <= min(_MAX_TENSOR, chips):
        responses = case.num_responses / (chips / tensor)
        weights = 2 * parameters(case.model) / tensor
        # As many as memory holds beside the weights, at their mean length; others wait.
        room = 0.5 * kind.hbm_gib * 2**30 * tensor / (place * (case.prompt_tokens + mean))
        steps = max(most, math.ceil(responses / room) * mean) if responses >= 1 else most
        reads = max(responses, 1) * mean * place / tensor * (case.prompt_tokens + mean / 2)
        sums = 0.0 if tensor == 1 else 2 * text.num_layers * ASSUMED["sum_seconds"] * steps
        estimates.append(((steps * weights + reads) / speed + sums, tensor))
        tensor *= 2
    return min(estimates)


def arithmetic(config: Qwen3VLConfig, tokens: float, passes: int) -> float:
    """Return the floating-point operations of so many tokens, the forward once and the gradient."""
    text = config.text
    matrices = text.num_layers * memory.layer_parameters(config, is_active=True)
    return 2 * passes * (matrices + text.hidden_size * text.vocab_size) * tokens


def step(case: Case, kind: machines.Generation, chips: int) -> Step:
    """Return the seconds of a step on so many chips."""
    seconds, tensor = rollout(case, kind, chips)
    peak = kind.teraflops * 1e12 * MEASURED["update"].value
    link = kind.link_gigabytes * 1e9 * MEASURED["link"].value
    hosts = max(1, chips // 4)
    fsdp = min(chips, 128)
    slices = max(1, chips // _SLICE)
    # A row on each chip holds a response at its longest; the last ones have no row of their own.
    rows = math.ceil(case.num_responses / chips)
    tokens = rows * (case.prompt_tokens + ASSUMED["mean_tokens"])
    gather = 2 * parameters(case.model) / link
    compute = arithmetic(case.model, tokens, 3) / peak
    update = max(compute, 4 * gather * rows)
    if slices > 1:
        # Gradients in float32, summed among the slices.
        update += 2 * 4 * parameters(case.model) / fsdp / (ASSUMED["network_gigabytes"] * 1e9)
    scores = 0.0
    if case.judge is not None:
        # Both segments with their prompts, of teacher and student; a score, then a gradient.
        segments = rows * (2 * case.prompt_tokens + ASSUMED["mean_tokens"]) * 17 / 16
        scores = arithmetic(case.judge, segments, 4) / peak
    state = 12 * parameters(case.model)
    return Step(
        rollout=seconds,
        tensor=tensor,
        reshard=2 * parameters(case.model) / tensor / link,
        judge=math.ceil(case.num_responses / hosts) * JUDGE_SECONDS / ASSUMED["judge_workers"],
        scores=scores,
        update=update,
        save=state / hosts / (ASSUMED["copy_gigabytes"] * 1e9) / ASSUMED["save_every"],
    )


def separate(case: Case, kind: machines.Generation, chips: int) -> tuple[float, float]:
    """Return the seconds of a step with samplers of their own, and their best share of the chips.

    Samplers draw for the next step while the trainer learns from the last one.
    """
    estimates = []
    for eighths in range(1, 8):
        samplers = chips * eighths // 8
        if not samplers or samplers == chips:
            continue
        sampling = rollout(case, kind, samplers)[0]
        learned = step(case, kind, chips - samplers)
        estimates.append((max(sampling + learned.reshard, learned.learning), eighths / 8))
    return min(estimates)


def cases(chips: int, *, is_scaled: bool) -> list[Case]:
    """Return the shipped steps of 8B; scaled, with as many responses a chip as on 8 chips."""
    all_cases = []
    for name, judge in (("rlvr", None), ("align", opening.MODELS["discriminator"])):
        rollout_config = importlib.import_module(f"configs.{name}").get_config("8b").rollout
        responses = rollout_config.num_prompts * rollout_config.num_responses
        if is_scaled:
            responses = max(responses, responses // CHIPS[0] * chips)
        all_cases.append(
            Case(
                name=f"{name}:8b",
                model=opening.MODELS["8b"],
                judge=judge,
                num_responses=responses,
                max_tokens=rollout_config.max_response_tokens,
                prompt_tokens=1000,
            )
        )
    return all_cases


def table(generation: str, *, is_scaled: bool) -> list[str]:
    """Return the lines of a table for one generation."""
    kind = machines.GENERATIONS[generation]
    head = ["step", "chips", "responses", "rollout", "tensor", "reshard", "judge", "scores"]
    head += ["update", "save", "step", "responses/s", "of linear", "separate", "gain"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for index in range(2):
        first = None
        for chips in CHIPS:
            case = cases(chips, is_scaled=is_scaled)[index]
            estimate = step(case, kind, chips)
            rate = case.num_responses / estimate.total
            first = first or rate / chips
            apart, share = separate(case, kind, chips)
            gain = estimate.total / apart
            cells = [
                case.name,
                chips,
                case.num_responses,
                f"{estimate.rollout:.1f}",
                estimate.tensor,
            ]
            cells += [f"{estimate.reshard:.2f}", f"{estimate.judge:.2f}", f"{estimate.scores:.1f}"]
            cells += [f"{estimate.update:.1f}", f"{estimate.save:.2f}", f"{estimate.total:.1f}"]
            cells += [f"{rate:.2f}", f"{rate / chips / first:.2f}"]
            cells += [f"{apart:.1f} ({share:.2f})", f"{gain:.2f}"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def turning_points(generation: str, *, is_scaled: bool) -> list[str]:
    """Return where more chips stop paying, and where separate samplers begin to."""
    kind, points = machines.GENERATIONS[generation], []
    for index in range(2):
        steps, gains = {}, {}
        for chips in CHIPS:
            case = cases(chips, is_scaled=is_scaled)[index]
            steps[chips] = step(case, kind, chips).total / case.num_responses
            gains[chips] = case.num_responses * steps[chips] / separate(case, kind, chips)[0]
        above = [chips for chips, gain in gains.items() if gain >= _GAIN]
        doubled = [c for c in CHIPS[:-1] if steps[c] / steps[2 * c] < _GAIN]
        name = cases(8, is_scaled=is_scaled)[index].name
        text = (
            f"twice the chips gain less than a tenth from {doubled[0]} on"
            if doubled
            else ("more chips pay up to 4096")
        )
        apart = (
            f"separate samplers gain a tenth or more at {_span(above)}"
            if above
            else ("separate samplers gain a tenth nowhere")
        )
        points.append(f"{name}: {text}; {apart} (at most {max(gains.values()):.2f} times).")
    return points


def _span(chips: Sequence[int]) -> str:
    return f"{chips[0]} to {chips[-1]} chips" if len(chips) > 1 else f"{chips[0]} chips"


def page() -> str:
    """Return the page."""
    facts = {"memory bandwidth in decoding": decoding(), "update, 107M": training_small()}
    facts |= {f"{name}, 4B": one for name, one in MEASURED.items()}
    lines = [
        _HEAD,
        "## What is measured",
        "",
        "| fraction of the peak | | record |",
        "|---|---:|---|",
    ]
    lines += [f"| {name} | {one.value:.2f} | {one.source} |" for name, one in facts.items()]
    lines += ["", "## What is assumed", "", "| | |", "|---|---:|"]
    lines += [f"| `{name}` | {value:g} |" for name, value in ASSUMED.items()]
    lines += ["", _READING]
    for generation in ("v5p", "v6e"):
        for is_scaled in (False, True):
            what = "the batch grows with the chips" if is_scaled else "the batch as shipped"
            lines += [f"## {generation}, {what}", "", *table(generation, is_scaled=is_scaled), ""]
            lines += [f"- {line}" for line in turning_points(generation, is_scaled=is_scaled)]
            lines.append("")
    return "\n".join(lines)


_HEAD = """# Scale: a model of a step from 8 to 4096 chips

Made by `python -m benchmarks.scale_model --out=docs/scale.md`. **This is a model, not a
measurement**: nothing ran on a TPU, and nothing of this project on more than 4 devices of one
host. Peaks are those of `prism_jax/commands/plan/machines.py`; the fractions of them that are
reached come from records of an H100, carried over to TPUs as they are.
"""
_READING = """An answer is judged in 2.64 ms of processor time (the mean of 400 of the judge's
regression set, on a core of a machine without accelerators). The mean length of a response and the
latency of a sum matter most. A run's own are in its `metrics.jsonl` (`time/*`,
`rollout/response_tokens_mean`); `benchmarks/scale_model.py` holds the assumptions in one table.

- *rollout*: each device draws all its responses at once; weights are read once a token step, keys
  and values once a token. The longest response decides how many steps there are, so a rollout never
  takes less than the limit's number of reads of the weights: more chips cannot help, `tensor` can,
  until the latency of its sums does. *tensor* is the best.
- *scores*: of the discriminator, with its update. *update*: of the policy, rematerialised.
- *step*: on shared chips, one part after the other. *separate*: samplers with the share of the
  chips in brackets draw for the next step while the trainer learns: one step off policy.
- *of linear*: responses a second and chip, of those at 8 chips.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args(arguments)
    args.out.write_text(page())


if __name__ == "__main__":
    main()
