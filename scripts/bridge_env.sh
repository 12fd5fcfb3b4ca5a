#!/usr/bin/env bash
# Make an environment of its own with Megatron-Bridge 0.6.2 and megatron-core 0.19.2, on Python 3.11 and without CUDA:
#
#   bash scripts/bridge_env.sh [DIR]        DIR defaults to .venvs/bridge (ignored by git); 1.8 GB
#
# For scripts/bridge_peer.py (the peer of the benchmarks) and tests/arch/test_newer_core.py; dconv itself needs none of
# it. PYTHON=… chooses the interpreter. A second call with nothing changed returns at once. Both packages say that they
# need Python 3.12 and a GPU's software: hence --ignore-requires-python, --no-deps, and the shims of bridge_peer.py.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"

venv=$(realpath -m -- "${1:-$root/.venvs/bridge}")
stamp=$venv/bridge-installed

megatron=(megatron-core==0.19.2 megatron-bridge==0.6.2)
# what they import, then what that pulls in; torch in every call of pip, or one of them would replace it
wanted=(
    torch==2.13.0 transformers==5.12.1 datasets==5.2.0 einops==0.8.2 numpy==2.4.6 nvidia-modelopt==0.47.0
    omegaconf==2.3.0 packaging==26.3 pillow==13.0.0 psutil==7.2.2 PyYAML==6.0.3 regex==2026.11.15 requests==2.34.2
    rich==15.0.0 safetensors==0.8.0 scipy==1.17.1 six==1.17.0 tensorboard==2.21.0 tqdm==4.70.1
    typing_extensions==4.16.0
)
pulled=(
    absl-py==2.5.1 annotated-doc==0.0.7 annotated-types==0.8.0 antlr4-python3-runtime==4.9.3 anyio==4.16.0
    certifi==2026.10.18 charset-normalizer==3.5.2 click==8.5.1 dill==0.4.1 filelock==4.2.11 fsspec==2026.9.0
    grpcio==1.85.1 h11==0.16.0 hf-xet==1.8.0 httpcore==1.0.9 httpx==0.28.1 huggingface_hub==1.33.0 idna==3.20
    Jinja2==3.1.6 Markdown==3.11.3 markdown-it-py==4.3.0 MarkupSafe==3.0.4 mdurl==0.1.2 mpmath==1.3.0
    multiprocess==0.70.19 networkx==3.6.1 ninja==1.13.2 nvidia-ml-py==13.615.71 pandas==3.1.1 protobuf==7.36.2
    PuLP==3.3.2 pyarrow==26.0.1 pydantic==2.14.3 pydantic_core==2.50.4 Pygments==2.21.0 python-dateutil==4.0.0
    shellingham==1.5.4 sympy==1.14.0 tensorboard-data-server==0.7.2 tokenizers==0.22.2 typer==0.29.2
    typing-inspection==0.4.5 tzdata==2026.6 urllib3==2.8.0 Werkzeug==3.1.9 xxhash==4.1.0
)

now=$(hash_of "${BASH_SOURCE[0]}")
is_made "$venv" "$stamp" "$now" && exit
make_venv "$venv"
pip=("$venv/bin/python" -m pip install --disable-pip-version-check --no-input)
quietly "${pip[@]}" "${wanted[@]}" "${pulled[@]}"
quietly "${pip[@]}" --no-deps --ignore-requires-python torch==2.13.0 "${megatron[@]}"
quietly env PYTHONPATH="$root/scripts" "$venv/bin/python" -c \
    'import bridge_peer; bridge_peer.before_bridge(); from megatron.bridge import AutoBridge'
printf '%s\n' "$now" >"$stamp"
