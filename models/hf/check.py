"""Compare the tensors of a checkpoint with the parameters of a model, before any is loaded."""

from collections.abc import Mapping, Sequence

import numpy as np

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
    """Return where each parameter lies, by path.

    Args:
        wanted: shapes of the parameters by path.
        drop: prefixes of tensor names that are knowingly not used.

    Raises one ValueError that lists all that does not fit: missing, unused, of another shape, of
    another type.
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
    found = [name for name in shapes if name in stored]
    problems = {
        "missing": missing,
        "not used by the model": sorted(extra),
        "of another shape": [
            f"{name} {list(stored[name])} instead of {list(shapes[name])}"
            for name in found
            if stored[name] != shapes[name] and not (contradiction and name in expert_names)
        ],
        "of a type that is not loaded": [
            f"{name} {kinds[name]}" for name in found if kinds[name] not in hf_files.DTYPES
        ],
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
        raise ValueError(
            f"{reader.path} does not fit the model: {hf_files.listing(problems)}{hint}"
        )
    return entries


def _repeats_embedding(reader: hf_reader.Reader, names: hf_names.Naming) -> bool:
    """Say whether the head's bytes are the embedding's."""
    head = reader.tensors[hf_names.HEAD]
    embed = reader.tensors.get(f"{names.text_prefix}embed_tokens.weight")
    if embed is None or (head.shape, head.dtype) != (embed.shape, embed.dtype):
        return False
    blocks = (reader.blocks(tensor.name, _BLOCK_BYTES) for tensor in (head, embed))
    return all(np.array_equal(a, b) for a, b in zip(*blocks, strict=True))
