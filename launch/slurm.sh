#!/usr/bin/env bash
# Run a stage on nodes of a SLURM cluster: one process a node, with all of its GPUs.
#   bash launch/slurm.sh submit --name a --nodes 2 --gpus 8 --time 24:00:00 \
#     -- sft --config=configs/sft.py:8b --workdir=/shared/runs/sft ...
#   bash launch/slurm.sh logs | status | wait | stop | cancel   --name a
# render  prints the batch script     submit  hands it in        run     submits and waits
# logs    follows the output          status  of the queue       wait    until it ends; its exit code
# stop    SIGTERM: the stage saves    cancel  ends it at once
# The job saves 5 minutes before its time is over and queues again, as after a preemption or a lost
# node, at most --max-restarts (20) times. The project's folder must be on a shared file system.
# Options: --name, --nodes (1), --gpus of a node (8; 0: CPU alone), --time (24:00:00), --partition,
# --account, --qos, --suffix S (NAME-S), --single (one node, CPU alone), --dry-run.
# The environment does not travel: secrets come from ~/.prism_env, see docs/slurm.md.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

command="${1:-}"
case "$command" in
  render | submit | run | logs | status | wait | stop | cancel) shift ;;
  -h | --help) usage launch/slurm.sh && exit 0 ;;
  *) die "slurm.sh ${command:-(nothing)}: the command must be render, submit, run, logs, status, wait, stop or cancel" ;;
esac

name="" nodes=1 gpus=8 limit=24:00:00 partition="" account="" qos="" suffix="" max_restarts=20
single=0 dry_run=0
while [ $# -gt 0 ]; do
  option="$1" && shift
  case "$option" in
    --*=*) set -- "${option#*=}" "$@" && option="${option%%=*}" ;;
  esac
  case "$option" in
    --single) single=1 && continue ;;
    --dry-run) dry_run=1 && continue ;;
    -h | --help) usage launch/slurm.sh && exit 0 ;;
    --) break ;;
  esac
  [ $# -gt 0 ] || die "$option needs a value"
  case "$option" in
    --name) name="$1" ;;
    --nodes) nodes="$1" && check_number --nodes "$1" ;;
    --gpus) gpus="$1" ;;
    --time) limit="$1" ;;
    --partition) partition="$1" ;;
    --account) account="$1" ;;
    --qos) qos="$1" ;;
    --suffix) suffix="$1" ;;
    --max-restarts) max_restarts="$1" && check_number --max-restarts "$1" ;;
    *) die "slurm.sh: unknown option $option; the stage and its arguments follow --" ;;
  esac
  shift
done
if [ -n "$suffix" ]; then name="$name-$suffix"; fi
check_name "$name"
[[ "$gpus" =~ ^[0-9]+$ ]] || die "--gpus=$gpus: must be a whole number >= 0"
[[ "$limit" =~ ^([0-9]+-)?[0-9]+(:[0-9]{2}){0,2}$ ]] || die "--time=$limit: must be as SLURM takes it, 24:00:00"
for text in "$partition" "$account" "$qos"; do
  [[ "$text" =~ ^[-_.,a-zA-Z0-9]*$ ]] || die "slurm.sh: $text is no name of a partition, account or qos"
done
if [ "$single" = 1 ]; then nodes=1 gpus=0; fi

