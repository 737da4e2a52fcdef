"""Models from checkpoint folders: from Hugging Face, `convert`, or a training run."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from models import config as config_lib
from models import discriminator, lora, moe, qwen3_vl, sharding
from models.hf import check as hf_check
from models.hf import checkpoint as hf_checkpoint
from models.hf import files as hf_files
from models.hf import names as hf_names
from models.hf import reader as hf_reader
from prism_jax import errors, tree_paths
from prism_jax import mesh as mesh_lib
from prism_jax.checkpoints import best_step, checkpoint, model_files
from prism_jax.checkpoints import files as checkpoint_files
from prism_jax.checkpoints import meta as checkpoint_meta

FLAX_PARAMS = "params"  # folder of the arrays in a converted folder

# The model of a run that trains two.
Role = Literal["policy", "discriminator"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A loaded model: its sizes, graph definition and parameters."""

    config: config_lib.Qwen3VLConfig
    graphdef: nnx.GraphDef
    params: nnx.State
    dtype: DTypeLike  # of activations and matmuls


def moe_implementation(config: config_lib.Qwen3VLConfig) -> moe.Implementation | None:
    """Return how experts are computed: all of them if they are few, sorted by expert if many."""
    if config.text.moe is None:
        return None
    return "dense" if config.text.moe.num_experts <= 8 else "ragged"


def config_of(folder: str | pathlib.Path) -> tuple[dict[str, Any], config_lib.Qwen3VLConfig]:
    """Return `config.json` as it is and as sizes; InputError for unimplemented settings."""
    try:
        values = hf_checkpoint.read_config(folder)
        return values, config_lib.from_hf(values)
    except (ValueError, OSError) as error:
        raise errors.InputError(f"{folder}: {error}") from error
    except (TypeError, AttributeError, ArithmeticError, LookupError) as error:
        # A value of the wrong type for its key, which fails at its first use.
        raise errors.InputError(
            f"{folder}: config.json holds a value of a wrong kind: {error}"
        ) from error


