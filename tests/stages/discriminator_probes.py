"""What parts of alignment and warm-up make of a configuration, without training.

A probe takes (options, folder of `rl_run.write`) and, where it opens files, an empty `workdir`.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np

from configs import align, warmup
from prism_jax.discriminator import loss as discriminator_loss
from prism_jax.discriminator import step_scores
from prism_jax.policy import responses, rollouts
from prism_jax.rewards import score
from prism_jax.rollout import engine
from prism_jax.setup import agreement
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.align import advantages as align_advantages
from prism_jax.stages.align import config as align_config
from prism_jax.stages.align import feed as align_feed
from prism_jax.stages.align import mean_weights
from prism_jax.stages.align import replay as align_replay
from prism_jax.stages.align import step as align_step
from prism_jax.stages.align import updates as align_updates
from prism_jax.stages.warmup import config as warmup_config
from prism_jax.stages.warmup import feed as warmup_feed
from prism_jax.stages.warmup import step as warmup_step
from tests.stages import field_tables, rl_run
from tests.stages.align import align_run

_TEXTS = (*align_run.TEXTS[:3], "<caption></caption><think>so</think><answer>2</answer>")
_BASES = {"align": "tiny,new,rlvr_v2", "warmup": "tiny,new"}
STRUCTS = {"align": align_config.Config, "warmup": warmup_config.Config}


def configure(stage, folder):
    """Return a stage's configuration of small new models."""
    config = {"align": align, "warmup": warmup}[stage].get_config(_BASES[stage])
    config.update_from_flattened_dict(field_tables.at("model.sizes.", rl_run.SMALL))
    config.mesh.num_devices = 1
    config.model.folder = str(folder / "tok")
    if stage == "align":
        sizes = field_tables.at("discriminator.sizes.", rl_run.SMALL)
        config.update_from_flattened_dict(sizes)
        config.discriminator.folder = str(folder / "tok")
        config.prompts.path = (str(folder / "corpus" / "align" / "train.parquet"),)
        config.rollout.num_responses = 4
        config.rollout.max_response_tokens = 96
    else:
        config.data.train = (str(folder / "pairs" / "pairs.jsonl"),)
    return config


def options(stage, folder, changes):
    """Return the same with some fields changed."""
    return field_tables.parsed(STRUCTS[stage], configure(stage, folder), changes)


def _numbers(is_pair):
    """Return fixed scores of two prompts with four responses each."""
    draws = 4 * np.random.default_rng(0).normal(size=(3, 10)).astype(np.float32)
    return {
        name: discriminator_loss.Scores(
            teacher=draw[:2],
            student=np.where(is_pair, draw[2:], 0).astype(np.float32),
            is_pair=np.array(is_pair, bool),
            teacher_tokens=np.array([5, 30]),
            student_tokens=np.arange(8) * 7,
        )
        for name, draw in zip(("caption", "cot", "response"), draws, strict=True)
    }


def advantages(options, folder):
    """Return the advantages of fixed scores."""
    del folder
    ok = np.array([1, 1, 1, 0, 1, 1, 1, 1], bool)
    found = {name: _numbers(ok)[name] for name in options.advantage.weights}
    right = np.array([1, 0, 1, 1, 1, 1, 1, 1], np.float32)
    return jax.device_get(align_advantages.make_advantages(options)(found, ok, right))


def _rule(options):
    own = options.discriminator if isinstance(options, align_config.Config) else options.pairs
    experts = types.SimpleNamespace(config=types.SimpleNamespace(text=types.SimpleNamespace(moe=1)))
    return own.rule(experts)


def gated(options, folder):
    """Return the advantages where the second prompt's teacher is wrong, and who judges it."""
    del folder
    ok = np.array([1, 1, 1, 0, 1, 1, 1, 1], bool)
    found = {name: _numbers(ok)[name] for name in options.advantage.weights}
    right = np.array([1, 0, 1, 1, 1, 0, 1, 1], np.float32)
    is_trusted = None if options.advantage.teacher_gate == "off" else np.array([True, False])
    return align_advantages.make_advantages(options)(found, ok, right, is_trusted)


def averaged(options, folder):
    """Return the mean of weights after an update."""
    del folder
    average = mean_weights.make_average(options.discriminator.steadying.ema_decay)
    return None if average is None else average(jnp.ones(2), jnp.zeros(2))


def replayed(options, folder):
    """Return the rows whose responses are learned from again, in steps of two prompts."""
    del folder
    own = options.discriminator.steadying
    replay = align_replay.Replay(
        None,
        num_prompts=own.replay_prompts,
        num_steps=own.replay_steps,
        read=list,
        reader=types.SimpleNamespace(read=lambda rollout: [None] * len(rollout.lengths)),
    )
    rollout = engine.Rollout(
        tokens=np.ones((4, 3), np.int32),
        logprobs=np.zeros((4, 3), np.float32),
        lengths=np.full(4, 2, np.int32),
        ended=np.ones(4, bool),
    )
    drawn = []
    for step in range(1, 7):
        earlier = replay.drawn(step)
        drawn.append(earlier and earlier[0])
        prompts = types.SimpleNamespace(indices=[10 * step, 10 * step + 1])
        replay.add(step, prompts, types.SimpleNamespace(rollout=rollout))
    return drawn


