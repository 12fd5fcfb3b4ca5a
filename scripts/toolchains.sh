#!/usr/bin/env bash
# Make an environment each for hardware compilers that install from a package index and run on a CPU:
#
#   bash scripts/toolchains.sh NAME…      .venvs/NAME (ignored by git); TOOLCHAINS=DIR makes DIR/NAME
#
#     rknn    rknn-toolkit2 2.5.0      Rockchip RK3588, RK3576, RK3562 …     1.5 GB, x86-64 Linux
#     qnn     onnxruntime-qnn 2.7.0    Qualcomm HTP, SM8750, SM8650 …        0.5 GB, x86-64 Linux
#     litert  litert-torch 0.10.0      .tflite for MediaTek; its NPU compiler is not public    2.1 GB
#
# `dconv/hw/drivers/NAME_driver.py` is run there; dconv itself needs none of it. PYTHON=… chooses the interpreter
# (rknn: 3.11 or 3.12). A second call with nothing changed returns at once. To add one: an entry in packages and in
# imports below, and a driver of that name, whose `probe` has the last word. Everything is listed, hence --no-deps:
# rknn-toolkit2 asks for torch 2.4 at most, imports it, and works with 2.13 as it is for a CPU.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname -- "${BASH_SOURCE[0]}")/venv.sh"

venvs=$(realpath -m -- "${TOOLCHAINS:-$root/.venvs}")

declare -A packages imports
# numpy 1.26.4, onnx 1.18.0 and protobuf 4.25.4 are the newest that the toolkit takes; onnxruntime 1.23 that onnx
packages[rknn]="
    rknn-toolkit2==2.5.0 torch==2.13.0
    fast-histogram==0.14 flatbuffers==25.12.19 mpmath==1.3.0 numpy==1.26.4 onnx==1.18.0 onnxruntime==1.23.2
    opencv-python-headless==4.11.0.86 packaging==26.3 protobuf==4.25.4 psutil==7.2.2 ruamel.yaml==0.19.1 scipy==1.17.1
    setuptools==79.0.1 sympy==1.14.0 tqdm==4.70.1 typing_extensions==4.16.0
"
imports[rknn]='from rknn.api import RKNN'
packages[qnn]="
    onnxruntime-qnn==2.7.0 onnxruntime==1.31.1
    flatbuffers==25.12.19 ml_dtypes==0.6.0 numpy==2.4.6 onnx==1.23.2 packaging==26.3 protobuf==7.36.2
    typing_extensions==4.16.0
"
imports[qnn]='import onnxruntime, onnxruntime_qnn; from onnxruntime.quantization.execution_providers import qnn'
packages[litert]=$(grep -v '^#' "$root/scripts/toolchains/litert.txt")
imports[litert]='import litert_torch, ai_edge_litert.interpreter'

known=$(printf '%s\n' "${!packages[@]}" | sort | paste -sd' ')
(($#)) || fail "which? bash scripts/$self.sh NAME…, of: $known"
for name; do
    [[ -n ${packages[$name]:-} ]] || fail "no toolchain is called $name; there are: $known"
done

for name; do
    venv=$venvs/$name
    stamp=$venv/toolchain-installed
    now=$(sha256sum <<<"${packages[$name]}" | cut -d' ' -f1)
    is_made "$venv" "$stamp" "$now" && continue
    make_venv "$venv"
    read -r -d '' -a wanted <<<"${packages[$name]}" || true
    quietly "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --no-deps "${wanted[@]}"
    quietly "$venv/bin/python" -c "${imports[$name]}"
    driver=$root/dconv/hw/drivers/${name}_driver.py
    said=$("$venv/bin/python" "$driver" probe) || fail "this failed: $driver probe"
    # of litert the compiler of the NPU is a download of its vendor's, which need not be there
    [[ $name == litert || $said == *'"complete": true'* ]] || fail "$name is installed and not complete: $said"
    printf '%s\n' "$now" >"$stamp"
done
