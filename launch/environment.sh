#!/usr/bin/env bash
# Sourced by the other scripts: makes .venv once, and again when what it is made from changes.

# make_environment EXTRAS [torch]: install the project with these extras, as in `.[test,tpu]`.
make_environment() {
  local python="${PYTHON:-python3}" stamp
  "$python" - <<'PY' || { echo "error: Python 3.11 or later is needed; PYTHON=/path/to/python names one" >&2; exit 2; }
import sys
sys.exit(sys.version_info < (3, 11))
PY
  stamp="$(cksum <pyproject.toml) $*"
  if [ -x .venv/bin/python ] && [ "$(cat .venv/prism_stamp 2>/dev/null)" = "$stamp" ]; then
    return
  fi
  echo "installing into .venv" >&2
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  # torch first: the CPU build, where the index has one, must not be replaced by a newer release.
  if [ "${2:-}" = torch ]; then
    .venv/bin/python -m pip install --quiet 'torch==2.13.0'
  fi
  .venv/bin/python -m pip install --quiet -e "$1"
  printf '%s' "$stamp" >.venv/prism_stamp
}
