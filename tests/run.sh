#!/usr/bin/env bash
# The test command: sets up its own environment, checks style, runs the tests. Arguments go to pytest.
#
#   bash tests/run.sh         all but those that kill and stop processes on purpose
#   bash tests/run.sh --all   those too, ten minutes more
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ./setup_env.sh
ensure_python test
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
run "$PYTHON" -m ruff check .
if [ "${1:-}" = --all ]; then
    shift
    run "$PYTHON" -m pytest "$@"
else
    run "$PYTHON" -m pytest -m "not reliability" "$@"
fi
