"""The whole method on the embedded corpus, from a small base model to a report.

    python -m prism_jax pipeline --config=configs/pipeline.py:small --workdir=runs/small \
        --config.base.tokenizer=TOKENIZER

Sizes: tiny (tests of the commands: an untrained policy gives no pairs, and the chain ends
there), demo (a model of 2 million parameters, 2 CPU cores), small (107 million, one GPU). Each step
takes its configuration of that size; `arguments` adds to them:

    --config.arguments.rlvr="('--config.train.num_steps=50',)"

Option:

  drift  the regime of docs/science.md: SFT nearly always learns the habits of the public
         demonstrations, and RLVR has a fifth of the responses

`base.folder` is a Hugging Face folder. With `base.tokenizer=DIR` instead, a new model is trained
first, on the corpus's right answers without tags, its `base` rows, and exported to `base_model`.
`trunk` names the model that is upcycled: the base model, as published, or the policy of SFT.
With `step="best"` rlvr begins with the best step of align, and the best steps of both are
evaluated; the arguments of both must have `--config.held_out.path=FILE` and `…every_steps=N`.
"""

from ml_collections import ConfigDict

from configs import common

# The parts of the corpus that are not those of its level.
_ROWS = {
    "tiny": ("public=16", "teacher=8", "align=8", "rl_train=8", "rl_test=8", "base=16"),
    "demo": ("public=2400", "teacher=1600", "align=800", "rl_train=1500", "rl_test=400"),
    "small": (
        *("base=64000", "public=6000", "teacher=2250", "align=1000"),
        *("rl_train=2000", "rl_test=500"),
    ),
}

# Fixed before the first run of the campaign; see docs/science.md.
_DRIFT_SLIPS = ("habit=0.95",)
_DRIFT_ROWS = {
    "demo": ("public=2400", "teacher=600", "align=800", "rl_train=800", "rl_test=400"),
    "small": (
        *("base=64000", "public=6000", "teacher=1500", "align=1000"),
        *("rl_train=2000", "rl_test=500"),
    ),
}
# SFT of demo sees each demonstration about once.
_DRIFT_STEPS = common.table("""
         sft_steps  rlvr_steps  num_prompts  num_responses
  tiny   2          2           2            2
  demo   190        16          8            6
  small  100        24          16           8
""")


def get_config(arg: str = "demo") -> ConfigDict:
    """Return the configuration of a size."""
    size, options = common.arguments(arg, ("drift",), _ROWS)
    config = ConfigDict()
    config.seed = 0
    config.size = size
    config.base = ConfigDict({"folder": "", "tokenizer": ""})
    config.trunk = "base"
    config.corpus = ConfigDict(
        {"level": "small" if size == "small" else "tiny", "rows": _ROWS[size], "slips": ()}
    )
    config.step = "newest"
    config.arguments = _arguments(size)
    config.title = ""
    if "drift" in options:
        _drift(config)
    return config


def _drift(config: ConfigDict) -> None:
    """Make SFT drift in both skills, and the exploration of RLVR short."""
    size, row = config.size, _DRIFT_STEPS[config.size]
    config.corpus.rows = _DRIFT_ROWS.get(size, config.corpus.rows)
    config.corpus.slips = _DRIFT_SLIPS
    config.arguments.sft = (*config.arguments.sft, f"--config.train.num_steps={row.sft_steps}")
    config.arguments.rlvr = (
        *config.arguments.rlvr,
        f"--config.train.num_steps={row.rlvr_steps}",
        f"--config.rollout.num_prompts={row.num_prompts}",
        f"--config.rollout.num_responses={row.num_responses}",
    )


def _arguments(size: str) -> ConfigDict:
    """Return the options that the steps' configurations of this size lack."""
    arguments = dict.fromkeys(
        ("base", "sft", "upcycle", "pairs", "warmup", "align", "rlvr", "evaluate"), ()
    )
    if size == "tiny":
        # Rows of `numerals`, under a tokenizer of a few hundred tokens, are longer than other
        # tests' rows.
        arguments["base"] = arguments["sft"] = ("--config.data.row_tokens=2048",)
        arguments["warmup"] = arguments["rlvr"] = ("--config.rows.row_tokens=1024",)
        arguments["align"] = (
            "--config.rows.row_tokens=1024",
            "--config.discriminator.rows.row_tokens=1024",
        )
    if size == "small":
        # The pictures of all rows stay in memory, 19 GB of it: drawn once, they are read eight
        # times. With a quarter of the rows the model learns them by heart instead of reading.
        arguments["base"] = (
            *("--config.train.num_steps=3000", "--config.optim.peak=5e-4"),
            *("--config.data.cache_mebibytes=24576", "--config.evaluate.every_steps=None"),
            "--config.checkpoint.save_every_steps=500",
        )
        arguments["pairs"] = ("--config.prompts.max_rows=600",)
    if size == "demo":
        arguments["pairs"] = ("--config.prompts.max_rows=384",)
    return ConfigDict(arguments)
