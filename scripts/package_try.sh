#!/usr/bin/env bash
# In an empty directory, with `dconv` on PATH and nothing of its source: a model goes to Megatron and back, bit by bit.
set -euo pipefail

quiet() { # run; show what was said only when it fails
    "$@" >said 2>&1 || {
        cat said >&2
        echo "package_try: this failed: $*" >&2
        exit 1
    }
}

mkdir tiny
cat >tiny/config.json <<'EOF'
{
  "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
  "vocab_size": 640, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8,
  "num_key_value_heads": 4, "max_position_embeddings": 256, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
  "hidden_act": "silu", "tie_word_embeddings": false
}
EOF
echo 'fill: {normal: {std: 0.02, seed: 7}}' >fill.yaml

quiet dconv --version
for command in archs formats doctor; do
    quiet dconv "$command"
    quiet dconv "$command" --json
done
quiet dconv convert tiny hf --fake-weight --fake-weight-config fill.yaml -o model
quiet dconv inspect model --html model.html
for form in torch_dist legacy; do
    quiet dconv plan model megatron --tp 2 --pp 2 --megatron-format "$form"
    quiet dconv convert model megatron --tp 2 --pp 2 --megatron-format "$form" -o "$form" --nproc 2 --verify digest
    quiet dconv convert "$form" hf -o "back-$form"
    quiet dconv diff model "back-$form"
    cmp model/model.safetensors "back-$form/model.safetensors"
    quiet dconv check "$form" --no-run
done
quiet dconv convert model fp8 -o fp8
quiet dconv check fp8 --no-run
