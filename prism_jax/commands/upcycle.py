"""Make a mixture of experts from a dense model: `python -m prism_jax upcycle --from=DIR --to=DIR`.

Every expert is the dense MLP plus noise, and the router is new: this is the discriminator's trunk
in PRISM. Reads and writes Hugging Face folders, one tensor at a time.

`--router=segment` gives captions and cots separate experts, `--heads=2` separate score heads (see
`models.kinds`). Both are written into the new folder's `config.json` under `prism_discriminator`;
warm-up, alignment, export and convert read it there. transformers ignores that key: it loads such a
folder and routes every token to any expert.

Source: PRISM moe/create_vl_moe.py: 4 experts, 2 a token, noise 0.01 absolute, router 0.02.
"""

import argparse
import pathlib
from collections.abc import Sequence

from models import kinds, upcycle
from models.hf import names as hf_names
from models.hf import writer as hf_writer
from prism_jax import errors
from prism_jax.checkpoints import pretrained


def parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    options = argparse.ArgumentParser(
        prog="python -m prism_jax upcycle",
        description="Make a mixture of experts from a dense model.",
    )
    add = options.add_argument
    add("--from", required=True, dest="source", type=pathlib.Path, help="dense checkpoint folder")
    add("--to", required=True, dest="target", type=pathlib.Path, help="new folder")
    add("--num_experts", type=int, default=4)
    add("--num_experts_per_token", type=int, default=2)
    add("--noise_std", type=float, default=0.01)
    add(
        "--noise",
        choices=("absolute", "relative"),
        default="absolute",
        help="absolute: --noise_std in units of the weights; relative: of their standard deviation",
    )
    add("--router_std", type=float, default=0.02)
    add("--seed", type=int, default=0)
    add(
        "--router",
        choices=kinds.ROUTERS,
        default="token",
        help="segment: half of the experts for captions alone, half for cots",
    )
    add("--heads", type=int, choices=kinds.HEADS, default=1, help="2: one for captions, one cots")
    add(
        "--layout",
        choices=hf_names.EXPERT_LAYOUTS,
        default="4.57",
        help="order of fused experts as this version of transformers writes it; both read 4.57's",
    )
    return options


def main(argv: Sequence[str]) -> None:
    """Upcycle one folder into another."""
    args = parser().parse_args(argv)
    pretrained.config_of(args.source)
    try:
        upcycle.upcycle(
            args.source,
            args.target,
            upcycle.Options(
                num_experts=args.num_experts,
                num_experts_per_token=args.num_experts_per_token,
                noise_std=args.noise_std,
                noise=args.noise,
                router_std=args.router_std,
                seed=args.seed,
                router=args.router,
                heads=args.heads,
            ),
            layout=args.layout,
            max_shard_bytes=hf_writer.SHARD_BYTES,
        )
    except ValueError as error:
        raise errors.InputError(str(error)) from error
    print(args.target)
