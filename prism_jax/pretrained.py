"""Models from checkpoint folders: a Hugging Face folder, or one that `convert` wrote."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from models import config as config_lib
from models import discriminator, hf, hf_files, hf_names, hf_reader, moe, qwen3_vl, sharding
from prism_jax import checkpoint, checkpoint_meta, errors, tree_paths
from prism_jax import mesh as mesh_lib

FLAX_PARAMS = "params"  # where a converted folder keeps its arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Hold a model's parts: what it is, how it is run, and its parameters."""

    config: config_lib.Qwen3VLConfig
    graphdef: nnx.GraphDef
    params: nnx.State
    dtype: DTypeLike  # of activations and matmuls


def moe_implementation(config: config_lib.Qwen3VLConfig) -> moe.Implementation | None:
    """Return how experts are computed: all of them where they are few, sorted where many."""
    if config.text.moe is None:
        return None
    return "dense" if config.text.moe.num_experts <= 8 else "ragged"


def config_of(folder: str | pathlib.Path) -> tuple[dict[str, Any], config_lib.Qwen3VLConfig]:
    """Read `config.json`, as it is and as our sizes; InputError for what is not implemented."""
    try:
        values = hf.read_config(folder)
        return values, config_lib.from_hf(values)
    except ValueError as error:
        raise errors.InputError(f"{folder}: {error}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Say in which form a folder holds parameters."""

    folder: pathlib.Path
    is_flax: bool  # written by `convert --direction=hf_to_flax`, not by transformers
    is_discriminator: bool
    layout: hf_names.ExpertLayout  # order of fused experts in the Hugging Face folder
    dtype: str  # of the token embeddings

    @classmethod
    def of(cls, folder: str | pathlib.Path) -> "Source":
        """Look into a checkpoint folder; InputError when it is not safe and whole."""
        folder = pathlib.Path(folder)
        if (folder / FLAX_PARAMS).is_dir():
            meta = checkpoint.read_meta(str(folder / FLAX_PARAMS), step=None)
            return cls(folder=folder, is_flax=True, **meta["config"])
        try:
            return cls(folder=folder, is_flax=False, **_describe(folder))
        except (ValueError, OSError) as error:
            raise errors.InputError(f"{folder}: {error}") from error

    def load(
        self, params: nnx.State, *, shardings: nnx.State | None, param_dtype: DTypeLike | None
    ) -> nnx.State:
        """Return the parameters, each directly in its shards.

        Args:
          params: abstract parameters of the model.
          param_dtype: None keeps each parameter's type as it is stored.
        """
        try:
            if not self.is_flax:
                return hf.load(self.folder, params, shardings=shardings, dtype=param_dtype)
            workdir = str(self.folder / FLAX_PARAMS)
            meta = checkpoint.read_meta(workdir, step=None)
            wanted = _with_types(params, shardings, meta, param_dtype)
            return checkpoint.load_params(
                workdir, wanted, item=checkpoint_meta.PARAMS_ITEM, step=None
            )[0]
        except (ValueError, OSError) as error:
            raise errors.InputError(f"{self.folder}: {error}") from error


def _describe(folder: pathlib.Path) -> dict[str, Any]:
    """Tell from names, shapes and types what a Hugging Face folder holds."""
    values = hf.read_config(folder)
    text = config_lib.from_hf(values).text
    with hf_reader.open_folder(folder, check_manifest=False) as reader:
        tensors = reader.tensors
    embeddings = [name for name in tensors if name.endswith("embed_tokens.weight")]
    if len(embeddings) != 1:
        raise ValueError(f"one embed_tokens.weight is needed, found {embeddings}")
    experts = {}
    if text.moe is not None:
        into = (text.num_layers, text.moe.num_experts, text.hidden_size, text.moe.intermediate_size)
        out_of = (*into[:2], *into[:1:-1])
        experts = {"text.layers.moe.gate": into, "text.layers.moe.up": into}
        experts["text.layers.moe.down"] = out_of
    stored = {name: tensor.shape for name, tensor in tensors.items()}
    return {
        "is_discriminator": hf_names.SCORE in tensors or (folder / "value_head.pt").exists(),
        "layout": hf_names.expert_layout(experts, stored, hf_names.naming(values)),
        "dtype": str(hf_files.DTYPES[tensors[embeddings[0]].dtype]),
    }


def _with_types(
    params: nnx.State, shardings: nnx.State | None, meta: dict, param_dtype: DTypeLike | None
) -> nnx.State:
    """Return abstract parameters with the types they are stored in, or `param_dtype`."""
    leaves = meta["leaves"][checkpoint_meta.PARAMS_ITEM]
    places = {} if shardings is None else tree_paths.variables(shardings)
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def one(path: tuple, param: nnx.Variable) -> nnx.Variable:
        name = tree_paths.path_name(path)
        stored = leaves.get(name, {"dtype": param.dtype.name})["dtype"]
        sharding = places[name].get_value() if name in places else default
        dtype = jnp.dtype(stored if param_dtype is None else param_dtype)
        return param.replace(jax.ShapeDtypeStruct(param.shape, dtype, sharding=sharding))

    return nnx.from_flat_state([(path, one(path, p)) for path, p in nnx.to_flat_state(params)])


def abstract(
    config: config_lib.Qwen3VLConfig,
    *,
    is_discriminator: bool,
    rules: sharding.Rules,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
) -> tuple[nnx.GraphDef, nnx.State]:
    """Return the graph definition and the abstract parameters of a model of these sizes."""
    shared = {
        "moe_implementation": moe_implementation(config),
        "rules": rules,
        "dtype": dtype,
        "param_dtype": param_dtype,
    }
    if is_discriminator:
        return qwen3_vl.abstract(
            lambda: discriminator.Discriminator(config, rngs=nnx.Rngs(0), **shared)
        )
    return qwen3_vl.abstract(
        lambda: qwen3_vl.Qwen3VL(config, has_head=True, rngs=nnx.Rngs(0), **shared)
    )


def load(
    folder: str | pathlib.Path,
    *,
    mesh: Mesh | None,
    rules: sharding.Rules,
    dtype: DTypeLike | None,
    param_dtype: DTypeLike | None,
) -> Pretrained:
    """Load a policy from a Hugging Face folder, each parameter directly in its shards.

    Args:
      mesh: None for JAX's default device.
      dtype: of activations and matmuls; None takes the type of the stored embeddings.
      param_dtype: of the parameters; None keeps each as it is stored.

    Raises:
      InputError: for a folder that is not safe and whole, or does not fit its `config.json`.
    """
    folder = pathlib.Path(folder)
    _, config = config_of(folder)
    source = Source.of(folder)
    if source.is_discriminator:
        raise errors.InputError(f"{folder} is a discriminator, a policy is needed")
    stored = jnp.dtype(source.dtype)
    graphdef, params = abstract(
        config,
        is_discriminator=False,
        rules=rules,
        dtype=stored if dtype is None else dtype,
        param_dtype=stored if param_dtype is None else param_dtype,
    )
    shardings = None if mesh is None else mesh_lib.param_shardings(params, mesh, rules)
    params = source.load(params, shardings=shardings, param_dtype=param_dtype)
    return Pretrained(
        config=config,
        graphdef=graphdef,
        params=jax.block_until_ready(params),
        dtype=stored if dtype is None else jnp.dtype(dtype),
    )
