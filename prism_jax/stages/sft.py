"""Stage 1, supervised fine-tuning: `python -m prism_jax sft --config=configs/sft.py:4b …`.

Demonstrations are packed into rows of `data.row_tokens` tokens with their images, and the policy
learns the assistant's tokens alone. A step has `train.num_microbatches` microbatches of
`train.num_rows` rows; how it is split does not change it. Runs on TPU, GPU or CPU; configs/sft.py
names sizes, hardware and sources.
"""

import functools
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from models import moe
from prism_jax import batches, configuration, loop, metrics, train_step
from prism_jax.losses import reduce, sft
from prism_jax.stages import running, setup, sft_config, sft_feed

# May change between a run and its continuation.
_MAY_DIFFER = ("data.cache_dir", "data.num_threads", "data.cache_mebibytes", "evaluate")


def main(argv: Sequence[str]) -> None:
    """Train a policy on demonstrations."""
    begun = time.monotonic()
    config, workdir = configuration.read(argv, command="sft")
    options = configuration.parse(sft_config.Config, config)
    devices = setup.open_devices(options.mesh, options.model)
    keys = running.keys(options.seed)
    with running.hold(workdir) as folder, jax.set_mesh(devices.mesh):
        files = setup.keep_files(options.model, folder)
        model = setup.open_model(options.model, devices, files=files, is_discriminator=False)
        identity = running.identity("sft", config, [model], may_differ=_MAY_DIFFER)
        if running.is_finished(folder, identity):
            return
        feed = sft_feed.Feed(
            options,
            devices,
            model,
            words=sft_feed.open_words(options.data, files),
            folder=folder,
        )
        num_steps = options.train.num_steps or feed.num_steps(options.train.num_epochs)
        data = feed.train(num_steps)
        optimizer = setup.make_optimizer(options.optim, model.params, num_steps=num_steps)
        start = setup.start_of(model, optimizer, devices, key=keys.init)
        loss_fn = make_loss(options, devices)
        update = train_step.make_train_step(
            model.graphdef,
            loss_fn,
            optimizer,
            weights_fn=functools.partial(weights, has_router=model.config.text.moe is not None),
            coefficients=coefficients(options.train, model),
            num_microbatches=options.train.num_microbatches,
            shardings=start.shardings,
        )
        running.run(
            running.Run(
                identity=identity,
                workdir=folder,
                seed=options.seed,
                key=keys.run,
                begun=begun,
                num_steps=num_steps,
                evaluate_every_steps=options.evaluate.every_steps,
                max_skipped_in_row=options.train.max_skipped_in_row,
                watched=("loss/nll", "eval/nll", "optim/learning_rate"),
                checkpoint=options.checkpoint,
                resume=options.resume,
                log=options.log,
            ),
            loop.Stage(
                experience=loop.learn_from_data,
                update=update,
                evaluate=feed.evaluation(model.graphdef, loss_fn),
                skip_counters=("optim/skipped_in_row",),
            ),
            data,
            abstract_state=start.abstract,
            make_state=start.make,
            summary={},
        )


def make_loss(options: sft_config.Config, devices: setup.Devices) -> train_step.LossFn:
    """Return the loss of a microbatch: −log p of the assistant's tokens, and the router's term."""

    def loss_fn(
        model: nnx.Module, batch: batches.SFTBatch, key: jax.Array
    ) -> tuple[train_step.Terms, metrics.Metrics]:
        del key
        hidden, router = model(
            batch.text,
            batch.vision,
            implementation=devices.attention,
            remat=options.model.remat,
        )
        ids = batch.text.segments.ids
        targets, mask = sft.next_token_targets(batch.text.tokens, ids, batch.is_assistant)
        nll, told = sft.nll(
            hidden,
            model.head(),
            targets,
            mask,
            chunk_tokens=options.train.head_chunk_tokens * devices.row_parts(),
            implementation=options.train.head,
        )
        terms = {"nll": nll}
        if router is not None:
            # Of each microbatch by itself, as in the reference, weighted by its tokens.
            tokens = (ids > 0).sum(dtype=jnp.float32)
            terms["load_balance"] = reduce.Sum(
                total=moe.load_balance(router) * tokens, weight=tokens
            )
            told["router/load"] = _largest_load(router, tokens)
            told["loss/load_balance"] = metrics.Mean(
                total=jax.lax.stop_gradient(terms["load_balance"].total), weight=tokens
            )
        everywhere = jnp.ones((), bool)
        told["data/padding_fraction"] = metrics.Mean.of(ids == 0, everywhere)
        told["data/examples"] = metrics.Sum.of(ids.max(-1), everywhere)
        if batch.vision is not None:
            padding = batch.vision.segments.ids == 0
            told["data/vision_padding_fraction"] = metrics.Mean.of(padding, everywhere)
        return terms, told

    return loss_fn


def _largest_load(router: moe.RouterStats, tokens: jax.Array) -> metrics.Mean:
    """Return the tokens of each layer's busiest expert over an even share, 1 at best.

    No token is ever dropped, whatever its expert is chosen for.
    """
    choices = jax.lax.stop_gradient(router.choices)  # [L, E]
    even = jnp.maximum(choices.sum(-1) / choices.shape[-1], 1.0)
    return metrics.Mean(total=(choices.max(-1) / even).mean() * tokens, weight=tokens)


def weights(batch: batches.SFTBatch, *, has_router: bool) -> dict[str, jax.Array]:
    """Return the weight of each term over the whole batch, [M, B, T]."""
    ids = batch.text.segments.ids
    _, mask = jax.vmap(sft.next_token_targets)(batch.text.tokens, ids, batch.is_assistant)
    found = {"nll": mask.sum(dtype=jnp.float32)}
    if has_router:
        found["load_balance"] = (ids > 0).sum(dtype=jnp.float32)
    return found


def coefficients(train: sft_config.Train, model: setup.Model) -> dict[str, float]:
    """Return the factor of each term."""
    if model.config.text.moe is None:
        return {"nll": 1.0}
    return {"nll": 1.0, "load_balance": train.load_balance}
