#!/usr/bin/env bash
# Make the environment with the test extras, then run the linters, the type checker and the tests:
#
#   bash scripts/test.sh [ARGUMENT…]       arguments go to pytest: -k torch_dist -x
#   bash scripts/test.sh --release         the gate before a version: also the end-to-end matrix in full, and of all branches
#                                          of dconv/ 90 % have to be taken; the rest is in work/coverage/report.txt
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

bash scripts/install.sh test
export PATH="$PWD/.venv/bin:$PATH"
export PYRIGHT_PYTHON_IGNORE_WARNINGS=1        # no note about newer versions: this one is pinned
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the test workers share the cores already

release=
[[ ${1:-} == --release ]] && release=yes && shift
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
tests=(pytest -n auto --maxprocesses 8 --durations 60 --durations-min 4)
if [[ $release ]]; then
    # every source x target, every page's commands (on clusters too), every hand-off;
    # ranks are processes, hence the settings in pyproject.toml
    matrix=(tests/formats/test_matrix.py tests/docs/test_commands.py tests/hw/test_handoffs.py tests/launch/test_launch.py
        tests/cluster/test_pages.py)
    rm -rf work/coverage && mkdir -p work/coverage
    tests=(coverage run -m "${tests[@]}")
    try "${tests[@]}" --long "${matrix[@]}"
fi
try "${tests[@]}" "$@"
if [[ $release ]]; then
    coverage combine --quiet
    coverage report --show-missing --skip-covered >work/coverage/report.txt
    try coverage report --format total --fail-under 90
fi

if ((${#failed[@]})); then
    printf 'test.sh: failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
