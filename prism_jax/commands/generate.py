"""Ask a model about images: `python -m prism_jax generate --model=DIR --image=a.png --prompt=…`.

Runs on TPU, GPU or CPU from a Hugging Face folder or from one that `convert` wrote. The answer goes
to standard output, everything else to standard error.
"""

import argparse
import dataclasses
import math
import pathlib
import sys
import time
from collections.abc import Sequence

import jax

from models import inputs
from prism_jax import errors
from prism_jax.checkpoints import best_step, model_files
from prism_jax.commands import loaded
from prism_jax.data import chat, examples, images, processor
from prism_jax.rollout import engine
from prism_jax.rollout.sampling import Sampling


def parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    options = argparse.ArgumentParser(
        prog="python -m prism_jax generate", description="Ask a model about images."
    )
    add = options.add_argument
    add("--model", required=True, type=pathlib.Path, help="checkpoint folder")
    add(
        "--step",
        type=best_step.argument,
        help="of a run's folder: a number, or best: that of best.json; default: the newest",
    )
    add("--prompt", required=True, help="the question, behind the images in one user turn")
    add("--image", action="append", default=[], type=pathlib.Path, help="may be given many times")
    add("--limit_image_pixels", type=int, default=images.LIMIT_PIXELS, help="of one image")
    add("--system", help="a system turn; none without")
    add("--max_new_tokens", type=int, default=256)
    add("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    add("--top_p", type=float)
    add("--top_k", type=int)
    add("--seed", type=int, default=0, help="of the sampling")
    add(
        "--dtype", choices=loaded.DTYPES, default="auto", help="of the computation; auto: as stored"
    )
    add("--tensor", type=int, default=1, help="devices over which each weight is split")
    add("--attention", choices=loaded.ATTENTIONS, default="auto")
    return options


def main(argv: Sequence[str]) -> None:
    """Print the answer of a model to one question."""
    args = parser().parse_args(argv)
    _check(args)
    sampling = _sampling(args)
    files = model_files.of(args.model)
    # This project's message about a wrong folder, before the tokenizer's.
    place = loaded.Place.of(
        args.model,
        role="policy",
        dtype=args.dtype,
        tensor=args.tensor,
        attention=args.attention,
    )
    words = processor.Processor.from_folder(files)
    example = _example(args, words)
    policy = loaded.Policy.load(args.model, place, _say, step=args.step)
    begun = time.perf_counter()
    _say(f"the prompt has {len(example.tokens)} tokens, {len(args.image)} images")
    shapes = engine.Shapes(prompt_tokens=128, prompt_patches=256, prompt_images=4)
    sampler = policy.engine(shapes, chunk_tokens=64, num_slots=None, say=_say)
    rollout = sampler.generate(
        policy.params,
        [example],
        dataclasses.replace(sampling, end_token_ids=words.ids.ends),
        jax.random.key(args.seed),
        num_responses=1,
    )
    if not rollout.is_finite():
        raise errors.InputError(f"{args.model}: the logits of this model are not finite")
    length = int(rollout.lengths[0])
    seconds = time.perf_counter() - begun
    how = "ended by itself" if rollout.ended[0] else f"cut at --max_new_tokens={length}"
    _say(f"{length} tokens in {seconds:.1f} s, compilation included; {how}")
    sys.stdout.write(words.decode(rollout.tokens[0, :length]) + "\n")


def _example(args: argparse.Namespace, words: processor.Processor) -> inputs.Example:
    """Return the prompt: a system turn, where there is one, then the images and the question."""
    pictures = [
        images.open_image(path, limit_pixels=args.limit_image_pixels) for path in args.image
    ]
    messages = [chat.turn("system", args.system)] if args.system is not None else []
    messages.append(chat.turn("user", args.prompt, num_images=len(pictures)))
    encoded = words.encode(messages, images=pictures, add_generation_prompt=True)
    return examples.from_encoded(encoded, words)


def _check(args: argparse.Namespace) -> None:
    """Refuse numbers out of range before anything is loaded."""
    for name, value, least, most in (
        ("seed", args.seed, 0, 2**32 - 1),
        ("max_new_tokens", args.max_new_tokens, 1, 2**20),
        ("tensor", args.tensor, 1, 2**16),
        ("limit_image_pixels", args.limit_image_pixels, 1, images.LARGEST_LIMIT_PIXELS),
    ):
        if not least <= value <= most:
            raise errors.InputError(f"--{name} must be between {least} and {most}, got {value}")
    if not math.isfinite(args.temperature):
        raise errors.InputError(f"--temperature must be a number, got {args.temperature}")
    for name, text in (("prompt", args.prompt), ("system", args.system)):
        if text is not None and not text.isprintable() and _has_surrogates(text):
            raise errors.InputError(f"--{name} must be UTF-8")


def _sampling(args: argparse.Namespace) -> Sampling:
    """Return the sampling settings, without the end tokens, which the tokenizer knows."""
    try:
        return Sampling(
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            max_tokens=args.max_new_tokens,
            end_token_ids=(),
        )
    except ValueError as error:
        raise errors.InputError(str(error)) from error


def _has_surrogates(text: str) -> bool:
    """Return whether an argument holds bytes that are not UTF-8, which Python escapes."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
