#!/usr/bin/env bash
# The test command: sets up its own environment, checks style, runs every test. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ./setup_env.sh
ensure_python test
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
run "$PYTHON" -m ruff check .
run "$PYTHON" -m pytest "$@"
