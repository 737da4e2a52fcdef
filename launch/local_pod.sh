#!/usr/bin/env bash
# Run a stage as several processes on this machine, as a pod would: over gloo on the CPU, over NCCL
# where there are NVIDIA GPUs, which the processes share out evenly.
#   bash launch/local_pod.sh 4 [options] -- sft --config=configs/sft.py:tiny,new --workdir=runs/sft ...
#   --devices K     pretended CPU devices a process (1)
#   --max-restarts R  starts again after a preemption or a lost process (0)
#   --single        one process alone, on the CPU, whatever N is
#   --dry-run       print the commands
# PRISM_PYTHON names the interpreter (.venv/bin/python). Each line of output begins with its process.
# A signal reaches every process as SIGTERM, so that it saves; a second one kills. The exit code is
# the worst of the processes'. When one fails, the others have PRISM_GRACE_SECONDS (120) to end.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

case "${1:-}" in
  -h | --help | "") usage launch/local_pod.sh && exit 0 ;;
esac
count="$1" && shift
check_number "local_pod.sh N" "$count"
devices=1 max_restarts=0 dry_run=0 single=0
while [ $# -gt 0 ]; do
  case "$1" in
    --devices) devices="${2:?--devices needs a value}" && check_number --devices "$2" && shift 2 ;;
    --max-restarts) max_restarts="${2:?--max-restarts needs a value}" && shift 2 ;;
    --single) single=1 && shift ;;
    --dry-run) dry_run=1 && shift ;;
    --) shift && break ;;
    *) die "local_pod.sh: unknown option $1; the stage and its arguments follow --" ;;
  esac
done
[[ "$max_restarts" =~ ^[0-9]+$ ]] || die "--max-restarts=$max_restarts: must be a whole number >= 0"
[ $# -gt 0 ] || die "local_pod.sh: a command of prism_jax must follow --"
refuse_secrets "$@"
refuse_tpu_flags
python="${PRISM_PYTHON:-.venv/bin/python}"
grace="${PRISM_GRACE_SECONDS:-120}"

gpus=0
if [[ "${JAX_PLATFORMS:-}" != cpu ]] && command -v nvidia-smi >/dev/null; then
  gpus="$(nvidia-smi -L | wc -l)"
fi
entry=(bash launch/entry.sh --python "$python")
if [ "$single" = 1 ]; then
  count=1 gpus=0
  entry+=(--single)
fi
if [ "$gpus" -gt 0 ] && [ $((gpus % count)) -ne 0 ]; then
  die "local_pod.sh $count: $gpus GPUs cannot be shared out evenly"
fi

# A process must not outlive this script, not even when it is killed.
guard=()
if command -v setpriv >/dev/null; then guard=(setpriv --pdeathsig KILL); fi

# process_command I PORT: set `command` to how process I is started.
process_command() {
  local variables=()
  if [ "$count" -gt 1 ]; then
    variables+=(PRISM_COORDINATOR="localhost:$2" PRISM_NUM_PROCESSES="$count" PRISM_PROCESS_ID="$1")
  fi
  if [ "$gpus" -gt 0 ]; then
    local share=$((gpus / count))
    variables+=(JAX_LOCAL_DEVICE_IDS="$(seq -s, $(($1 * share)) $(($1 * share + share - 1)))")
  else
    variables+=(JAX_PLATFORMS=cpu)
    variables+=(XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices")
  fi
  command=(env "${variables[@]}" "${guard[@]}" "${entry[@]}" -- "${arguments[@]}")
}

arguments=("$@")
if [ "$dry_run" = 1 ]; then
  for ((i = 0; i < count; i++)); do
    process_command "$i" 8476
    show "${command[@]}"
  done
  exit 0
fi

free_port() {
  "$python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])'
}

pids=() prefixers=() is_stopping=0
# The handler only notes and forwards; `wait` returns early and is called again.
# shellcheck disable=SC2317,SC2329
forward() {
  local signal=TERM
  if [ "$is_stopping" = 1 ]; then signal=KILL; fi
  is_stopping=1
  for pid in "${pids[@]}"; do kill -s "$signal" "$pid" 2>/dev/null || true; done
}
trap forward INT TERM HUP

# Start all processes once; set `code` to the worst exit code.
start_once() {
  local i port output codes=() killed=() alive failed_at='' status
  port="$(free_port)"
  pids=() prefixers=()
  for ((i = 0; i < count; i++)); do
    process_command "$i" "$port"
    # The prefixer must outlive Ctrl-C, to show what the process says when it ends.
    exec {output}> >(trap '' INT TERM HUP && exec sed -u "s/^/[$i] /")
    prefixers+=($!)
    "${command[@]}" >&"$output" 2>&1 {output}>&- &
    pids+=($!)
    exec {output}>&-
  done
  if [ "$is_stopping" = 1 ]; then forward; fi
  while :; do
    alive=0
    for ((i = 0; i < count; i++)); do
      [ -z "${codes[i]:-}" ] || continue
      if kill -0 "${pids[i]}" 2>/dev/null; then
        alive=$((alive + 1))
        continue
      fi
      status=0
      wait "${pids[i]}" 2>/dev/null || status=$?
      # It had not noticed yet that it lost a peer.
      [ -z "${killed[i]:-}" ] || status=134
      codes[i]=$status
      if [ "$status" -ne 0 ]; then
        say "process $i ended with exit code $status"
        [ -n "$failed_at" ] || failed_at=$SECONDS
      fi
    done
    [ "$alive" -gt 0 ] || break
    if [ -n "$failed_at" ] && [ $((SECONDS - failed_at)) -ge "$grace" ]; then
      say "killing $alive processes that did not end in $grace s"
      for ((i = 0; i < count; i++)); do
        [ -z "${codes[i]:-}" ] || continue
        killed[i]=1
        kill -s KILL "${pids[i]}" 2>/dev/null || true
      done
    fi
    # Ctrl-C ends this too; the loop must go on and wait for the processes.
    sleep 0.2 || true
  done
  for ((i = 0; i < 50; i++)); do
    kill -0 "${prefixers[@]}" 2>/dev/null || break
    sleep 0.1 || true
  done
  code="$(worst "${codes[@]}")"
}

for ((restart = 0; ; restart++)); do
  start_once
  if [ "$is_stopping" = 1 ] || ! restarts "$code" || [ "$restart" -ge "$max_restarts" ]; then break; fi
  say "exit code $code: start $((restart + 2)) of at most $((max_restarts + 1))"
done
exit "$code"