def check_policy(folder: str | pathlib.Path, config: config_lib.Qwen3VLConfig) -> None:
    """Raise InputError for a model that needs the kind of each sequence (see `models.kinds`)."""
    if config.text.moe is not None and config.text.moe.router == "segment":
        raise errors.InputError(
            f"{folder}: config.json says that experts are chosen by segment; such a model is a "
            "discriminator's trunk and no policy"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """The parameters in a checkpoint folder: where they lie, and in which form."""

    folder: epath.Path
    files: pathlib.Path  # folder of config.json, tokenizer and processor files
    arrays: epath.Path | None  # folder of Orbax checkpoints; None: safetensors
    item: str | None  # of the checkpoint
    step: int | None  # of the checkpoint
    is_discriminator: bool
    layout: hf_names.ExpertLayout  # order of fused experts in the Hugging Face folder
    dtype: str  # of the token embeddings

    @property
    def is_flax(self) -> bool:
        """Return whether this project wrote the arrays, not transformers."""
        return self.arrays is not None

    @classmethod
    def of(
        cls, folder: str | pathlib.Path, *, role: Role | None = None, step: int | str | None = None
    ) -> "Source":
        """Inspect a checkpoint folder.

        Args:
          role: the model to read; None takes the folder's only model, of two the policy.
          step: of a training run, "best" for that of `best.json`; None for the newest complete one.

        Raises:
          InputError: the folder is not safe and whole, or holds no such model or step.
        """
        folder = epath.Path(folder)
        if checkpoint_files.is_local(folder):  # Orbax reads absolute paths only
            folder = epath.Path(os.path.abspath(folder))
        if model_files.is_run(folder):
            source = cls._of_run(folder, role, best_step.number_of(folder, step))
        elif step is not None:
            raise errors.InputError(f"{folder} is not the workdir of a stage: no step {step}")
        elif (folder / FLAX_PARAMS).is_dir():
            arrays = folder / FLAX_PARAMS
            step, meta = _read_meta(arrays, None)
            if config_of(folder)[0] != meta["model_config"]:
                raise errors.InputError(
                    f"{folder}: config.json is not the one that its parameters were written with"
                )
            source = cls(
                folder=folder,
                files=pathlib.Path(folder),
                arrays=arrays,
                item=checkpoint_meta.PARAMS_ITEM,
                step=step,
                **meta["config"],
            )
        else:
            try:
                facts = _describe(pathlib.Path(folder))
            except (ValueError, OSError) as error:
                raise errors.InputError(f"{folder}: {error}") from error
            files = pathlib.Path(folder)
            source = cls(folder=folder, files=files, arrays=None, item=None, step=None, **facts)
        if role is not None and source.is_discriminator != (role == "discriminator"):
            kind = "discriminator" if source.is_discriminator else "policy"
            raise errors.InputError(f"{folder} holds a {kind}, a {role} is needed")
        return source

    @classmethod
    def _of_run(cls, folder: epath.Path, role: Role | None, step: int | None) -> "Source":
        step, meta = _read_meta(folder, step)
        leaves = meta["leaves"]
        item = f"{role or 'policy'}.{checkpoint_meta.PARAMS_ITEM}"
        if item not in leaves:
            item = checkpoint_meta.PARAMS_ITEM
        if item not in leaves:
            raise errors.InputError(
                f"{folder} holds {sorted(leaves)} at step {step}, no {role or 'policy'}"
            )
        is_discriminator = any(name.startswith("score/") for name in leaves[item])
        (dtype,) = (x["dtype"] for name, x in leaves[item].items() if "text/embed/" in name)
        files = model_files.of(folder, is_discriminator=is_discriminator)
        _refuse_layers(files, config_of(files)[1], leaves[item])
        return cls(
            folder=folder,
            files=files,
            arrays=folder,
            item=item,
            step=step,
            is_discriminator=is_discriminator,
            layout=hf_names.EXPERT_LAYOUTS[0],
            dtype=dtype,
        )

    def fingerprint(self) -> str:
        """Return 16 hex digits that change with the parameters.

        For arrays of this project they follow from the checksums, for safetensors from the names,
        sizes and times of the files.
        """
        if self.arrays is not None:
            leaves = checkpoint.read_meta(str(self.arrays), step=self.step)["leaves"][self.item]
            facts = json.dumps(leaves, sort_keys=True)
        else:
            stats = {path.name: path.stat() for path in self.files.glob("*.safetensors")}
            files = sorted((name, s.st_size, s.st_mtime_ns) for name, s in stats.items())
            facts = json.dumps(files)
        return hashlib.sha256(facts.encode()).hexdigest()[:16]

    def load(
        self, params: nnx.State, *, shardings: nnx.State | None, param_dtype: DTypeLike | None
    ) -> nnx.State:
        """Return the parameters, each directly in its shards, adapters of a run merged into them.

        Args:
          params: abstract parameters of the model.
          param_dtype: None keeps each parameter's stored type.
        """
        try:
            if self.arrays is None:
                return hf_checkpoint.load(
                    self.folder, params, shardings=shardings, dtype=param_dtype
                )
            workdir = str(self.arrays)
            stored = checkpoint.read_meta(workdir, step=self.step)["leaves"][self.item]
            wanted = _with_types(params, shardings, stored, param_dtype)
            wanted = _with_adapters(wanted, stored)
            loaded = checkpoint.load_params(workdir, wanted, item=self.item, step=self.step)[0]
            return lora.merge(loaded)
        except (ValueError, OSError, checkpoint_files.CheckpointError, LookupError) as error:
            raise errors.InputError(f"{self.folder}: {error}") from error

    def load_adapters(self) -> nnx.State:
        """Return the adapters of a run.

        Raises:
          InputError: the run has none.
        """
        leaves = {}
        if self.arrays is not None:
            meta = checkpoint.read_meta(str(self.arrays), step=self.step)
            leaves = meta["leaves"][self.item]
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        params = nnx.from_flat_state(
            [
                (tuple(name.split("/")), nnx.Param(jax.ShapeDtypeStruct(
                    tuple(x["shape"]), jnp.dtype(x["dtype"]), sharding=place
                )))
                for name, x in leaves.items()
            ]
        )  # fmt: skip
        if not any(lora.is_adapter(name.split("/")) for name in leaves):
            raise errors.InputError(f"{self.folder} holds no adapter: model.lora.rank was None")
        # A checkpoint is read and checked whole.
        loaded = checkpoint.load_params(str(self.arrays), params, item=self.item, step=self.step)
        return lora.split(loaded[0])[1]


def _refuse_layers(
    files: pathlib.Path, config: config_lib.Qwen3VLConfig, leaves: dict[str, Any]
) -> None:
    """Refuse a run's `config.json` with a wrong number of layers, before a model is built."""
    wanted = {"text/layers/": config.text.num_layers}
    if config.vision is not None:
        wanted["vision/blocks/"] = config.vision.num_layers
    for part, num_layers in wanted.items():
        saved = {x["shape"][0] for name, x in leaves.items() if part in name}
        if saved != {num_layers}:
            raise errors.InputError(
                f"{files / 'config.json'} says {num_layers} layers in {part}, the checkpoint has "
                f"{', '.join(map(str, sorted(saved))) or 'none'}"
            )


def _read_meta(arrays: epath.Path, step: int | None) -> tuple[int, dict[str, Any]]:
    """Return the newest complete step (or `step`) and the metadata of its checkpoint."""
    try:
        with checkpoint_files.opened(arrays) as manager:
            step = checkpoint_files.choose(checkpoint_files.steps(manager), step, arrays)
            return step, checkpoint_files.read_meta(manager, arrays, step)
    except (checkpoint_files.CheckpointError, OSError, LookupError, TypeError) as error:
        raise errors.InputError(f"{arrays} cannot be read: {error}") from error


def _describe(folder: pathlib.Path) -> dict[str, Any]:
    """Infer from names, shapes and types the kind of model in a Hugging Face folder."""
    values = hf_checkpoint.read_config(folder)
    config = config_lib.from_hf(values)
    text, names = config.text, hf_names.naming(values)
    with hf_reader.open_folder(folder, check_manifest=False) as reader:
        tensors = reader.tensors
        embeddings = [name for name in tensors if name.endswith("embed_tokens.weight")]
        if len(embeddings) != 1:
            raise ValueError(f"one embed_tokens.weight is needed, found {embeddings!s:.500}")
        kinds = {name: tensor.dtype for name, tensor in tensors.items()}
        wrong = set(hf_check.not_loaded(kinds)) & {f"{embeddings[0]} {kinds[embeddings[0]]}"}
        if wrong:
            hint = hf_check.type_hint(kinds.values())
            raise ValueError(f"of a type that is not loaded: {wrong.pop()}{hint}")
        hf_check.refuse_sizes(reader, config, names)
    experts = {}
    if text.moe is not None:
        into = (text.num_layers, text.moe.num_experts, text.hidden_size, text.moe.intermediate_size)
        out_of = (*into[:2], *into[:1:-1])
        experts = {"text.layers.moe.gate": into, "text.layers.moe.up": into}
        experts["text.layers.moe.down"] = out_of
    stored = {name: tensor.shape for name, tensor in tensors.items()}
    dtype = hf_files.DTYPES[kinds[embeddings[0]]]
    return {
        "is_discriminator": hf_names.SCORE in tensors or (folder / "value_head.pt").exists(),
        "layout": hf_names.expert_layout(experts, stored, names),
        "dtype": "float32" if dtype == jnp.float64 else str(dtype),
    }


def _with_types(
    params: nnx.State, shardings: nnx.State | None, leaves: dict, param_dtype: DTypeLike | None
) -> nnx.State:
    """Return abstract parameters with their stored types, or with `param_dtype`."""
    places = {} if shardings is None else tree_paths.variables(shardings)
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def with_type(path: tuple, param: nnx.Variable) -> nnx.Variable:
        name = tree_paths.path_name(path)
        stored = leaves.get(name, {"dtype": param.dtype.name})["dtype"]
        sharding = places[name].get_value() if name in places else default
        dtype = jnp.dtype(stored if param_dtype is None else param_dtype)
        return param.replace(jax.ShapeDtypeStruct(param.shape, dtype, sharding=sharding))

    return nnx.from_flat_state(
        [(path, with_type(path, p)) for path, p in nnx.to_flat_state(params)]
    )


def _with_adapters(params: nnx.State, leaves: dict) -> nnx.State:
    """Return the abstract parameters with the adapters that are stored beside them."""
    flat = dict(nnx.to_flat_state(params))
    for path, kernel in list(flat.items()):
        for name in lora.NAMES:
            stored = leaves.get("/".join((*path[:-1], name))) if path[-1] == "kernel" else None
            if stored is not None:
                place = kernel.sharding
                if isinstance(place, jax.sharding.NamedSharding):
                    place = jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec())
                dtype = jnp.dtype(stored["dtype"])
                leaf = jax.ShapeDtypeStruct(tuple(stored["shape"]), dtype, sharding=place)
                flat[*path[:-1], name] = nnx.Param(leaf)
    return nnx.from_flat_state(flat)


