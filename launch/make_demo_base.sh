#!/usr/bin/env bash
# Train the base checkpoint of the demo: a Qwen3-VL of 2.5 million parameters that reads the digits
# of `numerals` and answers without tags. Writes runs/demo_base/, and the model to launch/demo_base.
#   bash launch/make_demo_base.sh [overrides of configs/sft.py]
# PYTHON names another interpreter (3.11 or later).
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh
make_environment .

export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
work=runs/demo_base
[ -f "$work/tokenizer/tokenizer.json" ] ||
  .venv/bin/python -m prism_jax data tokenizer --level=tiny --out="$work/tokenizer"
data=()
for seed in 0 1 2 3; do
  JAX_PLATFORMS=cpu .venv/bin/python -m prism_jax data numerals --level=tiny --seed="$seed" \
    --out="$work/corpus$seed" --rows=base=10000 --rows=public=0 --rows=teacher=0 --rows=align=0 \
    --rows=rl_train=0 --rows=rl_test=0 &
  data+=("--config.data.train=$work/corpus$seed/sft/dataset_info.json#numerals_base")
done
for job in $(jobs -p); do wait "$job"; done
.venv/bin/python -m prism_jax sft --config=configs/sft.py:demo,new --workdir="$work/sft" \
  --config.model.folder="$work/tokenizer" "${data[@]}" \
  --config.data.row_tokens=384 --config.data.row_examples=4 --config.data.row_images=4 \
  --config.data.row_patches="(64,)" \
  --config.train.step_rows=64 --config.train.num_rows=64 --config.train.num_steps=3000 \
  --config.optim.peak=5e-4 --config.evaluate.every_steps=None "$@"
rm -rf "$work/model"
.venv/bin/python -m prism_jax export --workdir="$work/sft" --to="$work/model" --dtype=bfloat16
cp "$work/model"/* launch/demo_base/
