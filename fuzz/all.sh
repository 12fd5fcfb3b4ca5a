#!/usr/bin/env bash
# Feed every target, one after the other:  bash fuzz/all.sh [SECONDS]   (600 each by default)
# A line for each on standard output; to leave it alone:  nohup bash fuzz/all.sh 600 >work/fuzz.log 2>&1 &
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1
exec .venv/bin/python fuzz/run.py --seconds "${1:-600}"
