"""Time GRPO steps of TRL's trainer on forced lengths; a process of its own.

    python -m benchmarks.grpo_trl --size=4b --responses=16 --lengths 180 97 … --rows=8

Prints a line of JSON a step: the first has responses of a few tokens and warms up. Needs torch,
torchvision, transformers, accelerate, datasets and trl, and no JAX. Random bfloat16 weights, all of
them trained by fused AdamW with moments in bfloat16; responses by `generate`, as TRL does for
models with pictures where it has no vLLM; gradient checkpointing and TRL's chunked head, its
defaults.
"""

import argparse
import json
import tempfile
import time
from typing import Any

import datasets
import numpy as np
import PIL.Image
import tokenizers
import torch
import transformers
import trl

from benchmarks import sizes

_WARM_TOKENS = 4
_TEMPLATE = """
{%- for message in messages -%}
  {%- if message.content is string -%}{{ message.content }}
  {%- else -%}
    {%- for part in message.content -%}
      {%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
      {%- else -%}{{ part.text }}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endfor -%}
"""


def _processor(size: str) -> transformers.Qwen3VLProcessor:
    """Return a processor whose tokenizer has a word for each row of the model's table."""
    ids = sizes.config_json(sizes.SIZES[size])
    num = ids["text_config"]["vocab_size"]
    special = {
        ids["image_token_id"]: "<|image_pad|>",
        ids["video_token_id"]: "<|video_pad|>",
        ids["vision_start_token_id"]: "<|vision_start|>",
        ids["vision_end_token_id"]: "<|vision_end|>",
        num - 1: "<|end|>",
        num - 2: "<|pad|>",
    }
    vocab = {special.get(number, f"w{number}"): number for number in range(num)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=[*special.values()][:4],
    )
    pixels = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    pixels |= {"size": {"shortest_edge": 64 * 64, "longest_edge": 4096 * 4096}}
    return transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**pixels),
        tokenizer=words,
        video_processor=transformers.Qwen3VLVideoProcessor(**pixels),
        chat_template=_TEMPLATE,
    )


def _prompts(size: str, count: int, side: int) -> datasets.Dataset:
    """Return prompts of 66 words and a picture of `side` patches, as `sizes.example` has them."""
    rng = np.random.default_rng(0)
    most = min(sizes.SIZES[size].text.vocab_size - 10, 150_000)
    rows = []
    for _ in range(count):
        picture = rng.integers(0, 256, (16 * side, 16 * side, 3), dtype=np.uint8)
        words = " ".join(f"w{number}" for number in rng.integers(1, most, 66))
        rows.append(
            {
                "prompt": [{"role": "user", "content": words}],
                "image": PIL.Image.fromarray(picture),
            }
        )
    return datasets.Dataset.from_list(rows)


class _Ends(transformers.LogitsProcessor):
    """End each row at its limit and no earlier."""

    def __init__(self, limits: list[int], prompt_tokens: int, end: int):
        self._limits, self._prompt, self._end = torch.tensor(limits), prompt_tokens, end

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        is_last = self._limits.to(scores.device) == input_ids.shape[1] - self._prompt + 1
        scores[:, self._end] = -torch.inf
        scores[is_last] = -torch.inf
        scores[is_last, self._end] = 0.0
        return scores


class _Clock(transformers.TrainerCallback):
    """Print a line a step, with its seconds and those of its `generate`."""

    def __init__(self) -> None:
        self.generate_seconds = self.tokens = self._begun = 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begun = _now()

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        seconds = _now() - self._begun
        peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
        print(
            json.dumps(
                {
                    "case": "step",
                    "step": state.global_step,
                    "seconds": seconds,
                    "generate_seconds": self.generate_seconds,
                    "tokens": self.tokens,
                    "peak_gigabytes": peak,
                }
            ),
            flush=True,
        )


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _force(model: torch.nn.Module, lengths: list[int], end: int, clock: _Clock) -> None:
    """Let `generate` end responses at these lengths, in the first call after a few tokens."""
    generate, plans = model.generate, [[_WARM_TOKENS] * len(lengths), lengths]

    def forced(**kwargs: Any) -> torch.Tensor:
        limits = plans.pop(0) if plans else lengths
        ends = _Ends(limits, kwargs["input_ids"].shape[1], end)
        begun = _now()
        tokens = generate(**kwargs, logits_processor=transformers.LogitsProcessorList([ends]))
        clock.generate_seconds, clock.tokens = _now() - begun, sum(limits)
        num_tokens = (tokens[:, kwargs["input_ids"].shape[1] :] == end).int().argmax(1) + 1
        if num_tokens.tolist() != limits:
            raise RuntimeError("a response did not reach its limit")
        return tokens

    model.generate = forced


def main() -> None:
    """Train the steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=sizes.SIZES, required=True)
    parser.add_argument("--responses", type=int, required=True, help="to a prompt")
    parser.add_argument("--lengths", type=int, nargs="+", required=True, help="of all responses")
    parser.add_argument("--side", type=int, default=32, help="of a picture, in patches of 16")
    parser.add_argument("--rows", type=int, required=True, help="of a forward and backward pass")
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    begun, on_gpu = time.perf_counter(), torch.cuda.is_available()
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**sizes.config_json(sizes.SIZES[args.size]))
    with torch.device("cuda" if on_gpu else "cpu"):
        model = transformers.AutoModelForImageTextToText.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    processor, clock = _processor(args.size), _Clock()
    _force(model, args.lengths, processor.tokenizer.eos_token_id, clock)
    count = len(args.lengths)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.GRPOTrainer(
            model=model,
            processing_class=processor,
            # Groups must vary, or nothing is learned.
            reward_funcs=lambda completions, **_: [float(n % 2) for n in range(len(completions))],
            train_dataset=_prompts(args.size, args.steps * count // args.responses, args.side),
            args=trl.GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=args.rows,
                gradient_accumulation_steps=count // args.rows,
                num_generations=args.responses,
                max_completion_length=max(args.lengths),
                max_steps=args.steps,
                learning_rate=1e-6,
                # The weights are bfloat16 themselves.
                bf16=False,
                optim="adamw_torch_fused" if on_gpu else "adamw_torch",
                use_cpu=not on_gpu,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            callbacks=[clock],
        )
        versions = {one.__name__: one.__version__ for one in (trl, transformers, torch)}
        opened = {"case": "open", "seconds": time.perf_counter() - begun, "versions": versions}
        print(json.dumps(opened), flush=True)
        trainer.train()


if __name__ == "__main__":
    main()
