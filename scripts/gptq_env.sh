#!/usr/bin/env bash
# Make an environment each for the two peers of `dconv convert … gptq`, without CUDA, on torch 2.13.0:
#
#   bash scripts/gptq_env.sh [DIR]      DIR/gptqmodel: GPTQModel 7.7.0, DIR/autogptq: AutoGPTQ 0.7.1; 1.1 GB each
#                                       DIR defaults to .venvs (ignored by git)
#
# For scripts/bench_gptq.py (GPTQModel is what dconv is measured against) and for the tests that load dconv's outputs
# with both; dconv itself needs none of it. PYTHON=… chooses the interpreter. A second call with nothing changed
# returns at once. GPTQModel asks for torch 2.14 and runs on 2.13: hence --no-deps. AutoGPTQ's setup.py looks for CUDA
# unless told otherwise, and its modules import what transformers dropped after 4.51: hence its older packages. Two
# things that these do with a directory of today: a rope base that config.json has in rope_parameters alone is not seen
# (rope_theta is), and a tied embedding stays zero unless it is copied into the model once more.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"

venvs=$(realpath -m -- "${1:-$root/.venvs}")

both=(
    torch==2.13.0 accelerate==1.15.0 aiohappyeyeballs==2.7.1 aiohttp==3.14.5 aiosignal==1.4.0 attrs==26.1.0
    certifi==2026.10.18 charset-normalizer==3.5.2 filelock==4.2.11 frozenlist==1.8.0 hf-xet==1.8.0 idna==3.20
    Jinja2==3.1.6 MarkupSafe==3.0.4 mpmath==1.3.0 multidict==7.2.1 networkx==3.6.1 numpy==2.4.6 packaging==26.3
    pandas==3.1.1 propcache==0.5.4 psutil==7.2.2 pyarrow==26.0.1 python-dateutil==4.0.0 PyYAML==6.0.3
    regex==2026.11.15 requests==2.34.2 safetensors==0.8.0 six==1.17.0 sympy==1.14.0 tqdm==4.70.1
    typing_extensions==4.16.0 tzdata==2026.6 urllib3==2.8.0 wheel==0.48.0 xxhash==4.1.0 yarl==1.25.1
)
for_gptqmodel=(
    annotated-doc==0.0.7 anyio==4.16.0 click==8.5.1 datasets==5.2.0 Defuser==0.0.28 Device-SMI==0.5.7 dill==0.4.1
    fsspec==2026.9.0 h11==0.16.0 httpcore2==2.16.2 httpx2==2.16.2 huggingface_hub==2.4.0 LogBar==0.4.15
    markdown-it-py==4.3.0 mdurl==0.1.2 multiprocess==0.70.19 ninja==1.13.2 pillow==13.0.0 protobuf==7.36.2
    Pygments==2.21.0 PyPcre==0.6.4 rich==15.0.0 setuptools==84.2.1 shellingham==1.5.4 threadpoolctl==3.8.0
    TokeNicer==0.0.14 tokenizers==0.23.3 torchao==0.18.0 transformers==5.23.0 truststore==0.10.5 typer==0.29.2
)
for_autogptq=(
    datasets==3.6.0 dill==0.3.8 fsspec==2025.3.0 gekko==1.3.3 huggingface_hub==0.36.2 multiprocess==0.70.16
    peft==0.14.0 rouge==1.0.1 sentencepiece==0.2.3 setuptools==80.10.2 tokenizers==0.21.4 transformers==4.51.3
)

now=$(hash_of "${BASH_SOURCE[0]}")

# environment NAME PACKAGE IMPORT WANTED…: $venvs/NAME with PACKAGE itself (unless its stamp says it is there already)
environment() {
    local venv=$venvs/$1 package=$2 import=$3 stamp=$venvs/$1/peer-installed
    shift 3
    is_made "$venv" "$stamp" "$now" && return
    make_venv "$venv"
    local pip=("$venv/bin/python" -m pip install --disable-pip-version-check --no-input)
    quietly "${pip[@]}" "${both[@]}" "$@"
    quietly env BUILD_CUDA_EXT=0 "${pip[@]}" --no-deps --no-build-isolation "$package"
    quietly env GPTQMODEL_CPU_WORKERS=2 "$venv/bin/python" -c "$import"
    printf '%s\n' "$now" >"$stamp"
}

environment gptqmodel GPTQModel==7.7.0 'from gptqmodel import GPTQModel' "${for_gptqmodel[@]}"
environment autogptq auto-gptq==0.7.1 'from auto_gptq import AutoGPTQForCausalLM' "${for_autogptq[@]}"
