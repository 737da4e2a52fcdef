"""The configurations of the repository: each is whole, and fits its model at real size."""

import importlib
import math

import jax
import pytest

from models import config as config_lib
from models import presets, qwen3_vl, sharding
from prism_jax import configuration
from prism_jax.setup import devices as devices_lib
from prism_jax.setup import fresh
from prism_jax.setup import models as setup_models
from prism_jax.stages.sft import config as sft_config
from prism_jax.training import train_state
from tests import make_tokenizer

PRESETS = {"4b": presets.QWEN3_VL_4B, "8b": presets.QWEN3_VL_8B}
ALL = [
    "tiny", "tiny,new", "demo", "demo,new", "small", "small,new",
    "4b", "4b,train_vision", "8b", "8b,train_vision", "2b_one_gpu", "4b_one_gpu",
    "8b_32k", "8b_32k,train_vision",
]  # fmt: skip


def _config(arg: str):
    config = importlib.import_module("configs.sft").get_config(arg)
    config.model.folder = "model"
    config.data.train = ("data.json",)
    return config


@pytest.mark.parametrize("arg", ALL)
def test_every_configuration_is_whole(arg):
    options = configuration.parse(sft_config.Config, _config(arg))
    assert (options.model.sizes is not None) == ("new" in arg)


def _devices(options) -> devices_lib.Devices:
    mesh = jax.sharding.Mesh([[[[jax.devices()[0]]]]], ("data", "fsdp", "tensor", "expert"))
    return devices_lib.Devices(
        mesh=mesh,
        rules=sharding.REPLICATED,
        dtype=options.model.dtype,
        param_dtype=jax.numpy.dtype(options.model.param_dtype),
        attention="xla",
        decode_attention="xla",
    )


def _state(options, model_config: config_lib.Qwen3VLConfig) -> train_state.TrainState:
    """Return the whole state as shapes."""
    build = setup_models.builder(model_config, _devices(options), is_discriminator=False, lora=None)
    _, params = train_state.abstract_params(build, param_dtype=jax.numpy.float32)
    optimizer = setup_models.make_optimizer(options.optim, params, num_steps=1000)
    return train_state.abstract_state(params, optimizer)


def _count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("size", ["4b", "8b"])
def test_real_sizes_have_moments_of_what_is_trained_alone(size):
    # Counted by transformers on its meta device, in millions.
    expected = {"4b": 4437.8, "8b": 8767.1}[size]
    for option, is_whole in (("", False), (",train_vision", True)):
        options = configuration.parse(sft_config.Config, _config(size + option))
        state = _state(options, PRESETS[size])
        assert qwen3_vl.num_parameters(state.params) / 1e6 == pytest.approx(expected, abs=0.05)
        trained = state.params if is_whole else state.params["text"]
        moments = [stack.mu for stack in state.opt_state.inner.values()]
        assert _count(moments) == _count(trained)


@pytest.mark.parametrize(
    ("size", "millions"), [("tiny", 0.5), ("demo", 2.4), ("small", 107.0)], ids=str
)
def test_new_models_have_the_sizes_that_their_configuration_tells(size, millions, tmp_path):
    make_tokenizer.write(tmp_path, min_pixels=32 * 32, max_pixels=64 * 64)
    options = configuration.parse(sft_config.Config, _config(f"{size},new"))
    with fresh.folder(tmp_path, options.model.sizes) as files:
        values = fresh.config_json(files, options.model.sizes)
    state = _state(options, config_lib.from_hf(values))
    assert qwen3_vl.num_parameters(state.params) / 1e6 == pytest.approx(millions, rel=0.05)


def test_the_published_numbers_are_in_the_real_sizes():
    for size in ("4b", "8b"):
        options = configuration.parse(sft_config.Config, _config(size))
        optim = options.optim
        assert (optim.schedule, optim.peak, optim.warmup_fraction) == ("cosine", 1e-5, 0.1)
        assert (options.data.row_tokens, options.train.num_epochs) == (8192, 1)


def test_a_size_or_option_that_is_none_is_refused():
    for arg in ("huge", "4b,new", "tiny,train_vision", "4b,oops"):
        with pytest.raises(ValueError, match=r"must be|no option|options are"):
            importlib.import_module("configs.sft").get_config(arg)
