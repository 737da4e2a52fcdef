"""Compare the tensors of a checkpoint with the parameters of a model before loading any."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from models import config as config_lib
from models.hf import files as hf_files
from models.hf import names as hf_names
from models.hf import reader as hf_reader

_BLOCK_BYTES = 32 << 20
_SCORE_HINT = (
    f". The score head is read only as {hf_names.SCORE} in the safetensors files: value_head.pt is "
    "a pickle, which runs code when it is read, and is not opened; save the discriminator with its "
    "head merged into the safetensors files"
)


def table(
    reader: hf_reader.Reader,
    wanted: Mapping[str, tuple[int, ...]],
    names: hf_names.Naming,
    drop: Sequence[str],
) -> dict[str, hf_names.Weight]:
    """Return the location of each parameter in the checkpoint, by path.

    Args:
        wanted: shapes of the parameters by path.
        drop: prefixes of tensor names that are left unused on purpose.

    Raises one ValueError that lists all tensors that do not fit: missing, unused, of another shape,
    of another type.
    """
    stored = {name: tensor.shape for name, tensor in reader.tensors.items()}
    kinds = {name: tensor.dtype for name, tensor in reader.tensors.items()}
    layout, contradiction = hf_names.EXPERT_LAYOUTS[0], []
    experts = {path: shape for path, shape in wanted.items() if hf_names.is_expert(path)}
    try:
        if experts:
            layout = hf_names.expert_layout(experts, stored, names)
    except ValueError as error:
        contradiction.append(str(error))
    entries = {p: hf_names.weight(p, shape, names, layout) for p, shape in wanted.items()}
    shapes = {name: e.disk_shape for e in entries.values() for name in e.names}
    expert_names = {name for path in experts for name in entries[path].names}
    extra = {n for n in stored.keys() - shapes.keys() if not n.startswith(tuple(drop))}
    head = []
    if hf_names.HEAD in extra:  # a discriminator, or tied
        extra.remove(hf_names.HEAD)
        is_discriminator = any(path.startswith("trunk.") for path in wanted)
        if not is_discriminator and not _repeats_embedding(reader, names):
            head.append(f"{hf_names.HEAD} differs from the embedding that the model uses as head")
    missing = sorted(shapes.keys() - stored.keys())
    present = [name for name in shapes if name in stored]
    problems = {
        "missing": missing,
        "not used by the model": sorted(extra),
        "of another shape": [
            f"{name} {list(stored[name])} instead of {list(shapes[name])}"
            for name in present
            if stored[name] != shapes[name] and not (contradiction and name in expert_names)
        ],
        "of a type that is not loaded": not_loaded({name: kinds[name] for name in present}),
        "of several types in one stack": sorted(
            {
                entry.template.format("*")
                for entry in entries.values()
                if len({kinds[name] for name in entry.names if name in kinds}) > 1
            }
        ),
        "head": head,
        "experts": contradiction,
    }
    if any(problems.values()):
        hint = _SCORE_HINT if hf_names.SCORE in missing else ""
        hint += type_hint(kinds[name] for name in present)
        if any(".lora_" in name or name.startswith("base_model.") for name in extra):
            hint += "; merge the adapter into its base model first"
        raise ValueError(
            f"{reader.path} does not fit the model: {hf_files.listing(problems)}{hint}"
        )
    return entries


def not_loaded(kinds: Mapping[str, str]) -> list[str]:
    """Return the tensors, with their types, that cannot become parameters.

    float64 is read, as float32, if all tensors have it; a single one among others is an error of
    the tool that wrote it.
    """
    is_wide = all(kind == "F64" for kind in kinds.values())
    return [
        f"{name} {kind}"
        for name, kind in kinds.items()
        if kind not in hf_files.DTYPES or (kind == "F64" and not is_wide)
    ]


def type_hint(kinds: Iterable[str]) -> str:
    """Return advice about types that are not loaded."""
    kinds = set(kinds)
    narrow = sorted(kinds - set(hf_files.DTYPES))
    if narrow:
        return (
            f". Weights of type {', '.join(narrow)} are not read: dequantize the model and save "
            "it in bfloat16 first"
        )
    if "F64" in kinds and len(kinds) > 1:
        return ". F64 is read only where all weights are of it: save the model in one type"
    return ""


def refuse_sizes(
    reader: hf_reader.Reader, config: config_lib.Qwen3VLConfig, names: hf_names.Naming
) -> None:
    """Raise ValueError when `config.json` has other sizes than the tensors."""
    stored = {name: tensor.shape for name, tensor in reader.tensors.items()}
    problems = size_problems(config, names, stored)
    if problems:
        raise ValueError(
            f"{reader.path}: config.json does not fit the weights: {'; '.join(problems)}"
        )


def size_problems(
    config: config_lib.Qwen3VLConfig,
    names: hf_names.Naming,
    stored: Mapping[str, tuple[int, ...]],
) -> list[str]:
    """List the sizes of a `config.json` that differ from those of the tensors.

    No model is built for this, so a wrong number of layers costs no memory and no time.
    """
    text, prefix = config.text, names.text_prefix
    layer = f"{prefix}layers.0."
    sizes = [
        ("text_config.vocab_size", text.vocab_size, f"{prefix}embed_tokens.weight", 0),
        ("text_config.hidden_size", text.hidden_size, f"{prefix}embed_tokens.weight", 1),
        ("text_config.head_dim", text.head_dim, f"{layer}self_attn.q_norm.weight", 0),
        ("text_config.intermediate_size", text.intermediate_size, f"{layer}mlp.up_proj.weight", 0),
    ]
    layers = [("text_config.num_hidden_layers", text.num_layers, f"{prefix}layers.")]
    if text.moe is not None:
        router = f"{layer}mlp.gate.weight"
        sizes.append(("text_config.num_experts", text.moe.num_experts, router, 0))
    if config.vision is not None:
        vision, tower = config.vision, "model.visual."
        layers.append(("vision_config.depth", vision.num_layers, f"{tower}blocks."))
        places = f"{tower}pos_embed.weight"
        count = vision.num_position_embeddings
        sizes += [
            ("vision_config.num_position_embeddings", count, places, 0),
            ("vision_config.hidden_size", vision.hidden_size, places, 1),
            (
                "vision_config.intermediate_size",
                vision.intermediate_size,
                f"{tower}blocks.0.mlp.linear_fc1.weight",
                0,
            ),
        ]
    problems = [
        f"{key} = {size}, {name} is {list(stored[name])}"
        for key, size, name, axis in sizes
        if name in stored and (len(stored[name]) <= axis or stored[name][axis] != size)
    ]
    for key, size, start in layers:
        numbers = {name[len(start) :].split(".")[0] for name in stored if name.startswith(start)}
        if len(numbers) != size:
            problems.append(f"{key} = {size}, there are weights of {len(numbers)} layers")
    return problems


def _repeats_embedding(reader: hf_reader.Reader, names: hf_names.Naming) -> bool:
    """Return whether the head's bytes equal the embedding's."""
    head = reader.tensors[hf_names.HEAD]
    embed = reader.tensors.get(f"{names.text_prefix}embed_tokens.weight")
    if embed is None or (head.shape, head.dtype) != (embed.shape, embed.dtype):
        return False
    blocks = (reader.blocks(tensor.name, _BLOCK_BYTES) for tensor in (head, embed))
    return all(np.array_equal(a, b) for a, b in zip(*blocks, strict=True))
