#!/usr/bin/env bash
# Fuzz everything that reads what strangers wrote: responses, data, weights, small files, commands.
#   bash launch/fuzz.sh MINUTES [--seed N] [--only TARGET[,TARGET]] [--number N]
# MINUTES of processor time, all targets together. Per target: inputs, distinct findings with the
# smallest input, the slowest input, growth of memory. Exit code 1 on a finding; --number runs one
# input again. The targets are in tests/fuzz/targets.py; the tests run a short profile of them.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PRISM_PYTHON:-}"
if [ -z "$python" ]; then
  # shellcheck source=launch/environment.sh
  source launch/environment.sh
  make_environment '.[test]'
  python=.venv/bin/python
fi
PYTHONPATH="$PWD" exec nice "$python" -m tests.fuzz.campaign "$@"
