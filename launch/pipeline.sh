#!/usr/bin/env bash
# The whole method at 4b or 8b: SFT, upcycling, pairs, warm-up, alignment, RLVR, evaluation, export,
# each a job of one of the launchers. What has finished is skipped, so interrupted, run it again.
#   bash launch/pipeline.sh --size 8b --root gs://bucket/run --base gs://bucket/Qwen3-VL-8B-Instruct \
#     --demonstrations gs://bucket/dataset_info.json#mmr1 --align-prompts gs://bucket/align.parquet \
#     --rl-prompts gs://bucket/rl.parquet --test-prompts gs://bucket/test.parquet \
#     -- pod.sh --name a --type v5p-64 --zone us-east5-a
# After --: local_pod.sh N, pod.sh, gke.sh or slurm.sh with its options.
# Options:
#   --demonstrations PATH   may be given again              --options STAGE=OPTION,...  e.g. rlvr=dapo
#   --args STEP=ARGUMENT    a further argument of a step, may be given again
#   --from STEP, --to STEP  only these steps                --dry-run  print every command
# Steps: sft upcycle pairs warmup align rlvr evaluate export; each has the folder ROOT/STEP.
# ROOT must be gs:// or a folder that this machine sees too.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

steps=(sft upcycle pairs warmup align rlvr evaluate export)
is_step() { [[ " ${steps[*]} " == *" $1 "* ]]; }

size="" root="" base="" align_prompts="" rl_prompts="" test_prompts="" dry_run=0
first=sft last=export demonstrations=()
declare -A extra=() stage_options=()
while [ $# -gt 0 ]; do
  option="$1" && shift
  case "$option" in
    --dry-run) dry_run=1 && continue ;;
    -h | --help) usage launch/pipeline.sh && exit 0 ;;
    --) break ;;
    --*=*) set -- "${option#*=}" "$@" && option="${option%%=*}" ;;
  esac
  [ $# -gt 0 ] || die "$option needs a value"
  case "$option" in
    --size) size="$1" ;;
    --root) root="${1%/}" ;;
    --base) base="$1" ;;
    --demonstrations) demonstrations+=("$1") ;;
    --align-prompts) align_prompts="$1" ;;
    --rl-prompts) rl_prompts="$1" ;;
    --test-prompts) test_prompts="$1" ;;
    --from) first="$1" ;;
    --to) last="$1" ;;
    --args | --options)
      if [[ "$1" != *=* ]] || ! is_step "${1%%=*}"; then
        die "$option $1: must be STEP=..., a step of ${steps[*]}"
      fi
      if [ "$option" = --args ]; then
        extra["${1%%=*}"]+="$(show "${1#*=}") "
      else
        stage_options["${1%%=*}"]=",${1#*=}"
      fi
      ;;
    *) die "pipeline.sh: unknown option $option; the launcher and its options follow --" ;;
  esac
  shift
done

case "$size" in tiny | demo | small | 4b | 8b) ;; *) die "--size=$size: must be tiny, demo, small, 4b or 8b" ;; esac
is_step "$first" || die "--from $first: must be one of ${steps[*]}"
is_step "$last" || die "--to $last: must be one of ${steps[*]}"
[[ "$first" = "$last" || " ${steps[*]} " == *" $first "*"$last "* ]] ||
  die "--to $last: comes before --from $first; the order is ${steps[*]}"
for pair in "--root $root" "--base $base" "--align-prompts $align_prompts" \
  "--rl-prompts $rl_prompts" "--test-prompts $test_prompts" "--demonstrations ${demonstrations[*]:-}"; do
  [ -n "${pair#* }" ] || die "${pair%% *} must be given"
done
launcher="${1:-}"
case "$launcher" in
  local_pod.sh | pod.sh | gke.sh | slurm.sh) shift ;;
  *) die "pipeline.sh: after -- must follow local_pod.sh, pod.sh, gke.sh or slurm.sh, got ${launcher:-nothing}" ;;
esac
refuse_secrets "$@"
launcher_options=("$@")

# stage NAME ARGUMENT...: set `arguments` to the command of a stage with a configuration.
stage() {
  local name="$1"
  shift
  arguments=("$name" "--config=configs/$name.py:$size${stage_options[$name]:-}" "--workdir=$root/$name" "$@")
}

# step NAME: set `arguments` to its command, `mark` to the file that it writes last, and `alone`.
step() {
  local data=()
  mark="$root/$1/finished.json" alone=0
  case "$1" in
    sft)
      for path in "${demonstrations[@]}"; do data+=("--config.data.train=$path"); done
      stage sft "--config.model.folder=$base" "${data[@]}"
      ;;
    upcycle)
      mark="$root/upcycle/config.json" alone=1
      arguments=(upcycle "--from=$base" "--to=$root/upcycle")
      ;;
    pairs)
      mark="$root/pairs/summary.json"
      stage pairs "--config.policy.folder=$root/sft" "--config.prompts.path=$align_prompts"
      ;;
    warmup)
      stage warmup "--config.model.folder=$root/upcycle" "--config.data.train=$root/pairs/pairs.jsonl"
      ;;
    align)
      stage align "--config.model.folder=$root/sft" "--config.discriminator.folder=$root/warmup" \
        "--config.prompts.path=$align_prompts"
      ;;
    rlvr) stage rlvr "--config.model.folder=$root/align" "--config.prompts.path=$rl_prompts" ;;
    evaluate)
      mark="$root/evaluate/summary.json"
      stage evaluate "--config.policy.folder=$root/rlvr" "--config.prompts.path=$test_prompts"
      ;;
    export)
      mark="$root/export/config.json" alone=1
      arguments=(export "--workdir=$root/rlvr" "--to=$root/export")
      ;;
  esac
  # Written by `show` above, so that every argument stays one.
  local more=()
  eval "more=(${extra[$1]:-})"
  arguments+=("${more[@]}")
}

exists() {
  case "$1" in
    gs://*) gcloud storage ls "$1" >/dev/null 2>&1 ;;
    *) [ -f "$1" ] ;;
  esac
}

is_on=0
for name in "${steps[@]}"; do
  if [ "$name" = "$first" ]; then is_on=1; fi
  [ "$is_on" = 1 ] || continue
  step "$name"
  refuse_secrets "${arguments[@]}"
  job=(bash "launch/$launcher")
  [ "$launcher" = local_pod.sh ] || job+=(run)
  job+=("${launcher_options[@]}")
  case "$launcher" in gke.sh | slurm.sh) job+=(--suffix "$name") ;; esac
  if [ "$alone" = 1 ]; then job+=(--single); fi
  job+=(-- "${arguments[@]}")
  if [ "$dry_run" = 1 ]; then
    show "${job[@]}"
  elif exists "$mark"; then
    say "$name: finished before"
  else
    say "$name: $(show "${job[@]}")"
    code=0
    "${job[@]}" || code=$?
    if [ "$code" -ne 0 ]; then
      say "error: $name ended with exit code $code; run the same command again to go on"
      exit "$code"
    fi
  fi
  if [ "$name" = "$last" ]; then break; fi
done
