"""No dead field: whatever the configuration of supervised fine-tuning can say changes something."""

import json
import re
import types

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from configs import sft as config_file
from prism_jax.data import build, encode, sources, validate
from prism_jax.losses import reduce
from prism_jax.setup import agreement
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.sft import config as sft_config
from prism_jax.stages.sft import feed as sft_feed
from prism_jax.stages.sft import main as sft_main
from prism_jax.stages.sft import step as sft_step
from prism_jax.training import train_state
from tests import data_files
from tests.stages import field_tables, rl_run, rl_toy, sft_run


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = sft_run.write(tmp_path_factory.mktemp("fields"))
    rows = json.loads((folder / "train.json").read_text())
    # One that is large enough to be scaled down.
    (folder / "1.png").write_bytes(data_files.png(1, size=(64, 64)))
    (folder / "few.json").write_text(json.dumps(rows[:5]))
    wrong = rows[0] | {"images": ["none.png"]}
    (folder / "broken.json").write_text(json.dumps([*rows, wrong]))
    (folder / "elsewhere").mkdir()
    for number in range(len(rows)):
        (folder / "elsewhere" / f"{number}.png").write_bytes(data_files.png(255 - number))
    source = sources.Source(kind="sft", path=str(folder / "train.json"))
    build.build(source, str(folder / "store"), validate.Rules())
    return field_tables.Seen(sft_config.Config, _configure, folder, refusing=_REFUSING)


def _configure(folder):
    config = config_file.get_config("tiny,new")
    config.update_from_flattened_dict(field_tables.at("model.sizes.", rl_run.SMALL))
    config.model.folder = str(folder / "tok")
    config.data.train = (str(folder / "train.json"),)
    config.mesh.num_devices = 1
    return config


def _open(given):
    """Return devices, model and feed of a run."""
    options = given.options
    devices = devices_lib.open_devices(options.mesh, options.model)
    files = setup_models.keep_files(options.model, given.workdir)
    model = setup_models.open_model(options.model, devices, files=files, is_discriminator=False)
    feed = sft_feed.Feed(options, devices, model, files=files, folder=given.workdir)
    return devices, model, feed


def packed(given):
    """Return the batches of a run of so many epochs."""
    _, _, feed = _open(given)
    num_steps = feed.num_steps(given.options.train.num_epochs or 1)
    batches = feed.train(num_steps, inputs=agreement.Inputs())
    return [next(batches) for _ in range(num_steps)]


def from_store(given):
    """Return the first batch of rows that lie in an object store."""
    with field_tables.a_store(given.folder):
        return next(_open(given)[2].train(1, inputs=agreement.Inputs()))


def held_out(given):
    """Return the loss on held-out rows, where it is the sum of the tokens over those learned."""
    _, _, feed = _open(given)

    def loss_fn(model, batch, key):
        del model, key
        total = batch.text.tokens.sum(dtype=jnp.float32)
        weight = batch.is_assistant.sum(dtype=jnp.float32)
        return {"nll": reduce.Sum(total=total, weight=weight)}, {}

    graphdef, params = train_state.split_model(rl_toy.Table(jnp.zeros((2, 2))))
    evaluate = feed.evaluation(graphdef, loss_fn)
    return None if evaluate is None else evaluate(types.SimpleNamespace(params=params), 1)


def program(given):
    """Return the program of the loss and its gradient, as it is traced."""
    devices, model, feed = _open(given)
    loss_fn = sft_step.make_loss(given.options, devices)

    def loss(params, batch):
        return loss_fn(nnx.merge(model.graphdef, params), batch, jax.random.key(0))[0]["nll"].total

    microbatch = jax.tree.map(lambda x: x[0], next(feed.train(1, inputs=agreement.Inputs())))
    traced = str(jax.make_jaxpr(jax.grad(loss))(model.params, microbatch))
    return re.sub(r"0x[0-9a-f]+", "", traced)


