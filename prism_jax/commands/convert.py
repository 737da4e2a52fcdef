"""Convert checkpoints: `python -m prism_jax convert --from=DIR --to=DIR --direction=hf_to_flax`.

A converted folder holds the arrays (Orbax, with checksums) under `params/` beside `config.json` and
the tokenizer and processor files, unchanged; every command reads it like a Hugging Face folder.
`flax_to_hf` writes a folder that `transformers` loads. Both directions keep each tensor's type and
bits, and both handle one tensor at a time.
"""

import argparse
import os
import pathlib
import shutil
from collections.abc import Sequence

from models import sharding
from models.hf import checkpoint as hf_checkpoint
from models.hf import files as hf_files
from models.hf import names as hf_names
from models.hf import writer as hf_writer
from prism_jax import errors, small_files, version
from prism_jax.checkpoints import checkpoint, pretrained
from prism_jax.checkpoints import meta as checkpoint_meta


def parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    options = argparse.ArgumentParser(
        prog="python -m prism_jax convert", description="Convert a checkpoint folder."
    )
    add = options.add_argument
    add("--from", required=True, dest="source", type=pathlib.Path, help="checkpoint folder")
    add("--to", required=True, dest="target", type=pathlib.Path, help="new folder")
    add("--direction", required=True, choices=("hf_to_flax", "flax_to_hf"))
    add(
        "--layout",
        choices=hf_names.EXPERT_LAYOUTS,
        help="order of fused experts, by the transformers version that writes it; default: as is",
    )
    add("--base", type=pathlib.Path, help="folder of the head of an untied discriminator")
    return options


def main(argv: Sequence[str]) -> None:
    """Convert one folder into another."""
    args = parser().parse_args(argv)
    is_back = args.direction == "flax_to_hf"
    values, config = pretrained.config_of(args.source)
    source = pretrained.Source.of(args.source)
    if source.is_flax != is_back:
        kind = "was written by convert" if source.is_flax else "is a Hugging Face folder"
        raise errors.InputError(f"--direction={args.direction}: {args.source} {kind}")
    problem = hf_writer.check_target(args.target)
    if problem is not None:
        raise errors.InputError(f"--to: {problem}")
    _, params = pretrained.abstract(
        config,
        is_discriminator=source.is_discriminator,
        rules=sharding.REPLICATED,
        dtype=source.dtype,
        param_dtype=source.dtype,
    )
    params = source.load(params, shardings=None, param_dtype=None)
    if is_back:
        try:
            hf_checkpoint.save(
                args.target,
                params,
                values,
                layout=args.layout or source.layout,
                max_shard_bytes=hf_writer.SHARD_BYTES,
                copy_from=args.base or args.source,
            )
        except ValueError as error:
            raise errors.InputError(f"--to: {error}") from error
    else:
        identity = checkpoint_meta.RunIdentity(
            project_version=version.VERSION,
            stage="convert",
            config={
                "is_discriminator": source.is_discriminator,
                "layout": args.layout or source.layout,
                "dtype": source.dtype,
            },
            model_config=values,
            may_differ=(),
        )
        try:
            write_flax(args.target, args.source, params, identity=identity)
        except ValueError as error:
            raise errors.InputError(f"--from: {error}") from error
    print(args.target)


def write_flax(
    target: pathlib.Path,
    files_from: pathlib.Path,
    params: object,
    *,
    identity: checkpoint_meta.RunIdentity,
) -> None:
    """Write a converted folder, which appears under its name when it is complete."""
    partial = target.absolute().parent / f".{target.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed job with this process number
    partial.mkdir()
    try:
        checkpoint.save_params(
            str(partial / pretrained.FLAX_PARAMS), params, identity=identity, step=0
        )
        for name in ("config.json", *hf_writer.COPIED):
            if (files_from / name).exists():
                shutil.copyfile(hf_files.inside(files_from, name), partial / name)
        small_files.rename_folder(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
