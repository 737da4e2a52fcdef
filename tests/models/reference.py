"""What Hugging Face's own classes compute on the cases; needs torch."""

import itertools

import numpy as np
import torch
import transformers
from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe

from models import inputs
from tests.models import cases


def model(config_json: dict) -> torch.nn.Module:
    """Build the model in float32 with the weights that its names decide."""
    config = transformers.AutoConfig.for_model(**config_json)
    config._attn_implementation = "eager"
    built = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, value in built.named_parameters():
            value.copy_(torch.from_numpy(cases.weight(name, tuple(value.shape))))
    return built.eval()


def arguments(rows: list[inputs.Example]) -> dict:
    """Return what `forward` takes: rows padded on the right, pictures one after the other."""
    longest = max(len(row.tokens) for row in rows)
    tokens = np.zeros((len(rows), longest), np.int64)
    mask = np.zeros_like(tokens)
    for number, row in enumerate(rows):
        tokens[number, : len(row.tokens)] = row.tokens
        mask[number, : len(row.tokens)] = 1
    kinds = np.zeros_like(tokens)
    for number, row in enumerate(rows):
        kinds[number, : len(row.tokens)] = row.token_types
    found = {
        "input_ids": tokens,
        "attention_mask": mask,
        "mm_token_type_ids": kinds,
    }
    for token, pixels_name, grid_name in (
        (cases.IMAGE, "pixel_values", "image_grid_thw"),
        (cases.VIDEO, "pixel_values_videos", "video_grid_thw"),
    ):
        grids, pixels = [], []
        for row in rows:
            shown = [t for t in row.tokens.tolist() if t in (cases.START, cases.IMAGE, cases.VIDEO)]
            first = [b for a, b in itertools.pairwise(shown) if a == cases.START]
            for grid, patches in zip(row.grids, row.pixels, strict=True):
                kind = first[0]
                del first[: grid[0] if kind == cases.VIDEO else 1]
                if kind == token:
                    grids.append(grid)
                    pixels.append(patches)
        if grids:
            found |= {pixels_name: np.concatenate(pixels), grid_name: np.array(grids)}
    return {name: torch.from_numpy(value) for name, value in found.items()}


def forward(built: torch.nn.Module, rows: list[inputs.Example], name: str) -> dict:
    """Return hidden states, logits, their gradients and the router's load-balance term."""
    given = arguments(rows)
    mask = given["attention_mask"].bool()
    is_moe = "moe" in built.config.model_type
    extra = {"output_router_logits": True} if is_moe else {}
    out = built(**given, output_hidden_states=True, **extra)
    hidden = out.hidden_states[-1]
    weights = torch.from_numpy(cases.cotangent(name, tuple(out.logits.shape)))
    loss = (out.logits * weights * mask[..., None]).sum()
    found = {"hidden": hidden, "logits": out.logits}
    if is_moe:
        text = built.config.text_config
        found["load_balance"] = modeling_qwen3_vl_moe.load_balancing_loss_func(
            out.router_logits, text.num_experts, text.num_experts_per_tok, given["attention_mask"]
        )
        loss = loss + 10 * found["load_balance"]
    built.zero_grad()
    loss.backward()
    found = {key: value.detach().numpy() for key, value in found.items()}
    found["gradients"] = {
        key: value.grad.numpy() if value.grad is not None else np.zeros(value.shape, np.float32)
        for key, value in built.named_parameters()
    }
    return found


def greedy(built: torch.nn.Module, row: inputs.Example, num_tokens: int) -> list[int]:
    """Return the tokens that greedy `generate` adds to one prompt."""
    with torch.no_grad():
        out = built.generate(
            **arguments([row]),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=VOCAB_END,
        )
    return out[0, len(row.tokens) :].tolist()


VOCAB_END = cases.VOCAB - 1
