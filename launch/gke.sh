#!/usr/bin/env bash
# Run a stage on TPUs of a GKE cluster, as a JobSet.
#   bash launch/gke.sh submit --name a --type v5p --topology 2x4x4 --image IMAGE \
#     [--secret prism-secrets] -- sft --config=configs/sft.py:8b --workdir=gs://...
#   bash launch/gke.sh logs | status | wait | delete   --name a
# render  prints the YAML; with --gcluster the command of Cluster Toolkit that does the same
# submit  applies it                               run     deletes a JobSet of this name, submits, waits
# logs    follows worker 0; --all: every worker    wait    until it ends; its worst exit code
# status  the JobSet and its pods                  delete  ends it, after up to 600 s to save
# Options: --name, --namespace (default), --context of kubectl, --suffix S (NAME-S), --dry-run, and
# for render, submit and run those of `python3 launch/jobset.py --help`.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

command="${1:-}"
case "$command" in
  render | submit | run | logs | status | wait | delete) shift ;;
  -h | --help) usage launch/gke.sh && exit 0 ;;
  *) die "gke.sh ${command:-(nothing)}: the command must be render, submit, run, logs, status, wait or delete" ;;
esac

name="" namespace=default context="" suffix="" all=0 dry_run=0 others=()
while [ $# -gt 0 ]; do
  option="$1" && shift
  case "$option" in
    --*=*) set -- "${option#*=}" "$@" && option="${option%%=*}" ;;
  esac
  case "$option" in
    --dry-run) dry_run=1 && continue ;;
    --all) all=1 && continue ;;
    --spot | --single | --gcluster) others+=("$option") && continue ;;
    -h | --help) usage launch/gke.sh && exit 0 ;;
    --) break ;;
  esac
  [ $# -gt 0 ] || die "$option needs a value"
  case "$option" in
    --name) name="$1" ;;
    --namespace) namespace="$1" ;;
    --context) context="$1" ;;
    --suffix) suffix="$1" ;;
    --type | --topology | --slices | --image | --directory | --service_account | --secret | \
      --gcsfuse | --max_restarts) others+=("$option=$1") ;;
    *) die "gke.sh: unknown option $option; the stage and its arguments follow --" ;;
  esac
  shift
done
if [ -n "$suffix" ]; then name="$name-$suffix"; fi
check_name "$name"

kubectl=(kubectl --namespace "$namespace")
if [ -n "$context" ]; then kubectl+=(--context "$context"); fi
selector="jobset.sigs.k8s.io/jobset-name=$name"
poll="${PRISM_POLL_SECONDS:-20}"

render() {
  refuse_secrets "$@"
  refuse_tpu_flags
  python3 launch/jobset.py --name="$name" --namespace="$namespace" "${others[@]}" -- "$@"
}

submit() {
  local text
  text="$(render "$@")" || exit 2
  if [ "$dry_run" = 1 ]; then
    show "${kubectl[@]}" apply -f -
    printf '%s\n' "$text"
  else
    "${kubectl[@]}" apply -f - <<<"$text"
  fi
}

await_end() {
  local state answers failures=0
  if [ "$dry_run" = 1 ]; then
    show "${kubectl[@]}" get jobset "$name" -o 'jsonpath={.status.terminalState}'
    return
  fi
  while :; do
    if ! state="$("${kubectl[@]}" get jobset "$name" -o 'jsonpath={.status.terminalState}')"; then
      failures=$((failures + 1))
      [ "$failures" -lt 5 ] || { say "error: kubectl does not answer about $name" && exit 1; }
      state=""
    else
      failures=0
    fi
    case "$state" in
      Completed) exit 0 ;;
      Failed)
        read -r -a answers < <("${kubectl[@]}" get pods --selector "$selector" -o \
          'jsonpath={.items[*].status.containerStatuses[*].state.terminated.exitCode}' && echo) || true
        say "$name has failed; exit codes: ${answers[*]:-of pods that are gone}"
        exit "$(worst "${answers[@]:-1}")"
        ;;
    esac
    sleep "$poll"
  done
}

delete() { run "${kubectl[@]}" delete jobset "$name" --ignore-not-found --wait; }

case "$command" in
  render) render "$@" ;;
  submit) submit "$@" ;;
  run)
    delete
    submit "$@"
    await_end
    ;;
  logs)
    if [ "$all" = 0 ]; then
      selector+=",jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    fi
    run "${kubectl[@]}" logs --follow --tail=50 --prefix --all-containers \
      --max-log-requests=1024 --selector "$selector"
    ;;
  status)
    run "${kubectl[@]}" get jobset "$name"
    run "${kubectl[@]}" get pods --selector "$selector" -o wide
    ;;
  wait) await_end ;;
  delete) delete ;;
esac
