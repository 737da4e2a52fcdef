#!/usr/bin/env bash
# Run the tests, on a fresh machine too: makes .venv, installs what tests need, runs them.
#   bash launch/test.sh [arguments of pytest]
# PYTHON names another interpreter (3.11 or later). PRISM_TEST_TORCH=0 leaves out torch, and with it
# the live comparison with Hugging Face's classes.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh
make_environment '.[test,tpu]' "$([ "${PRISM_TEST_TORCH:-1}" = 0 ] || echo torch)"

export JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Nothing here needs a TPU: libtpu must not look for one.
export TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# A process a core; each has few threads of its own.
exec .venv/bin/python -m pytest -n "${PRISM_TEST_PROCESSES:-2}" --dist loadfile "$@"
