"""The configurations of warm-up, alignment and RLVR: each is whole and fits its real sizes."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import inputs, presets, qwen3_vl, sharding
from models.inputs import Example
from prism_jax import configuration, errors
from prism_jax import rows as packed_rows
from prism_jax.policy import batch as policy_batch
from prism_jax.policy import loss as policy_loss
from prism_jax.policy import update as policy_update
from prism_jax.rows import Largest
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import models as setup_models
from prism_jax.stages.align import config as align_config
from prism_jax.stages.rlvr import config as rlvr_config
from prism_jax.stages.warmup import config as warmup_config
from prism_jax.training import train_state

_STRUCTS = {
    "align": align_config.Config,
    "rlvr": rlvr_config.Config,
    "warmup": warmup_config.Config,
}
_SIZES = ("tiny", "tiny,new", "demo", "demo,new", "small", "small,new", "4b", "8b")
_ONE_GPU = ("2b_one_gpu", "4b_one_gpu")
_POLICIES = {"4b": presets.QWEN3_VL_4B, "8b": presets.QWEN3_VL_8B}


def _options(stage: str, arg: str, *, sequence: int = 1, rules=()):
    config = importlib.import_module(f"configs.{stage}").get_config(arg)
    config.mesh.axes.sequence, config.mesh.rules = sequence, rules
    config.model.folder = "model"
    if stage == "warmup":
        config.data.train = ("pairs.jsonl",)
    else:
        config.prompts.path = ("prompts.parquet",)
    if stage == "align":
        config.discriminator.folder = "discriminator"
    return configuration.parse(_STRUCTS[stage], config)


@pytest.mark.parametrize("arg", [*_SIZES, *_ONE_GPU])
@pytest.mark.parametrize("stage", _STRUCTS)
def test_every_configuration_is_whole(stage, arg):
    assert (_options(stage, arg).model.sizes is not None) == ("new" in arg)


@pytest.mark.parametrize("stage", _STRUCTS)
def test_rows_split_along_their_length_are_refused(stage):
    with pytest.raises(errors.InputError, match=r"config\.mesh\.axes\.sequence must be 1.*got 2"):
        _options(stage, "4b", sequence=2)
    with pytest.raises(errors.InputError, match=r"config\.mesh\.rules must not split act_length"):
        _options(stage, "4b", rules=(("act_length", "tensor"),))
    _options(stage, "4b", rules=(("act_length", None), ("vocab", "fsdp")))


@pytest.mark.parametrize("stage", ["align", "warmup"])
def test_text_only_freezes_the_tower_that_sees_nothing(stage):
    options = _options(stage, "4b,text_only")
    own = options.discriminator if stage == "align" else options
    sees_images = own.sees_images if stage == "align" else options.data.sees_images
    assert not sees_images
    assert own.optim.frozen == ("trunk/vision/.*",)


def test_the_published_numbers_are_in_the_real_sizes():
    for size in ("4b", "8b"):
        warm, align, rl = (_options(stage, size) for stage in ("warmup", "align", "rlvr"))
        optim = warm.optim
        assert (optim.schedule, optim.peak, optim.warmup_fraction) == ("cosine", 1e-5, 0.1)
        assert (optim.weight_decay, optim.clip_norm, warm.pairs.router) == (0.01, 1.0, 0.01)
        assert (warm.train.num_epochs, warm.data.max_tokens) == (1, 8192)
        # 4 pairs of segments x 4 accumulations x 8 devices, two pairs of segments a pair.
        assert 2 * warm.train.num_pairs == 4 * 4 * 8
        for one in (align, rl):
            assert (one.optim.schedule, one.optim.peak) == ("constant", 1e-6)
            assert (one.optim.weight_decay, one.optim.clip_norm) == (0.01, 1.0)
            assert (one.rollout.temperature, one.rollout.top_p, one.rollout.top_k) == (
                1,
                None,
                None,
            )
            assert one.algorithm.aggregation == "token-mean"
            assert one.prompts.max_prompt_tokens == 2048
        weights = align.advantage
        assert (weights.caption_weight, weights.cot_weight, weights.format_penalty) == (
            0.5,
            0.5,
            1.5,
        )
        own = align.discriminator
        assert (own.score_clip, own.regulariser, own.optim.peak) == (10.0, 1e-3, 1e-6)
        drawn = align.rollout
        assert (drawn.num_prompts, drawn.num_responses, drawn.max_response_tokens) == (4, 16, 6144)
        drawn = rl.rollout
        assert (drawn.num_prompts, drawn.num_responses, drawn.max_response_tokens) == (32, 16, 8192)
        assert (rl.train.num_steps, align.train.num_steps) == (1500, 500)
        assert (rl.rewards.accuracy_weight, rl.rewards.format_weight) == (0.8, 0.2)


@pytest.mark.parametrize("size", ["4b", "8b"])
def test_the_longest_published_responses_fit_the_rows(size):
    for stage in ("align", "rlvr"):
        options = _options(stage, size)
        drawn = options.rollout
        shape = packed_rows.row_shape(
            Largest(
                num_units=drawn.num_prompts * drawn.num_responses,
                unit_sequences=1,
                unit_tokens=options.prompts.max_prompt_tokens + drawn.max_response_tokens,
                continued_tokens=drawn.max_response_tokens,
                prompt_patches=4 * 1900,
                prompt_frames=1,
            ),
            row_tokens=options.rows.row_tokens,
            row_sequences=options.rows.row_sequences,
            microbatch_rows=8,
            patch_multiple=128,
            shared_units=None,
            place="config.rows",
        )
        assert shape.num_rows == drawn.num_prompts * drawn.num_responses


def _devices() -> devices_lib.Devices:
    mesh = jax.sharding.Mesh([[[[jax.devices()[0]]]]], ("data", "fsdp", "tensor", "expert"))
    return devices_lib.Devices(
        mesh=mesh,
        rules=sharding.REPLICATED,
        dtype=jnp.bfloat16,
        param_dtype=jnp.float32,
        attention="xla",
        decode_attention="xla",
    )


def _state(model_config, options, *, is_discriminator: bool):
    devices = _devices()
    build = setup_models.builder(
        model_config, devices, is_discriminator=is_discriminator, lora=None
    )
    _, params = train_state.abstract_params(build, param_dtype=devices.param_dtype)
    optimizer = setup_models.make_optimizer(options, params, num_steps=1000)
    return train_state.abstract_state(params, optimizer)


@pytest.mark.parametrize("size", ["4b", "8b"])
def test_real_sizes_have_states_of_both_models(size):
    align, warm = _options("align", size), _options("warmup", size)
    policy = _state(_POLICIES[size], align.optim, is_discriminator=False)
    # Counted by transformers on its meta device, in millions.
    expected = {"4b": 4437.8, "8b": 8767.1}[size]
    assert qwen3_vl.num_parameters(policy.params) / 1e6 == pytest.approx(expected, abs=0.05)
    for optim in (align.discriminator.optim, warm.optim):
        judge = _state(presets.DISCRIMINATOR_2B_MOE4X, optim, is_discriminator=True)
        # 2127.5 million of the 2B, three more MLPs of 1057.0, the routers and the score head.
        millions = qwen3_vl.num_parameters(judge.params) / 1e6
        assert millions == pytest.approx(2127.53 + 3 * 1056.96 + 0.23, abs=0.1)
        assert judge.params["score"]["kernel"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("stage", "arg"),
    [
        *(("align", arg) for arg in ("4b", "8b", "4b,official")),
        *(("rlvr", arg) for arg in ("4b", "8b", "4b,dapo", "4b,gspo", "8b,dapo,official")),
    ],
)
def test_the_policys_gradient_at_real_sizes_has_the_shapes_of_its_parameters(stage, arg):
    options = _options(stage, arg)
    config, devices = _POLICIES[arg[:2]], _devices()
    prompt = Example(tokens=np.arange(9), token_types=np.zeros(9, np.int32), grids=(), pixels=())
    # One row of the configured size, with one response: rows are added, never changed.
    shape = packed_rows.row_shape(
        Largest(
            num_units=1,
            unit_sequences=1,
            unit_tokens=options.prompts.max_prompt_tokens + options.rollout.max_response_tokens,
            continued_tokens=options.rollout.max_response_tokens,
            prompt_patches=4 * 1900,
            prompt_frames=1,
        ),
        row_tokens=options.rows.row_tokens,
        row_sequences=options.rows.row_sequences,
        microbatch_rows=1,
        patch_multiple=128,
        shared_units=None,
        place="config.rows",
    )
    batch = policy_batch.on_policy_batch(
        [prompt],
        [packed_rows.Continuation(prompt=0, tokens=np.arange(5))],
        [np.zeros(5, np.float32)],
        np.ones(1, np.float32),
        shape,
        config,
    )
    microbatch = jax.tree.map(lambda x: x[0], batch)
    algorithm = options.algorithm.loss() if stage == "align" else options.algorithm
    settings = policy_update.settings(options.train, options.rollout, options.model, devices)
    build = setup_models.builder(config, devices, is_discriminator=False, lora=None)
    graphdef, params = train_state.abstract_params(build, param_dtype=devices.param_dtype)

    def loss(params, microbatch):
        model = nnx.merge(graphdef, params)
        terms, told = policy_loss.loss(model, microbatch, algorithm, settings, None)
        return sum(term.total for term in terms.values()), told

    with jax.set_mesh(devices.mesh):
        gradients, _ = jax.eval_shape(jax.grad(loss, has_aux=True), params, microbatch)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (gradients, params)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("stage", ["evaluate", "pairs", "curate"])
@pytest.mark.parametrize("size", ["4b", "8b"])
def test_the_policy_that_is_asked_decodes_a_batch_of_the_real_size(stage, size):
    config = importlib.import_module(f"configs.{stage}").get_config(size)
    options = config.difficulty if stage == "curate" else config
    sizes, devices = _POLICIES[size], _devices()
    build = setup_models.builder(sizes, devices, is_discriminator=False, lora=None)
    dtype = jnp.dtype(options.policy.dtype)
    graphdef, params = train_state.abstract_params(build, param_dtype=dtype)
    length = options.prompts.max_prompt_tokens + options.max_tokens
    rows = options.batch_responses
    prompt = Example(tokens=np.arange(9), token_types=np.zeros(9, np.int32), grids=(), pixels=())
    text = inputs.pack_text(
        [[prompt]] * rows,
        config=sizes,
        row_tokens=options.prompts.max_prompt_tokens,
        max_segments=2,
        num_vision_rows=rows,
    )

    def decode(params, tokens, cache):
        model = nnx.merge(graphdef, params)
        hidden, cache = model.decode_step(tokens, cache, implementation="xla")
        return model.logits(hidden), cache

    def start(params, text):
        model = nnx.merge(graphdef, params)
        return model.prefill(text, None, implementation="xla", cache_length=length)

    with jax.set_mesh(devices.mesh):
        _, cache = jax.eval_shape(start, params, text)
        tokens = jax.ShapeDtypeStruct((rows,), jnp.int32)
        logits, after = jax.eval_shape(decode, params, tokens, cache)
    assert (logits.shape, logits.dtype) == ((rows, sizes.text.vocab_size), jnp.float32)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, cache)


def test_a_size_or_option_that_is_none_is_refused():
    for stage in _STRUCTS:
        for arg in ("huge", "4b,new", "tiny,oops"):
            with pytest.raises(ValueError, match=r"must be|no option|options are"):
                importlib.import_module(f"configs.{stage}").get_config(arg)
