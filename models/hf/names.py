"""Two-way table between parameters and the tensors of a Hugging Face checkpoint.

Only this file knows the names. A parameter has a path such as `text.layers.attn.q.kernel`; a tensor
is one entry of a safetensors file. Three things differ between them:

  stacking    the L layers of a parameter are L tensors, `…layers.0.…` to `…layers.{L-1}.…`
  order       kernels are [in, out] here and [out, in] there
  parts       vision q, k, v are one tensor there, and so are the gate and up of the experts

Fused experts lie on disk in one of two orders (E experts, D embed, F mlp):

  layout   experts.gate_up_proj   experts.down_proj   written by
  4.57     [E, D, 2F]             [E, F, D]           transformers 4.57, the hub's checkpoints
  5        [E, 2F, D]             [E, D, F]           transformers 5.x save_pretrained

Source: transformers models/qwen3_vl{,_moe}/modeling_*.py at 4.57.0 and 5.23.0, and
conversion_mapping.py "qwen3_vl_moe" (5.23.0), which reads both; the score head is PRISM's
moe/value_head.py:329-333 (`v_head.1.weight`).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from models import config as config_lib

ExpertLayout = Literal["4.57", "5"]
EXPERT_LAYOUTS: tuple[ExpertLayout, ...] = ("4.57", "5")

HEAD = "lm_head.weight"
SCORE = "v_head.1.weight"

# Module path -> name of the tensors without `.weight` or `.bias`; `{}` stands for the layer and
# `{text}` for the decoder's prefix.
_MODULES = {
    "vision.patch_embed": "model.visual.patch_embed.proj",
    "vision.pos_embed": "model.visual.pos_embed",
    "vision.blocks.norm1": "model.visual.blocks.{}.norm1",
    "vision.blocks.norm2": "model.visual.blocks.{}.norm2",
    "vision.blocks.attn.q": "model.visual.blocks.{}.attn.qkv",
    "vision.blocks.attn.k": "model.visual.blocks.{}.attn.qkv",
    "vision.blocks.attn.v": "model.visual.blocks.{}.attn.qkv",
    "vision.blocks.attn.o": "model.visual.blocks.{}.attn.proj",
    "vision.blocks.mlp.fc1": "model.visual.blocks.{}.mlp.linear_fc1",
    "vision.blocks.mlp.fc2": "model.visual.blocks.{}.mlp.linear_fc2",
    "vision.merger.norm": "model.visual.merger.norm",
    "vision.merger.fc1": "model.visual.merger.linear_fc1",
    "vision.merger.fc2": "model.visual.merger.linear_fc2",
    "vision.deepstack_mergers.norm": "model.visual.deepstack_merger_list.{}.norm",
    "vision.deepstack_mergers.fc1": "model.visual.deepstack_merger_list.{}.linear_fc1",
    "vision.deepstack_mergers.fc2": "model.visual.deepstack_merger_list.{}.linear_fc2",
    "text.embed": "{text}embed_tokens",
    "text.layers.input_norm": "{text}layers.{}.input_layernorm",
    "text.layers.post_norm": "{text}layers.{}.post_attention_layernorm",
    "text.layers.attn.q": "{text}layers.{}.self_attn.q_proj",
    "text.layers.attn.k": "{text}layers.{}.self_attn.k_proj",
    "text.layers.attn.v": "{text}layers.{}.self_attn.v_proj",
    "text.layers.attn.o": "{text}layers.{}.self_attn.o_proj",
    "text.layers.attn.q_norm": "{text}layers.{}.self_attn.q_norm",
    "text.layers.attn.k_norm": "{text}layers.{}.self_attn.k_norm",
    "text.layers.mlp.gate": "{text}layers.{}.mlp.gate_proj",
    "text.layers.mlp.up": "{text}layers.{}.mlp.up_proj",
    "text.layers.mlp.down": "{text}layers.{}.mlp.down_proj",
    "text.layers.moe.router": "{text}layers.{}.mlp.gate",
    "text.norm": "{text}norm",
    "text.head": "lm_head",
    "score": "v_head.1",
}
_PARTS = {
    "vision.blocks.attn.q": (0, 3),
    "vision.blocks.attn.k": (1, 3),
    "vision.blocks.attn.v": (2, 3),
    "text.layers.moe.gate": (0, 2),
    "text.layers.moe.up": (1, 2),
}
_EXPERTS = {
    "text.layers.moe.gate": "{text}layers.{}.mlp.experts.gate_up_proj",
    "text.layers.moe.up": "{text}layers.{}.mlp.experts.gate_up_proj",
    "text.layers.moe.down": "{text}layers.{}.mlp.experts.down_proj",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Naming:
    """The values of a `config.json` that names depend on."""

    text_prefix: str  # of the decoder's tensors
    patch_shape: tuple[int, int, int, int] | None  # channels, frames, pixels, pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """The location of one parameter in a checkpoint; of a stacked one, that of each layer.

    The tensor's bytes, seen with the shape `view`, are cut along `axis` into `parts` equal parts;
    the parameter is part number `part` with its axes put in `order`.
    """

    template: str
    num_layers: int | None  # None: not stacked
    disk_shape: tuple[int, ...]
    view: tuple[int, ...]
    order: tuple[int, ...]  # axis k of the parameter is axis order[k] of the view
    axis: int
    part: int
    parts: int

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of this part of the view."""
        size = self.view[self.axis] // self.parts
        return (*self.view[: self.axis], size, *self.view[self.axis + 1 :])

    @property
    def offset(self) -> int:
        """The start of this part on `axis` of the view."""
        return self.part * (self.view[self.axis] // self.parts)

    @property
    def names(self) -> list[str]:
        """Names of the tensors, one per layer."""
        if self.num_layers is None:
            return [self.template]
        return [self.template.format(layer) for layer in range(self.num_layers)]


def naming(config_json: Mapping[str, Any]) -> Naming:
    """Read from a `config.json` the values that names depend on."""
    config = config_lib.from_hf(config_json)
    text_only = config_json["model_type"] == "qwen3"
    vision = config.vision
    return Naming(
        text_prefix="model." if text_only else "model.language_model.",
        patch_shape=None
        if vision is None
        else (
            vision.in_channels,
            vision.temporal_patch_size,
            vision.patch_size,
            vision.patch_size,
        ),
    )


def module_name(path: str, names: Naming) -> str:
    """Return the name of a module, with `{}` for the layer of a stacked one.

    Raises ValueError for a module that is none by itself in a Hugging Face model.
    """
    if path not in _MODULES or path in _PARTS:
        raise ValueError(f"{path!r} is no module of a Hugging Face model")
    return _MODULES[path].replace("{text}", names.text_prefix)


def is_expert(path: str) -> bool:
    """Return whether the parameter lies in one of the two orders of fused experts."""
    return path.removeprefix("trunk.") in _EXPERTS


def weight(path: str, shape: tuple[int, ...], names: Naming, layout: ExpertLayout) -> Weight:
    """Return the location of the parameter `path` of this shape in a checkpoint.

    A discriminator's trunk has the names of the model itself. Raises ValueError for a parameter
    that no Hugging Face checkpoint holds, and for an unknown layout.
    """
    if layout not in EXPERT_LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(EXPERT_LAYOUTS)}, got {layout!r}")
    path = path.removeprefix("trunk.")
    if path in _EXPERTS:
        module, leaf, base = path, "", _EXPERTS[path]
    else:
        module, _, leaf = path.rpartition(".")
        if module not in _MODULES or leaf not in ("kernel", "scale", "embedding", "bias"):
            raise ValueError(f"the parameter {path!r} has no name in a Hugging Face checkpoint")
        base = _MODULES[module] + (".bias" if leaf == "bias" else ".weight")
    template = base.replace("{text}", names.text_prefix)
    num_layers = shape[0] if "{}" in template else None
    each = shape if num_layers is None else shape[1:]

    if path in _EXPERTS:
        # gate and up share the axis of F; the axes after E are swapped in layout 5.
        order, axis = ((0, 1, 2), 2) if layout == "4.57" else ((0, 2, 1), 1)
    elif leaf == "kernel":
        order, axis = (1, 0), 0
    else:
        order, axis = tuple(range(len(each))), 0
    part, parts = _PARTS.get(module, (0, 1))
    view = [0] * len(each)
    for ours, theirs in enumerate(order):
        view[theirs] = each[ours]
    view[axis] *= parts
    disk_shape = tuple(view)
    if module == "vision.patch_embed" and leaf == "kernel":
        if names.patch_shape is None or math.prod(names.patch_shape) != view[1]:
            raise ValueError(
                f"vision.patch_embed.kernel takes {view[1]} numbers a patch, config.json says "
                f"{names.patch_shape}"
            )
        disk_shape = (view[0], *names.patch_shape)
    return Weight(
        template=template,
        num_layers=num_layers,
        disk_shape=disk_shape,
        view=tuple(view),
        order=order,
        axis=axis,
        part=part,
        parts=parts,
    )


