"""House: Llama's tensors with norms of query and key, a bias on query, key and value, and a name of its own."""

from __future__ import annotations

from dconv.arch.attention import Biases, Grouped
from dconv.arch.decoder import DecoderConfig
from dconv.arch.family import Row
from dconv.arch.layouts import copied
from dconv.arch.llama import LLAMA

_CONFIG = DecoderConfig(
    model_type="house",
    architecture="HouseForCausalLM",
    defaults={
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6, "initializer_range": 0.02, "attention_dropout": 0.1, "tie_word_embeddings": False,
        "attention_bias": True,
    },
    attention=Grouped(qk_norm=True),
    bias=Biases(qkv="attention_bias"),
)  # fmt: skip

_NORMS = (
    Row(
        "decoder.layers.*.self_attention.q_layernorm.weight",
        "model.layers.*.self_attn.q_norm.weight",
        copied("head_dim"),
    ),
    Row(
        "decoder.layers.*.self_attention.k_layernorm.weight",
        "model.layers.*.self_attn.k_norm.weight",
        copied("head_dim"),
    ),
)

FAMILIES = (LLAMA.derive("house", _CONFIG, add=_NORMS),)
