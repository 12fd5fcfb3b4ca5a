#!/usr/bin/env bash
# Make an environment with the oldest transformers that calibration works with, to run its tests there:
#
#   bash scripts/oldest_env.sh [DIR]      DIR/oldest, 1.3 GB; DIR defaults to .venvs (ignored by git)
#   .venvs/oldest/bin/python -m pytest tests/quant/test_calibrate.py tests/quant/test_awq_search.py
#
# The newest is what constraints.txt pins. PYTHON=… chooses the interpreter. A second call with nothing changed returns
# at once.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"

venv=$(realpath -m -- "${1:-$root/.venvs}")/oldest

packages=(
    transformers==5.0.0 huggingface-hub==1.33.0 tokenizers==0.22.2 httpx==0.28.1 httpcore==1.0.9 typer-slim==0.24.0
    torch accelerate compressed-tensors gguf hypothesis megatron-core ml_dtypes numpy pyarrow pytest pytest-xdist PyYAML
    safetensors xxhash
)
#: Of constraints.txt what transformers 5.0.0 does not take.
newer='^(transformers|huggingface_hub|tokenizers|httpx2|httpcore2|truststore)=='

stamp=$venv/installed
now=$(hash_of "${BASH_SOURCE[0]}" "$root/constraints.txt")
is_made "$venv" "$stamp" "$now" && exit
pins=$(mktemp)
trap 'rm -f "$log" "$pins"' EXIT
make_venv "$venv"
grep -Ev "$newer" "$root/constraints.txt" >"$pins"
quietly "$venv/bin/python" -m pip install --disable-pip-version-check --no-input -c "$pins" "${packages[@]}"
quietly "$venv/bin/python" -c 'import transformers; assert transformers.__version__ == "5.0.0"'
printf '%s\n' "$now" >"$stamp"
