#!/usr/bin/env bash
# Make an environment with the oldest transformers that calibration works with, to run its tests there:
#
#   bash scripts/oldest_env.sh [DIR]      DIR/oldest, 1.3 GB; DIR defaults to .venvs (ignored by git)
#   .venvs/oldest/bin/python -m pytest tests/quant/test_calibrate.py tests/quant/test_awq_search.py
#
# The newest is what constraints.txt pins. PYTHON=… chooses the interpreter. A second call with nothing changed returns
# at once.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=$(realpath -m -- "${1:-$root/.venvs}")/oldest
python=${PYTHON:-python3}

packages=(
    transformers==5.0.0 huggingface-hub==1.33.0 tokenizers==0.22.2 httpx==0.28.1 httpcore==1.0.9 typer-slim==0.24.0
    torch accelerate compressed-tensors gguf hypothesis megatron-core ml_dtypes numpy pyarrow pytest pytest-xdist PyYAML
    safetensors xxhash
)
#: Of constraints.txt what transformers 5.0.0 does not take.
newer='^(transformers|huggingface_hub|tokenizers|httpx2|httpcore2|truststore)=='

fail() {
    printf 'oldest_env: %s\n' "$@" >&2
    exit 1
}

log=$(mktemp)
pins=$(mktemp)
trap 'rm -f "$log" "$pins"' EXIT
quietly() { # run; show the output only when it fails
    "$@" >"$log" 2>&1 || {
        tail -n 40 "$log" >&2
        fail "this failed: $*"
    }
}

command -v "$python" >/dev/null || fail "no $python on PATH"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old: PYTHON=/path/to/python3.11 bash scripts/oldest_env.sh"
now=$(cat "${BASH_SOURCE[0]}" "$root/constraints.txt" | sha256sum | cut -d' ' -f1)
stamp=$venv/installed # the hash of both when this was carried out
[[ -x $venv/bin/python && -r $stamp && $(<"$stamp") == "$now" ]] && exit
if [[ ! -x $venv/bin/python ]]; then
    mkdir -p "$(dirname "$venv")"
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        quietly "$python" -m venv "$venv"
    else # Debian without python3-venv
        quietly "$python" -m venv --without-pip "$venv"
        quietly "$python" -m pip --python "$venv/bin/python" install pip
    fi
fi
grep -Ev "$newer" "$root/constraints.txt" >"$pins"
quietly "$venv/bin/python" -m pip install --disable-pip-version-check --no-input -c "$pins" "${packages[@]}"
quietly "$venv/bin/python" -c 'import transformers; assert transformers.__version__ == "5.0.0"'
printf '%s\n' "$now" >"$stamp"
