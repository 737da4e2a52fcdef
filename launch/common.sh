#!/usr/bin/env bash
# Sourced by the launchers: messages, dry runs, exit codes, and the guard of secrets.
#
# Exit codes of a job, and what a launcher does:
#   0         finished
#   2         the input is wrong: stop
#   42        a worker was missing at the start: start again
#   134       another process of the job was lost: start again
#   143       preempted and saved: start again
#   1, 127-255 unexpected, killed, out of memory: start again, a limited number of times
#   else      stop

say() { printf '%s\n' "$*" >&2; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# Print a command as it would be typed.
show() {
  local text
  printf -v text '%q ' "$@"
  printf '%s\n' "${text% }"
}

# Run a command; with --dry-run print it instead.
run() {
  if [ "${dry_run:-0}" = 1 ]; then show "$@"; else "$@"; fi
}

# restarts CODE: whether a job that ended with it is to be started again.
restarts() {
  [ "$1" -eq 1 ] || [ "$1" -eq 42 ] || { [ "$1" -ge 127 ] && [ "$1" -le 255 ]; }
}

# worst CODE...: the exit code of a job whose processes ended so. A wrong input counts most, since
# the others then only tell that they lost a peer; next what ended by itself, then a lost peer.
worst() {
  local code kind best=0 best_kind=0
  for code in "$@"; do
    case "$code" in
      0) kind=0 ;;
      143) kind=1 ;;
      134) kind=2 ;;
      42) kind=3 ;;
      2) kind=5 ;;
      *) kind=4 ;;
    esac
    if [ "$kind" -gt "$best_kind" ]; then best=$code best_kind=$kind; fi
  done
  printf '%s\n' "$best"
}

# refuse_secrets ARGUMENT...: end when a secret of this environment stands in an argument. Arguments
# are seen by every user of a machine, and kept in logs and in job descriptions.
refuse_secrets() {
  local name value argument
  for name in $(compgen -e); do
    case "$name" in
      *TOKEN | *_KEY | *SECRET* | *PASSWORD* | *CREDENTIAL*) ;;
      *) continue ;;
    esac
    value="${!name}"
    [ "${#value}" -ge 8 ] || continue
    for argument in "$@"; do
      case "$argument" in
        *"$value"*) die "an argument holds the value of $name: secrets stay off command lines" ;;
      esac
    done
  done
}

# refuse_tpu_flags: XLA ends every program that meets a flag of libtpu in XLA_FLAGS.
refuse_tpu_flags() {
  case "${XLA_FLAGS:-}" in
    *xla_tpu_*) die "XLA_FLAGS holds an xla_tpu_ flag: libtpu's flags belong into LIBTPU_INIT_ARGS" ;;
  esac
}

# check_name NAME: what Google Cloud and Kubernetes take as a name.
check_name() {
  [[ "$1" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    die "--name=$1: must be lower-case letters, digits and hyphens, at most 40, a letter first"
}

# check_number OPTION VALUE
check_number() {
  [[ "$2" =~ ^[1-9][0-9]{0,5}$ ]] || die "$1=$2: must be a whole number >= 1"
}

# check_duration OPTION VALUE
check_duration() {
  [[ "$2" =~ ^[1-9][0-9]*[smhd]$ ]] || die "$1=$2: must be a duration such as 90m, 6h or 2d"
}

# usage FILE: the comment at its head.
usage() { sed -n '2,/^[^#]/{/^#/!q;s/^# \{0,1\}//p}' "$1"; }
