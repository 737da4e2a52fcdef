"""Write a run's model for transformers: `python -m prism_jax export --workdir=RUN --to=DIR`.

Reads the newest complete step of a finished or running stage, verifies its checksums, and writes a
Hugging Face folder with the tokenizer and processor files of the run's initial model. The score
head of a discriminator becomes `v_head.1.weight`. The folder appears when it is complete.

`--eval_template` makes vLLM and lmms-eval see the prompt and the pictures of training, see
docs/benchmarks.md and docs/serve_and_evaluate.md.
"""

import argparse
import contextlib
import pathlib
import sys
import tempfile
from collections.abc import Sequence

import jax.numpy as jnp

from models import sharding
from models.hf import checkpoint as hf_checkpoint
from models.hf import names as hf_names
from models.hf import writer as hf_writer
from prism_jax import errors
from prism_jax.checkpoints import best_step, checkpoint, lora_files, model_files, pretrained
from prism_jax.commands import eval_template
from prism_jax.data import prompts

_DTYPES = {"as_is": None, "bfloat16": jnp.bfloat16, "float32": jnp.float32}


def parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    options = argparse.ArgumentParser(
        prog="python -m prism_jax export", description="Write a run's model for transformers."
    )
    add = options.add_argument
    add("--workdir", required=True, help="folder of the run")
    add("--to", required=True, dest="target", type=pathlib.Path, help="new folder")
    add(
        "--item",
        choices=("policy", "discriminator"),
        help="for a run that trains both; default: the model that is trained, of both the policy",
    )
    add(
        "--step",
        type=best_step.argument,
        help="a step that the run still keeps, or best: that of best.json; default: the newest",
    )
    add(
        "--dtype",
        choices=tuple(_DTYPES),
        default="bfloat16",
        help="of the weights; as_is: the type in the checkpoint, usually float32",
    )
    add(
        "--layout",
        choices=hf_names.EXPERT_LAYOUTS,
        default="4.57",
        help="order of fused experts as this version of transformers writes it; both read 4.57's",
    )
    add(
        "--adapter",
        action="store_true",
        help="write the adapter of a LoRA run alone, as PEFT reads it, not the merged model",
    )
    add("--base", type=pathlib.Path, help="folder of the head of an untied discriminator")
    add(
        "--eval_template",
        nargs="?",
        const="",
        metavar="FILE",
        help="write files by which vLLM and lmms-eval use the system turn of training (or the text "
        "of FILE) and its bounds on pictures",
    )
    return options


def main(argv: Sequence[str]) -> None:
    """Export one model of one run."""
    args = parser().parse_args(argv)
    if not model_files.is_run(args.workdir):
        raise errors.InputError(f"--workdir: {args.workdir} holds no checkpoints of a run")
    problem = hf_writer.check_target(args.target)
    if problem is not None:
        raise errors.InputError(f"--to: {problem}")
    source = pretrained.Source.of(args.workdir, role=args.item, step=args.step)
    values, config = pretrained.config_of(source.files)
    if args.adapter:
        _save_adapter(args.target, source, values)
        return
    dtype = _DTYPES[args.dtype]
    _, params = pretrained.abstract(
        config,
        is_discriminator=source.is_discriminator,
        rules=sharding.REPLICATED,
        dtype=source.dtype,
        param_dtype=source.dtype,
    )
    with contextlib.ExitStack() as stack:
        files = args.base or source.files
        if args.eval_template is not None:
            files = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
            _write_eval_files(args, source, files)
        params = source.load(params, shardings=None, param_dtype=dtype)
        try:
            hf_checkpoint.save(
                args.target,
                params,
                _with_dtype(values, source.dtype if dtype is None else jnp.dtype(dtype).name),
                layout=args.layout,
                max_shard_bytes=hf_writer.SHARD_BYTES,
                copy_from=files,
            )
        except (ValueError, OSError) as error:
            raise errors.InputError(f"--to: {args.target} cannot be written: {error}") from error
    kind = "discriminator" if source.is_discriminator else "policy"
    print(f"{kind} of step {source.step} of {args.workdir}", file=sys.stderr)
    print(args.target)


def _write_eval_files(
    args: argparse.Namespace, source: pretrained.Source, target: pathlib.Path
) -> None:
    """Write the small files of the model as `--eval_template` asks for them."""
    if source.is_discriminator:
        raise errors.InputError("--eval_template is of a policy, got a discriminator")
    prompt = prompts.SYSTEM_PROMPT
    if args.eval_template:
        try:
            prompt = pathlib.Path(args.eval_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise errors.InputError(
                f"--eval_template={args.eval_template}: cannot be read: {error}"
            ) from error
        if not prompt.strip():
            raise errors.InputError(f"--eval_template={args.eval_template}: is empty")
    config = checkpoint.read_meta(args.workdir, step=source.step)["config"]
    pixels = eval_template.bounds(config)
    eval_template.write(args.base or source.files, target, prompt=prompt, pixels=pixels)
    named = ", ".join(f"{name} {value}" for name, value in pixels.items())
    print(f"pictures: {named or 'the bounds of the model'}", file=sys.stderr)


def _save_adapter(target: pathlib.Path, source: pretrained.Source, values: dict) -> None:
    """Write the adapter of a run for PEFT."""
    adapters = source.load_adapters()
    try:
        lora_files.save(target, adapters, hf_names.naming(values), base=str(source.files))
    except (ValueError, OSError) as error:
        raise errors.InputError(f"--to: {target} cannot be written: {error}") from error
    print(f"adapter of step {source.step} of {source.folder}", file=sys.stderr)
    print(target)


def _with_dtype(values: dict, dtype: str) -> dict:
    """Return `config.json` with `dtype` in every place that names the type of the weights."""
    return {
        key: dtype
        if key in ("dtype", "torch_dtype") and value is not None
        else _with_dtype(value, dtype)
        if isinstance(value, dict)
        else value
        for key, value in values.items()
    }
