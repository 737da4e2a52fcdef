#!/usr/bin/env bash
# What launch/pod.sh runs on each worker of a TPU VM; state and log lie in ~/.prism_jax/NAME.
#   bash launch/worker.sh install
#   bash launch/worker.sh start NAME GENERATION MAX_RESTARTS [--single] -- sft --config=...
#   bash launch/worker.sh follow|code|stop NAME
# A supervisor of its own starts the stage again after a preemption, a lost peer or a crash, whether
# or not anybody is connected; all workers do so, and meet again at the start.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

# Two starts in a row that missed workers: they will not come.
most_missed=2
wait_seconds="${PRISM_RESTART_SECONDS:-10}"

command="${1:-}"
case "$command" in
  install | start | supervise | follow | code | stop) shift ;;
  *) usage launch/worker.sh && exit 2 ;;
esac

if [ "$command" = install ]; then
  stamp="$(cksum <requirements.txt)"
  if [ -x .venv/bin/python ] && [ "$(cat .venv/prism_stamp 2>/dev/null)" = "$stamp" ]; then exit 0; fi
  if [ ! -x .venv/bin/python ]; then
    python=""
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
      if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python="$candidate"
        break
      fi
    done
    # TPU VMs with Ubuntu 22.04 have Python 3.10, and not every image has the module venv.
    if [ -z "$python" ] || ! "$python" -m venv .venv; then
      rm -rf .venv
      python3 -m pip install --quiet --user uv
      python3 -m uv venv --quiet --seed --python 3.12 .venv
    fi
  fi
  .venv/bin/python -m pip install --quiet -r requirements.txt 'gcsfs>=2025.1'
  .venv/bin/python -m pip install --quiet --no-deps -e .
  printf '%s' "$stamp" >.venv/prism_stamp
  exit 0
fi

name="${1:?a name must follow $command}" && shift
state="$HOME/.prism_jax/$name"
mkdir -p "$state"

# A supervisor writes its exit code last: with one, what has its number is a zombie or a stranger.
is_running() {
  [ ! -f "$state/exit" ] && [ -f "$state/pid" ] && kill -0 "$(cat "$state/pid")" 2>/dev/null
}

supervise() {
  local generation="$1" max_restarts="$2" restart=0 missed=0 status child
  shift 2
  local options=()
  [ "$generation" = none ] || options+=(--generation "$generation")
  if [ "${1:-}" = --single ]; then options+=(--single) && shift; fi
  trap 'kill -TERM "$child" 2>/dev/null || true' TERM INT HUP
  while :; do
    bash launch/entry.sh "${options[@]}" "$@" &
    child=$!
    [ ! -f "$state/stop" ] || kill -TERM "$child" 2>/dev/null || true
    # A signal ends `wait` early.
    while :; do
      status=0
      wait "$child" || status=$?
      kill -0 "$child" 2>/dev/null || break
    done
    if [ "$status" -eq 42 ]; then missed=$((missed + 1)); else missed=0; fi
    if [ -f "$state/stop" ] || ! restarts "$status"; then break; fi
    if [ "$restart" -ge "$max_restarts" ] || [ "$missed" -ge "$most_missed" ]; then break; fi
    restart=$((restart + 1))
    say "exit code $status: restart $restart of at most $max_restarts"
    sleep "$wait_seconds"
  done
  say "ended with exit code $status"
  printf '%s\n' "$status" >"$state/exit.partial"
  mv "$state/exit.partial" "$state/exit"
}

case "$command" in
  start)
    ! is_running || die "$name runs already on $(hostname)"
    rm -f "$state/exit" "$state/stop"
    setsid nohup bash launch/worker.sh supervise "$name" "$@" >>"$state/log" 2>&1 </dev/null &
    printf '%s\n' "$!" >"$state/pid"
    ;;
  supervise) supervise "$@" ;;
  follow)
    if is_running; then
      tail -n 50 -s 0.5 --pid="$(cat "$state/pid")" -F "$state/log" 2>/dev/null || true
    else
      tail -n 50 "$state/log"
    fi
    ;;
  code)
    if [ -f "$state/exit" ]; then
      status="$(cat "$state/exit")"
    elif is_running; then
      status=running
    elif [ ! -f "$state/pid" ]; then
      status=none
    else
      status=137 # the supervisor itself was killed, or the machine was started anew
    fi
    printf 'prism_worker %s %s\n' "$(hostname)" "$status"
    ;;
  stop)
    touch "$state/stop"
    if is_running; then kill -TERM "$(cat "$state/pid")"; fi
    ;;
esac
