"""Phi-3 and Phi-4 without longrope: Llama with query, key and value in one tensor, and gate and up in another."""

from __future__ import annotations

from dconv.arch.attention import Window
from dconv.arch.decoder import DecoderConfig
from dconv.arch.family import Row
from dconv.arch.layouts import gate_up_in_one, query_groups_in_one
from dconv.arch.llama import LLAMA
from dconv.arch.rotary import Rope

_CONFIG = DecoderConfig(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    defaults={
        "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu",
        "max_position_embeddings": 4096, "initializer_range": 0.02, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "attention_dropout": 0.0, "sliding_window": None,
    },
    window=Window("all"),
    rope=Rope(kinds=("default",)),  # its class takes yarn for longrope, which Megatron lacks
)  # fmt: skip

_QKV, _FC1 = "decoder.layers.*.self_attention.linear_qkv.weight", "decoder.layers.*.mlp.linear_fc1.weight"

PHI3 = LLAMA.derive("phi3", _CONFIG, drop=(_QKV, _FC1), add=(
    Row(_QKV, "model.layers.*.self_attn.qkv_proj.weight", query_groups_in_one("hidden")),
    Row(_FC1, "model.layers.*.mlp.gate_up_proj.weight", gate_up_in_one("ffn", "hidden")),
))  # fmt: skip
FAMILIES = (PHI3,)
