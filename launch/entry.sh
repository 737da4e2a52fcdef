#!/usr/bin/env bash
# Start one process of a job; the launchers call it on every worker.
#   bash launch/entry.sh [--generation v5p] [--single] [--python PATH] -- sft --config=...
# It becomes the program, so that signals reach it. --single: one process alone, on the CPU, for
# commands that rewrite a checkpoint. Secrets come from the worker's own ~/.prism_env, if it exists:
# lines NAME=VALUE, readable by its owner alone.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

generation="" single=0 python=""
while [ $# -gt 0 ]; do
  case "$1" in
    --generation) generation="${2:?--generation needs a value}" && shift 2 ;;
    --single) single=1 && shift ;;
    --python) python="${2:?--python needs a value}" && shift 2 ;;
    --) shift && break ;;
    -h | --help) usage launch/entry.sh && exit 0 ;;
    *) die "entry.sh: unknown option $1" ;;
  esac
done
[ $# -gt 0 ] || die "entry.sh: a command of prism_jax must follow --"
refuse_tpu_flags

secrets="$HOME/.prism_env"
if [ -f "$secrets" ]; then
  if [ -n "$(find "$secrets" -perm /077)" ]; then
    die "$secrets: others can read it; chmod 600 $secrets"
  fi
  set -a
  # shellcheck source=/dev/null
  source "$secrets"
  set +a
fi

[ -n "$python" ] || { [ -x .venv/bin/python ] && python=.venv/bin/python; } || python=python3
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
if [ "$single" = 1 ]; then
  # Without this a TPU host would wait for the other hosts of its slice.
  export JAX_PLATFORMS=cpu
  unset PRISM_COORDINATOR PRISM_NUM_PROCESSES PRISM_PROCESS_ID
elif [ -n "$generation" ]; then
  flags="$(bash launch/libtpu_flags.sh "$generation" | tr '\n' ' ')"
  # What the user sets comes last, and so wins.
  export LIBTPU_INIT_ARGS="$flags${LIBTPU_INIT_ARGS:-}"
  say "LIBTPU_INIT_ARGS=$LIBTPU_INIT_ARGS"
fi
exec "$python" -m prism_jax "$@"