def dense_sources(name: str) -> tuple[str, ...]:
    """Return the dense model's tensors from which this tensor of a mixture is upcycled.

    The router has none; each other tensor outside the experts is a copy of the dense model's.
    """
    if name.endswith(".mlp.experts.gate_up_proj"):
        layer = name.removesuffix("experts.gate_up_proj")
        return (f"{layer}gate_proj.weight", f"{layer}up_proj.weight")
    if name.endswith(".mlp.experts.down_proj"):
        return (f"{name.removesuffix('experts.down_proj')}down_proj.weight",)
    return () if name.endswith(".mlp.gate.weight") else (name,)


def expert_layout(
    experts: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]], names: Naming
) -> ExpertLayout:
    """Infer the layout of the fused experts from their shapes on disk.

    A single shape can fit both layouts (D = 2F, or D = F); gate_up and down together cannot.

    Args:
        experts: shapes of the expert parameters by path.
        stored: shapes of the tensors on disk by name; missing tensors are ignored.

    Raises ValueError when no single layout fits all of them.
    """
    wrong: dict[ExpertLayout, list[str]] = {}
    for layout in EXPERT_LAYOUTS:
        table = [weight(path, shape, names, layout) for path, shape in experts.items()]
        wrong[layout] = sorted(
            {
                f"{name}: {list(stored[name])} instead of {list(entry.disk_shape)}"
                for entry in table
                for name in entry.names
                if name in stored and stored[name] != entry.disk_shape
            }
        )
    fits = [layout for layout in EXPERT_LAYOUTS if not wrong[layout]]
    if len(fits) == 1 or not any(wrong.values()):
        # Without any expert tensor both fit; the caller then reports all of them as missing.
        return fits[0]
    misfits = "; ".join(
        f"layout {layout} does not fit {len(wrong[layout])}, first {wrong[layout][0]}"
        for layout in EXPERT_LAYOUTS
    )
    raise ValueError(f"the shapes of the fused experts fit no single layout: {misfits}")
