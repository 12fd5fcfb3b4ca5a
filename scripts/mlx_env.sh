#!/usr/bin/env bash
# Make an environment with MLX for the CPU and mlx-lm, which judge FORMAT mlx; dconv itself needs neither:
#
#   bash scripts/mlx_env.sh [DIR]      DIR/mlx: mlx 0.32.4, mlx-lm 0.32.2; 250 MB
#                                      DIR defaults to .venvs (ignored by git)
#
# For tests/formats/test_mlx_peer.py and tests/formats/record_mlx.py. PYTHON=… chooses the interpreter. A second call
# with nothing changed returns at once. Everything is listed, hence --no-deps: no torch, and no mlx-metal.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"

venv=$(realpath -m -- "${1:-$root/.venvs}")/mlx
packages=(
    mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2
    annotated-doc==0.0.7 anyio==4.16.0 certifi==2026.10.18 click==8.5.1 filelock==4.2.11 fsspec==2026.9.0 h11==0.16.0
    hf-xet==1.8.0 httpcore2==2.16.2 httpx2==2.16.2 huggingface_hub==2.4.0 idna==3.20 Jinja2==3.1.6
    markdown-it-py==4.3.0 MarkupSafe==3.0.4 mdurl==0.1.2 numpy==2.4.6 packaging==26.3 protobuf==7.36.2
    annotated-types==0.8.0 pydantic==2.14.3 pydantic_core==2.50.4 typing-inspection==0.4.5
    Pygments==2.21.0 PyYAML==6.0.3 regex==2026.11.15 rich==15.0.0 safetensors==0.8.0 sentencepiece==0.2.3
    shellingham==1.5.4 tokenizers==0.23.3 tqdm==4.70.1 transformers==5.23.0 truststore==0.10.5 typer==0.29.2
    typing_extensions==4.16.0
)

stamp=$venv/peer-installed
now=$(hash_of "${BASH_SOURCE[0]}")
is_made "$venv" "$stamp" "$now" && exit
make_venv "$venv"
quietly "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --no-deps "${packages[@]}"
quietly "$venv/bin/python" -c 'import mlx.core, mlx_lm'
printf '%s\n' "$now" >"$stamp"