def pulls(options, folder, is_pair=(1, 1, 1, 0, 1, 0, 0, 0)):
    del folder
    found = {name: _numbers(np.array(is_pair, bool))[name] for name in ("caption", "cot")}
    swapped = {"swapped": np.float32([0.5, 0.0]), "has_swap": np.array([True, False])}
    found["caption"] = dataclasses.replace(found["caption"], **swapped)
    gradients, told = discriminator_loss.gradients_by_name(found, _rule(options))
    return [(one.teacher, one.student) for one in gradients.values()], told


def pulls_without_a_pair(options, folder):
    """Return the same of a step without a well-formed response."""
    return pulls(options, folder, is_pair=(0,) * 8)


def coefficients(options, folder):
    """Return the factors of the discriminator's terms."""
    del folder
    return _rule(options).coefficients(["caption", "cot"], of_segment=1.0)


def settings(options, folder):
    """Return how the discriminator computes its scores while it learns."""
    del folder
    devices = devices_lib.open_devices(options.mesh, options.model)
    if isinstance(options, align_config.Config):
        return align_updates.score_settings(options, devices)
    return warmup_step.score_settings(options, devices)


def verified(options, folder):
    """Ask a judge whose format is looser than the gate, and who calls every answer wrong."""
    del folder

    class Judge:
        def grade(self, tasks):
            reason = score.Reason.WRONG
            return [score.Reward(total=0.2, accuracy=0.0, format=1.0, reason=reason) for _ in tasks]

    row = types.SimpleNamespace(
        id="a",
        prompt=(),
        images=(),
        videos=(),
        extra_info={},
        ground_truth="1",
        equivalent_answers=(),
        data_source=None,
    )
    one = types.SimpleNamespace(text="", ended=True, format_ok=False)
    prompts = types.SimpleNamespace(rows=[row] * 2)
    responses = types.SimpleNamespace(segments=[one] * 8)
    return align_advantages.verdicts(options, Judge(), prompts, responses)[:2]


def judged(options, folder):
    """Return what the judge says of an answer in another unit, and the processes it starts."""
    del folder
    task = score.Task(
        response="<caption>c</caption><think>t</think><answer>5 kg</answer>",
        ended=True,
        ground_truth="5 lb",
        equivalent_answers=(),
        data_source="",
    )
    return field_tables.judged(options.judge.open, [task])


def paces(options, folder):
    """Count the updates of both models over four steps."""
    del folder
    counts = {"policy": 0, "discriminator": 0}

    def learn(name):
        def one(state, batch, key):
            del batch, key
            counts[name] += 1
            return state, {"loss/total": 0}

        return one

    updates = align_updates.Updates(
        policy=learn("policy"),
        discriminator=learn("discriminator"),
        refresh=lambda params, batch, places, key: batch,
        is_always_fresh=False,
    )
    of_step = []
    for step in range(4):
        known = types.SimpleNamespace(num_skipped_in_row=jnp.zeros(()))
        state = {name: _State(step=step, opt_state=known) for name in counts}
        accuracy = 0.5 + 0.1 * step
        has_policy = options.pace.has_policy_update(step, accuracy)
        learned = align_updates.StepBatch(
            policy=1 if has_policy else None,
            discriminator=None,
            places={},
            has_discriminator_update=options.pace.has_discriminator_update(accuracy),
        )
        align_step.update(updates, options.pace, state, learned, jax.random.key(0))
        of_step.append(dict(counts))
    return of_step


@dataclasses.dataclass
class _State:
    step: int
    opt_state: object
    params: object = None


def _open_align(options, folder, workdir):
    devices = devices_lib.open_devices(options.mesh, options.model)
    source = options.discriminator.model(options.model)
    files = setup_models.keep_files(options.model, workdir)
    discriminator_files = setup_models.keep_files(
        source, workdir, name="discriminator", is_discriminator=True
    )
    policy = setup_models.open_model(options.model, devices, files=files, is_discriminator=False)
    discriminator = setup_models.open_model(
        source, devices, files=discriminator_files, is_discriminator=True
    )
    feed = align_feed.Feed(
        options,
        policy,
        discriminator,
        workdir,
        files=files,
        discriminator_files=discriminator_files,
    )
    return devices, policy, discriminator, feed


def read(options, folder, workdir):
    """Return what both models are given in the first step, with the shapes of the rows."""
    prompts, feed, shapes, packed, places = packed_segments(options, folder, workdir, _TEXTS)
    seen = [(x.tokens, x.pixels) for x in (*prompts.policy, *prompts.discriminator)]
    return shapes, seen, packed.batch, places, len(feed.sizes)


