#!/usr/bin/env bash
# Ask for a TPU (a queued resource), run a stage on all of its workers, follow it, delete it.
#   bash launch/pod.sh up    --name a --type v5p-64 --zone us-east5-a --spot --valid-until 6h
#   bash launch/pod.sh run   --name a --type v5p-64 --zone us-east5-a -- sft --config=configs/sft.py:8b ...
#   bash launch/pod.sh logs | status | stop | down   --name a --type v5p-64 --zone us-east5-a
# up      waits until the TPU is there; asks again after a stock-out; Ctrl-C deletes the request
# run     copies the project, installs it once, starts the stage, shows the log of worker 0 and ends
#         with the exit code of the worst worker. Ctrl-C leaves the stage running.
# logs    shows the log of worker 0            stop   SIGTERM: the stage saves and ends
# status  state, exit codes, chip hours        down   deletes what `up` made
# Options:
#   --name NAME --type TYPE --zone ZONE [--project PROJECT]      TYPE: v5litepod-N, v5p-N, v6e-N
#   --slices N              several slices as one job (1)
#   --spot | --reserved | --flex    without one: on demand. --flex needs --max-run
#   --valid-until 6h        how long the request may wait      --max-run 24h   --flex: then it ends
#   --retries N             requests after a stock-out (10)    --existing      use a TPU VM as it is
#   --max-restarts N        of the stage, and of a spot TPU that is taken away (20)
#   --single                run: worker 0 alone, on its CPU (upcycle, export)
#   --detach                run: do not follow                 --force         down: without a record
#   --workdir DIR           status: chip hours of this run     --dry-run       print the commands
#   --create-flag FLAG, --ssh-flag FLAG    handed to gcloud as they are; may be given again, e.g.
#                           --create-flag=--service-account=... --ssh-flag=--tunnel-through-iap
# Secrets: a file ~/.prism_env on the workers; see docs/pods.md.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

command="${1:-}"
case "$command" in
  up | run | logs | status | stop | down) shift ;;
  -h | --help) usage launch/pod.sh && exit 0 ;;
  *) die "pod.sh ${command:-(nothing)}: the command must be up, run, logs, status, stop or down" ;;
esac

name="" type="" zone="" project="" slices=1 tier="" valid_until="" max_run="" retries=10 workdir=""
max_restarts=20 existing=0 single=0 detach=0 force=0 dry_run=0 create_flags=() ssh_flags=()
while [ $# -gt 0 ]; do
  option="$1" && shift
  case "$option" in
    --*=*) set -- "${option#*=}" "$@" && option="${option%%=*}" ;;
  esac
  case "$option" in
    --spot | --reserved | --flex)
      [ -z "$tier" ] || die "$option: at most one of --spot, --reserved and --flex"
      tier="${option#--}"
      continue
      ;;
    --existing) existing=1 && continue ;;
    --single) single=1 && continue ;;
    --detach) detach=1 && continue ;;
    --force) force=1 && continue ;;
    --dry-run) dry_run=1 && continue ;;
    -h | --help) usage launch/pod.sh && exit 0 ;;
    --) break ;;
  esac
  [ $# -gt 0 ] || die "$option needs a value"
  case "$option" in
    --name) name="$1" ;;
    --type) type="$1" ;;
    --zone) zone="$1" ;;
    --project) project="$1" ;;
    --slices) slices="$1" && check_number --slices "$1" ;;
    --valid-until) valid_until="$1" && check_duration --valid-until "$1" ;;
    --max-run) max_run="$1" && check_duration --max-run "$1" ;;
    --retries) retries="$1" && check_number --retries "$1" ;;
    --max-restarts) max_restarts="$1" && check_number --max-restarts "$1" ;;
    --workdir) workdir="$1" ;;
    --create-flag) create_flags+=("$1") ;;
    --ssh-flag) ssh_flags+=("$1") ;;
    *) die "pod.sh: unknown option $option; the stage and its arguments follow --" ;;
  esac
  shift
done

