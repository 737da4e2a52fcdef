#!/usr/bin/env bash
# The whole method with 107 million parameters on one GPU: base model, SFT, warm-up, alignment, RLVR,
# evaluation. Writes runs/small/summary.json and runs/small/report.html. Interrupted, run it again.
#   bash launch/small.sh [overrides of configs/pipeline.py]
# PRISM_PYTHON names an interpreter that has the requirements; without it .venv is made for CUDA.
# PRISM_SMALL_WORKDIR names another folder than runs/small.
set -euo pipefail
cd "$(dirname "$0")/.."
workdir="${PRISM_SMALL_WORKDIR:-runs/small}"
python="${PRISM_PYTHON:-}"
if [ -z "$python" ]; then
  # shellcheck source=launch/environment.sh
  source launch/environment.sh
  make_environment '.[cuda]'
  python=.venv/bin/python
fi

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false XLA_PYTHON_CLIENT_PREALLOCATE=false
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$workdir/compiled}"
# Matmuls by cuBLAS alone: a step as fast as after tuning, and half of its compilation time.
# Source: benchmarks/results/h100_train_small.json.
export XLA_FLAGS="${XLA_FLAGS:---xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0}"
[ -f "$workdir/tokenizer/tokenizer.json" ] ||
  "$python" -m prism_jax data tokenizer --level=small --out="$workdir/tokenizer"
exec "$python" -m prism_jax pipeline --config=configs/pipeline.py:small --workdir="$workdir" \
  --config.base.tokenizer="$workdir/tokenizer" "$@"