def packed_segments(options, folder, workdir, texts):
    """Lay the segments of a first step into rows; the responses are these texts in turn."""
    devices, policy, discriminator, feed = _open_align(options, folder, workdir)
    shapes = feed.shapes(devices)
    is_split_seen = options.discriminator.is_split_seen(discriminator)
    prompts = next(feed.train(shapes.discriminator, is_split_seen=is_split_seen))
    reader = responses.Reader.of(
        feed.words, vocab_tokens=policy.config.text.vocab_size, gate=options.gate
    )
    size = len(prompts.rows) * options.rollout.num_responses
    tokens = np.zeros((size, 96), np.int32)
    lengths = np.zeros(size, np.int32)
    for row in range(size):
        ids = feed.words.tokenizer.encode(texts[row % len(texts)])
        ids.append(feed.words.tokenizer.eos_token_id)
        tokens[row, : len(ids)], lengths[row] = ids, len(ids)
    rollout = engine.Rollout(
        tokens=tokens,
        logprobs=np.zeros(tokens.shape, np.float32),
        lengths=lengths,
        ended=np.ones(size, bool),
    )
    drawn = rollouts.Responses(
        rollout=rollout, segments=reader.read(rollout), num_prompts=len(prompts.rows), seconds=0.0
    )
    packed, places = step_scores.packed_segments(
        prompts, drawn, feed.cutter, shapes.discriminator, discriminator
    )
    return prompts, feed, shapes, packed, places


def drawn_with(options, folder, workdir):
    """Return what the engine is asked."""
    devices, policy, _, feed = _open_align(options, folder, workdir)
    sampler = rollouts.Sampler(
        options.rollout, policy, devices, words=feed.words, sizes=feed.sizes, gate=options.gate
    )
    return field_tables.asked_of_the_engine(sampler, options.rollout.num_prompts)


def read_pairs(options, folder, workdir):
    """Return the first batch of the warm-up, its shape, length and held-out pairs."""
    devices = devices_lib.open_devices(options.mesh, options.model)
    files = setup_models.keep_files(options.model, workdir)
    model = setup_models.open_model(options.model, devices, files=files, is_discriminator=True)
    feed = warmup_feed.Feed(
        options.data,
        model,
        files=files,
        num_pairs=options.train.num_pairs,
        seed=options.seed,
        folder=workdir,
        equal_min_tokens=options.pairs.lengths.equal_min_tokens,
    )
    shape = options.rows.shape(feed.largest(), devices, shared_units=1, place="config.rows")
    scored = []

    def scorer(params, batch):
        scored.append(batch.is_segment)
        return jnp.zeros(batch.is_segment.shape)

    with jax.set_mesh(devices.mesh):
        evaluate = feed.evaluation(scorer, shape, devices, num_batches=options.evaluate.num_batches)
        if evaluate is not None:
            evaluate(types.SimpleNamespace(params=None), 1)
    num_steps = options.train.num_steps or feed.num_steps(options.train.num_epochs)
    return (
        shape,
        next(
            feed.train(
                shape,
                num_steps=num_steps,
                inputs=agreement.Inputs(),
                is_split_seen=options.pairs.is_split_seen(model),
            )
        ),
        num_steps,
        len(scored),
    )


def threads(options, folder, workdir):
    """Return how many threads make steps ahead."""
    look = read if isinstance(options, align_config.Config) else read_pairs
    return field_tables.threads_ahead(lambda: look(options, folder, workdir))


def policy_optimizer(options, folder):
    """Return where the policy's optimizer goes."""
    del folder
    return field_tables.moved(options.optim)


def discriminator_optimizer(options, folder):
    """Return where the discriminator's optimizer goes."""
    del folder
    return field_tables.moved(options.discriminator.optim)


def devices(options, folder):
    """Return how everything is computed."""
    del folder
    return field_tables.placed(devices_lib.open_devices(options.mesh, options.model))


def policy_model(options, folder, workdir):
    """Return the policy's configuration and shapes."""
    return _model(options.model, options, workdir, is_discriminator=False)


def discriminator_model(options, folder, workdir):
    """Return the same of alignment's discriminator."""
    source = options.discriminator.model(options.model)
    return _model(source, options, workdir, is_discriminator=True)


def warmed_model(options, folder, workdir):
    """Return the same of warm-up's discriminator."""
    return _model(options.model, options, workdir, is_discriminator=True)


def _model(source, options, workdir, *, is_discriminator):
    devices = devices_lib.open_devices(options.mesh, options.model)
    files = setup_models.keep_files(source, workdir)
    model = setup_models.open_model(source, devices, files=files, is_discriminator=is_discriminator)
    return field_tables.shapes(model)