def effort(given):
    """Return the threads that work ahead, and how often a step made twice is encoded."""
    _, _, feed = _open(given)
    encoded = []
    real = encode.example

    def example(*args, **options):
        encoded.append(1)
        return real(*args, **options)

    def make_twice():
        for _ in range(2):
            next(feed.train(1, inputs=agreement.Inputs()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "example", example)
        return field_tables.threads_ahead(make_twice), len(encoded)


def factors(given):
    """Return the factors of the terms of a mixture of experts."""
    text = types.SimpleNamespace(moe=1)
    experts = types.SimpleNamespace(config=types.SimpleNamespace(text=text))
    return sft_step.coefficients(given.options.train, experts)


def asked_of_the_loop(given):
    return field_tables.asked_of_the_loop(sft_main.main, given)


def optimizer(given):
    return field_tables.moved(given.options.optim)


def devices(given):
    return field_tables.placed(devices_lib.open_devices(given.options.mesh, given.options.model))


def model(given):
    return field_tables.shapes(_open(given)[1])


_TWO_SOURCES = {"data.train": ("@train.json", "@few.json")}
_TABLE = {
    packed: field_tables.each(
        {
            "data.train": ("@few.json",),
            "data.image_root": "@elsewhere",
            "data.min_pixels": 64 * 64,
            "data.max_pixels": 32 * 32,
            "data.limit_image_pixels": 1,
            "data.row_tokens": 160,
            "data.row_examples": 1,
            "data.row_patches": (64,),
            "data.row_images": 1,
            "data.num_open_rows": 1,
            "train.step_rows": 1,
            "train.num_rows": 1,
        }
    )
    | field_tables.each({"data.weights": (1.0, 9.0)}, before=_TWO_SOURCES)
    | field_tables.each({"data.max_bad_rows": 1}, before={"data.train": ("@broken.json",)})
    | field_tables.each({"data.overlong": "filter"}, before={"data.row_tokens": 58})
    | field_tables.each(
        {"train.num_epochs": 2}, before={"train.num_steps": None, "train.num_epochs": 1}
    ),
    from_store: field_tables.each({"data.cache_dir": "@cache"}, before={"data.train": ("@store",)}),
    held_out: field_tables.each({"data.held_out": ("@few.json",)})
    | field_tables.each(
        {"evaluate.num_batches": 1},
        before={"data.held_out": ("@train.json",), "train.step_rows": 1},
    ),
    program: field_tables.each(
        {
            "model.remat": "full",
            "model.attention": "splash",
            "train.head": "recompute",
            "train.head_chunk_tokens": 16,
        }
    ),
    effort: field_tables.each({"data.num_threads": 3, "data.cache_mebibytes": 0}),
    factors: field_tables.each({"train.load_balance": 0.5}),
    asked_of_the_loop: field_tables.OF_THE_LOOP | field_tables.each({"evaluate.every_steps": 3}),
    optimizer: field_tables.optim("optim."),
    devices: field_tables.mesh()
    | field_tables.model_types()
    | field_tables.each(
        {"mesh.axes.sequence": 2},
        before={"mesh.num_devices": 2, "mesh.axes.data": 1, "mesh.axes.fsdp": -1},
    ),
    model: field_tables.sizes("model.sizes.") | field_tables.lora(),
}
_REFUSING = {
    "data.limit_image_pixels",
    "data.max_bad_rows",
    "data.overlong",
    "data.cache_dir",
    "model.attention",
}
_ELSEWHERE = {
    "tests/stages/sft/test_sft.py: where a model comes from": (
        "model.folder",
        "model.init",
        "model.step",
    ),
    "tests/stages/sft/test_sft.py: two processes": ("mesh.is_distributed",),
}


def test_every_field_is_in_the_table_or_named_with_the_test_that_sees_it():
    found, named = field_tables.seen(_TABLE), field_tables.named(_ELSEWHERE)
    assert not found & named
    assert field_tables.fields(sft_config.Config) - named == found


@pytest.mark.parametrize("probe", _TABLE)
def test_a_probe_sees_the_same_twice(seen, probe):
    assert seen.look(probe, {}) == seen.base(probe, {})


@pytest.mark.parametrize(("probe", "before", "after"), field_tables.cases(_TABLE))
def test_every_field_changes_what_is_seen(seen, probe, before, after):
    seen.assert_change_shows(probe, before, after)


def test_the_order_of_the_rows_is_of_the_seed(seen):
    seen.assert_change_shows(packed, {}, {"seed": 1})


def test_no_held_out_rows_are_opened_where_nothing_is_evaluated(seen):
    before = {"data.held_out": ("@few.json",)}
    seen.assert_change_shows(held_out, before, before | {"evaluate.every_steps": None})
