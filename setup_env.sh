# Sourced by train.sh, sample.sh and tests/run.sh: leaves in PYTHON an interpreter that has what the project needs.
# That is the active one if it will do; else .venv, which is made and filled with the versions in requirements.txt.

# has_dependencies INTERPRETER [test]: does it have every dependency of pyproject.toml, in a version that will do?
has_dependencies() {
    "$1" - "${2:-}" <<'PY'
import importlib.metadata
import re
import sys

text = open("pyproject.toml", encoding="utf-8").read()
wanted = text.split("dependencies = [", 1)[1].split("]", 1)[0]
if sys.argv[1] == "test":
    wanted += text.split("test = [", 1)[1].split("]", 1)[0]
numbers = lambda version: tuple(int(part) for part in re.findall(r"\d+", version)[:3])
for name, least in re.findall(r'"([A-Za-z0-9_-]+)>=([0-9.]+)"', wanted):
    if numbers(importlib.metadata.version(name)) < numbers(least):
        sys.exit(1)
import torchvision  # fails beside a build of torch that it was not made for
PY
}

ensure_python() {
    local extra="${1:-}" candidate
    for candidate in python .venv/bin/python; do
        if command -v "$candidate" >/dev/null && has_dependencies "$candidate" "$extra" 2>/dev/null; then
            PYTHON="$candidate"
            return
        fi
    done
    if ! python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
        echo "Error: python3 must be Python 3.11 to 3.13; install one and put it first in PATH" >&2
        return 2
    fi
    echo "+ python3 -m venv .venv, then pip install the versions of requirements.txt (some 6 GB, a minute or more)" >&2
    python3 -m venv .venv
    PYTHON=.venv/bin/python
    # On a terminal pip shows its bars: gigabytes may take a while.
    "$PYTHON" -m pip install $([ -t 2 ] || echo --quiet) --disable-pip-version-check -r requirements.txt \
        ${extra:+-r requirements-$extra.txt} >&2
    if ! has_dependencies "$PYTHON" "$extra"; then
        echo "Error: .venv is incomplete after the installation, for the reason above; delete .venv to begin anew" >&2
        return 2
    fi
}

# run COMMAND...: print it, then run it.
run() {
    echo "+ $*" >&2
    "$@"
}