folder="$PWD/${PRISM_SLURM_STATE:-runs/slurm}"
case "${PRISM_SLURM_STATE:-}" in /*) folder="$PRISM_SLURM_STATE" ;; esac
state="$folder/$name"
# sbatch splits its lines at spaces, and replaces what follows a %.
[[ "$state" != *[[:space:]%\\\"\']* ]] ||
  die "slurm.sh: the folder $folder must have no space, %, quote or backslash in its path"
poll="${PRISM_POLL_SECONDS:-20}"

render() {
  local entry=(bash launch/entry.sh)
  [ $# -gt 0 ] || die "slurm.sh $command: a command of prism_jax must follow --"
  refuse_secrets "$@"
  refuse_tpu_flags
  if [ "$single" = 1 ]; then entry+=(--single); fi
  printf '%s\n' '#!/usr/bin/env bash' "#SBATCH --job-name=$name" "#SBATCH --nodes=$nodes" \
    '#SBATCH --ntasks-per-node=1'
  if [ "$gpus" -gt 0 ]; then printf '%s\n' "#SBATCH --gpus-per-node=$gpus" '#SBATCH --exclusive'; fi
  printf '%s\n' "#SBATCH --time=$limit" '#SBATCH --signal=TERM@300' '#SBATCH --requeue' \
    '#SBATCH --open-mode=append' "#SBATCH --output=$state.log" '#SBATCH --export=NONE'
  if [ -n "$partition" ]; then printf '%s\n' "#SBATCH --partition=$partition"; fi
  if [ -n "$account" ]; then printf '%s\n' "#SBATCH --account=$account"; fi
  if [ -n "$qos" ]; then printf '%s\n' "#SBATCH --qos=$qos"; fi
  printf '%s\n' 'set -uo pipefail' "cd $(show "$PWD") || exit 2" \
    '# shellcheck source=/dev/null' 'source launch/common.sh' 'code=0' \
    "srun --export=ALL --kill-on-bad-exit=1 --label $(show "${entry[@]}" -- "$@") || code=\$?" \
    "if restarts \"\$code\" && [ ! -f $(show "$state.stop") ] &&" \
    "  [ \"\${SLURM_RESTART_COUNT:-0}\" -lt $max_restarts ]; then" \
    "  say \"exit code \$code: queueing again\"" \
    "  scontrol requeue \"\$SLURM_JOB_ID\" && sleep 300" \
    'fi' "printf '%s\n' \"\$code\" >$(show "$state.exit")" "exit \"\$code\""
}

job_id() {
  [ -f "$state.job" ] || die "$name: no job of this name was submitted from $PWD"
  cat "$state.job"
}

submit() {
  local text
  text="$(render "$@")"
  if [ "$dry_run" = 1 ]; then
    show sbatch --parsable "$state.sbatch"
    printf '%s\n' "$text"
    return
  fi
  mkdir -p "$folder"
  if [ -f "$state.job" ] && [ -n "$(squeue --noheader --jobs "$(cat "$state.job")" --format %T 2>/dev/null)" ]; then
    die "$name is in the queue already, as job $(cat "$state.job")"
  fi
  rm -f "$state.exit" "$state.stop"
  printf '%s\n' "$text" >"$state.sbatch"
  # A cluster's name may follow the number.
  text="$(sbatch --parsable "$state.sbatch")"
  printf '%s\n' "${text%%;*}" >"$state.job"
  say "$name is job ${text%%;*}; its output is in $state.log"
}

await_end() {
  local id queue gone=0
  if [ "$dry_run" = 1 ]; then
    show squeue --noheader --jobs JOB --format %T
    return
  fi
  id="$(job_id)"
  while :; do
    if [ -f "$state.exit" ]; then exit "$(cat "$state.exit")"; fi
    # A queue that does not answer says nothing about the job.
    if queue="$(squeue --noheader --jobs "$id" --format %T 2>&1)" || [[ "$queue" == *"Invalid job id"* ]]; then
      case "$queue" in
        "" | *"Invalid job id"*) gone=$((gone + 1)) ;;
        *) gone=0 ;;
      esac
    fi
    if [ "$gone" -ge 3 ]; then
      say "error: job $id has left the queue without an exit code: cancelled, or out of time"
      exit 143
    fi
    sleep "$poll"
  done
}

case "$command" in
  render) render "$@" ;;
  submit) submit "$@" ;;
  run)
    submit "$@"
    await_end
    ;;
  logs) run tail -n 50 -F "$state.log" ;;
  status) run squeue --jobs "$(job_id)" ;;
  wait) await_end ;;
  stop)
    [ "$dry_run" = 1 ] || touch "$state.stop"
    run scancel --signal=TERM "$(job_id)"
    ;;
  cancel) run scancel "$(job_id)" ;;
esac
