#!/usr/bin/env bash
# Make the environment with the test extras, then run the linters, the type checker and the tests.
# Arguments go to pytest:  bash scripts/test.sh -k torch_dist -x
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

bash scripts/install.sh test
export PATH="$PWD/.venv/bin:$PATH"
export PYRIGHT_PYTHON_IGNORE_WARNINGS=1        # no note about newer versions: this one is pinned
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the test workers share the cores already

failed=()
try() { # run; a failure is kept for the end, so that one run tells everything
    echo "== $*"
    "$@" || failed+=("$*")
}
try ruff check .
try ruff format --check .
try pyright                                 # dconv, strict
try pyright -p scripts/pyrightconfig.json   # scripts and fuzz targets
try shellcheck -x .ci/run scripts/*.sh launch/*.sh slurm/*.sh slurm/*.sbatch fuzz/*.sh
try hadolint launch/Containerfile
try pytest -n auto --maxprocesses 8 --durations 60 --durations-min 4 "$@"

if ((${#failed[@]})); then
    printf 'test.sh: failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