def builder(
    config: config_lib.Qwen3VLConfig,
    *,
    is_discriminator: bool,
    rules: sharding.Rules,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
) -> Callable[[nnx.Rngs], nnx.Module]:
    """Return the function that makes a policy or a discriminator of these sizes."""
    shared = {
        "moe_implementation": moe_implementation(config),
        "rules": rules,
        "dtype": dtype,
        "param_dtype": param_dtype,
    }
    if is_discriminator:
        return lambda rngs: discriminator.Discriminator(config, rngs=rngs, **shared)
    return lambda rngs: qwen3_vl.Qwen3VL(config, has_head=True, rngs=rngs, **shared)


def abstract(
    config: config_lib.Qwen3VLConfig,
    *,
    is_discriminator: bool,
    rules: sharding.Rules,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
) -> tuple[nnx.GraphDef, nnx.State]:
    """Return the graph definition and the abstract parameters of a model of these sizes."""
    build = builder(
        config,
        is_discriminator=is_discriminator,
        rules=rules,
        dtype=dtype,
        param_dtype=param_dtype,
    )
    return qwen3_vl.abstract(lambda: build(nnx.Rngs(0)))


def load(
    folder: str | pathlib.Path,
    *,
    mesh: Mesh | None,
    rules: sharding.Rules,
    dtype: DTypeLike | None,
    param_dtype: DTypeLike | None,
    step: int | str | None = None,
) -> Pretrained:
    """Load a policy from a folder of any form, each parameter directly in its shards.

    Args:
      mesh: None for JAX's default device.
      dtype: of activations and matmuls; None takes the type of the stored embeddings.
      param_dtype: of the parameters; None keeps each stored type.

    Raises:
      InputError: for a folder that is not safe and whole, or does not fit its `config.json`.
    """
    source = Source.of(folder, role="policy", step=step)
    _, config = config_of(source.files)
    check_policy(folder, config)
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