check_name "$name"
[[ "$zone" =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || die "--zone=$zone: must be a zone such as us-east5-a"
case "$type" in
  v5litepod-*) generation=v5e runtime=v2-alpha-tpuv5-lite chips_per_unit=1 most_chips_of_a_host=8 ;;
  v5p-*) generation=v5p runtime=v2-alpha-tpuv5 chips_per_unit=2 most_chips_of_a_host=4 ;; # cores
  v6e-*) generation=v6e runtime=v2-alpha-tpuv6e chips_per_unit=1 most_chips_of_a_host=8 ;;
  v7x-* | tpu7x*) die "--type=$type: Ironwood is only to be had through GKE; use launch/gke.sh" ;;
  *) die "--type=$type: must be v5litepod-N, v5p-N or v6e-N" ;;
esac
check_number "--type ${type%-*}-N: N" "${type##*-}"
chips=$((${type##*-} / chips_per_unit))
[ $((${type##*-} % chips_per_unit)) -eq 0 ] ||
  die "--type=$type: a v5p type counts cores, of which a chip has 2"
# A slice that one host does not hold has hosts of 4 chips.
hosts=1
if [ "$chips" -gt "$most_chips_of_a_host" ]; then hosts=$((chips / 4)); fi
if [ "$tier" = flex ] && [ -z "$max_run" ]; then die "--flex: --max-run must say for how long, at most 7d"; fi
if [ "$tier" != flex ] && [ -n "$max_run" ]; then die "--max-run: only with --flex"; fi
if [ "$existing" = 1 ] && [ "$slices" -gt 1 ]; then die "--existing: only with one slice"; fi

where=(--zone="$zone")
if [ -n "$project" ]; then where+=(--project="$project"); fi
queued=(gcloud compute tpus queued-resources)
vm=(gcloud compute tpus tpu-vm)
# --quiet: gcloud makes a key where there is none, without asking for a passphrase.
reach=("${where[@]}" "${ssh_flags[@]}" --quiet)
nodes=("$name")
if [ "$slices" -gt 1 ]; then
  nodes=()
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi
records="${PRISM_POD_STATE:-runs/pods}"
record="$records/$name.$zone"
requested=() # the command of the request that is made again
poll="${PRISM_POLL_SECONDS:-20}"
options=(--name "$name" --type "$type" --zone "$zone")
if [ -n "$project" ]; then options+=(--project "$project"); fi
if [ "$slices" -gt 1 ]; then options+=(--slices "$slices"); fi

# shellcheck source=launch/pod_request.sh
source launch/pod_request.sh

# on NODE WORKER COMMAND: run it in the project's folder of a worker, or of all.
on() {
  run "${vm[@]}" ssh "$1" "${reach[@]}" --worker="$2" --command="cd ~/prism_jax && $3"
}

everywhere() {
  local node
  for node in "${nodes[@]}"; do
    on "$node" all "$1" || { say "error: a worker of $node failed: $1" && return 1; }
  done
}

install() {
  local node archive="$records/$name.tar.gz" unpack
  mkdir -p "$records"
  run tar -czf "$archive" --exclude=__pycache__ --exclude=demo_base configs launch models prism_jax \
    pyproject.toml requirements.txt README.md LICENSE
  unpack='mkdir -p ~/prism_jax && tar -xzf ~/prism_jax.tar.gz -C ~/prism_jax'
  for node in "${nodes[@]}"; do
    if ! run "${vm[@]}" scp "$archive" "$node:prism_jax.tar.gz" "${reach[@]}" --worker=all ||
      ! run "${vm[@]}" ssh "$node" "${reach[@]}" --worker=all --command="$unpack"; then
      say "error: copying the project to a worker of $node failed; run it again"
      return 1
    fi
  done
  everywhere 'bash launch/worker.sh install'
}

start() {
  local text
  if [ "$single" = 1 ]; then
    printf -v text '%q ' bash launch/worker.sh start "$name" none "$max_restarts" --single -- "$@"
    on "${nodes[0]}" 0 "${text% }"
    return
  fi
  printf -v text '%q ' bash launch/worker.sh start "$name" "$generation" "$max_restarts" -- "$@"
  if ! everywhere "${text% }"; then
    # Those that began would wait for the others.
    everywhere "$(show bash launch/worker.sh stop "$name")" || true
    return 1
  fi
}

follow() { on "${nodes[0]}" 0 "$(show bash launch/worker.sh follow "$name")"; }

ask_codes() {
  local text
  text="$(show bash launch/worker.sh code "$name")"
  if [ "$single" = 1 ]; then on "${nodes[0]}" 0 "$text"; else everywhere "$text"; fi
}

# codes: print the exit code of every worker; "running" while one runs.
codes() { ask_codes | sed -n 's/.*prism_worker [^ ]* //p'; }

# collect: set `code` to the worst exit code; 1 when a worker does not answer.
collect() {
  local expected=$((slices * hosts)) answers failures=0
  if [ "$single" = 1 ]; then expected=1; fi
  while :; do
    mapfile -t answers < <(codes)
    # "none": the machine is another than the one on which the stage was started.
    if [ "${#answers[@]}" -lt "$expected" ] || [[ " ${answers[*]} " == *" none "* ]]; then
      failures=$((failures + 1))
      if [ "$failures" -ge 3 ]; then return 1; fi
    elif [[ " ${answers[*]} " != *" running "* ]]; then
      code="$(worst "${answers[@]}")"
      return 0
    fi
    sleep "$poll"
  done
}

# shellcheck disable=SC2317,SC2329
leave() {
  say "the stage goes on; to see it: $(show bash launch/pod.sh logs "${options[@]}")"
  say "to end it: $(show bash launch/pod.sh stop "${options[@]}")"
  exit 130
}

# refuse_second: end when the stage runs already; its files must not be replaced under it.
refuse_second() {
  local node text seen=""
  text="[ ! -e ~/prism_jax/launch/worker.sh ] || bash ~/prism_jax/$(show launch/worker.sh code "$name")"
  for node in "${nodes[@]}"; do
    if [ "$dry_run" = 1 ]; then
      show "${vm[@]}" ssh "$node" "${reach[@]}" --worker=all --command="$text"
    else
      seen+="$("${vm[@]}" ssh "$node" "${reach[@]}" --worker=all --command="$text")" ||
        { say "error: a worker of $node cannot be reached" && exit 1; }
    fi
  done
  if [[ "$seen" == *" running"* ]]; then
    die "$name runs already: $(show bash launch/pod.sh logs "${options[@]}") shows it, stop ends it"
  fi
}

run_stage() {
  local restart=0 lost=0 code
  refuse_second
  install
  start "$@"
  if [ "$detach" = 1 ]; then return; fi
  if [ "$dry_run" = 1 ]; then
    follow
    ask_codes
    return
  fi
  while :; do
    trap leave INT TERM HUP
    follow || say "the connection to worker 0 ended"
    if collect; then exit "$code"; fi
    lost=$((lost + 1))
    say "not all workers answer"
    case "$(state_of)" in
      SUSPEND* | FAILED)
        [ -f "$record" ] || { say "error: $name was taken away" && exit 143; }
        [ "$restart" -lt "$max_restarts" ] || { say "error: taken away too often" && exit 143; }
        restart=$((restart + 1)) lost=0
        mapfile -d '' requested <"$record"
        say "$name was taken away: asking for another"
        remove || exit 1
        up
        install
        start "$@"
        ;;
    esac
    if [ "$lost" -ge "${PRISM_MOST_LOST:-20}" ]; then
      say "error: the workers of $name do not answer; the stage may go on there"
      exit 1
    fi
  done
}

case "$command" in
  up) up ;;
  run)
    [ $# -gt 0 ] || die "pod.sh run: a command of prism_jax must follow --"
    refuse_secrets "$@"
    refuse_tpu_flags
    run_stage "$@"
    ;;
  logs) follow ;;
  status)
    if [ "$existing" = 1 ]; then
      run "${vm[@]}" describe "$name" "${where[@]}" --format='value(state)'
    else
      run "${queued[@]}" describe "$name" "${where[@]}" --format='value(state.state)'
    fi
    ask_codes
    if [ -n "$workdir" ]; then
      on "${nodes[0]}" 0 "$(show .venv/bin/python launch/chip_hours.py "$workdir")"
    fi
    ;;
  stop)
    everywhere "$(show bash launch/worker.sh stop "$name")"
    ;;
  down)
    [ "$existing" = 0 ] || die "down --existing: pod.sh did not make $name and does not delete it"
    if [ "$dry_run" = 0 ] && [ ! -f "$record" ] && [ "$force" = 0 ]; then
      die "down: pod.sh up has not made $name in $zone from here; --force deletes it all the same"
    fi
    remove
    ;;
esac
