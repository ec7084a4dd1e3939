#!/usr/bin/env bash
# The test command: sets up its own environment, checks style and types, runs the tests. Arguments go to pytest.
#
#   bash tests/run.sh         the quick ones: under ten minutes on two cores
#   bash tests/run.sh --all   all, the slow ones and those that kill processes and spoil files, too
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ./setup_env.sh
if [ "${1:-}" = --all ] && [ $# -gt 1 ]; then
    echo "Error: --all takes no other arguments; choose tests by bash tests/run.sh FILE -m ''" >&2
    exit 2
fi
ensure_python test
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
run "$PYTHON" -m ruff check .
run "$PYTHON" -m ruff format --check .
run "$PYTHON" -m mypy
parallel=(--numprocesses=auto --maxprocesses=8 --dist=worksteal)
if [ "${1:-}" = --all ]; then
    run "$PYTHON" -m pytest "${parallel[@]}" -m "not reliability"
    run "$PYTHON" -m pytest -m reliability # one at a time, for they measure how long processes take to stop
else
    run "$PYTHON" -m pytest "${parallel[@]}" -m "not reliability and not slow" "$@"
fi
