#!/usr/bin/env bash
# The whole method on the embedded corpus, on a fresh machine too: makes .venv, installs, runs the
# chain, writes runs/demo/summary.json and runs/demo/report.html. Interrupted, run it again.
#   bash launch/demo.sh [overrides of configs/pipeline.py]
# PYTHON names another interpreter (3.11 or later); PRISM_DEMO_BASE another base checkpoint;
# PRISM_DEMO_WORKDIR another folder than runs/demo.
set -euo pipefail
cd "$(dirname "$0")/.."
base="${PRISM_DEMO_BASE:-launch/demo_base}"
workdir="${PRISM_DEMO_WORKDIR:-runs/demo}"
if [ ! -f "$base/config.json" ]; then
  echo "error: there is no base checkpoint in $base: PRISM_DEMO_BASE must name a folder in the form" \
    "of Hugging Face" >&2
  exit 2
fi
# shellcheck source=launch/environment.sh
source launch/environment.sh
make_environment .

# Two cores and no network are enough.
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export TPU_SKIP_MDS_QUERY=1
# The four evaluations are one program, and so is a stage before and after it was interrupted.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$workdir/compiled}"
# XLA takes and returns the same large buffers every step: keep them instead of asking the kernel
# for fresh pages each time, which was 47 of 195 CPU seconds of SFT.
export MALLOC_TOP_PAD_=536870912 MALLOC_MMAP_THRESHOLD_=4294967296
export MALLOC_TRIM_THRESHOLD_=8589934592
exec .venv/bin/python -m prism_jax pipeline --config=configs/pipeline.py:demo \
  --workdir="$workdir" --config.base.folder="$base" "$@"
