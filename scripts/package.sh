#!/usr/bin/env bash
# Build the wheel and the sdist into work/package, and try them as somebody who installs them does:
#
#   bash scripts/package.sh               the minimal install: HuggingFace <-> Megatron without torch, at the versions of
#                                         constraints.txt and at the oldest that pyproject.toml allows
#   bash scripts/package.sh all-cpu       also `pip install dconv[all-cpu]` in an environment of its own (2 GB)
#
# PYTHON=… chooses the interpreter.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"
out=$root/work/package

rm -rf "$out"
mkdir -p "$out"
make_venv "$out/build"
quietly "$out/build/bin/python" -m pip install --disable-pip-version-check --no-input -c "$root/constraints.txt" build
quietly "$out/build/bin/python" -m build --outdir "$out/dist" "$root" # the wheel is built from the sdist: what it lacks shows
wheel=$(echo "$out"/dist/dconv-*.whl)
echo "built $(cd "$out/dist" && echo *)"

try() { # try NAME PIP-ARGUMENT…: install into an environment of that name, and convert there, far from this checkout
    local name=$1 env=$out/$1
    shift
    make_venv "$env"
    quietly "$env/bin/python" -m pip install --disable-pip-version-check --no-input "$@"
    mkdir "$out/$name-run"
    (cd "$out/$name-run" && env -u PYTHONPATH PATH="$env/bin:$PATH" DCONV_HISTORY=off bash "$root/scripts/package_try.sh")
    echo "$name: $("$env/bin/python" -m pip list --format freeze --disable-pip-version-check | grep -v '^pip=\|^dconv' | paste -sd' ' | cut -c1-300)"
}

# What pyproject.toml says of each dependency: NAME>=VERSION becomes NAME==VERSION.
mapfile -t oldest < <("$out/build/bin/python" - "$root/pyproject.toml" <<'EOF'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    for one in tomllib.load(file)["project"]["dependencies"]:
        print(one.replace(">=", "=="))
EOF
)
try minimal -c "$root/constraints.txt" "$wheel"
try oldest "${oldest[@]}" "$wheel"
if [[ ${1:-} == all-cpu ]]; then
    try all-cpu -c "$root/constraints.txt" "${wheel}[all-cpu]"
fi
