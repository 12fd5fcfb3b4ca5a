"""Llama 1, 2, 3.x, Code Llama, and the families that differ from it by a few rows."""

from __future__ import annotations

from dconv.arch.config import LLAMA as LLAMA_CONFIG
from dconv.arch.config import MISTRAL as MISTRAL_CONFIG
from dconv.arch.config import QWEN2 as QWEN2_CONFIG
from dconv.arch.config import QWEN3 as QWEN3_CONFIG
from dconv.arch.family import Family, Row
from dconv.arch.layouts import columns, copied, gate_up, query_groups, vocab_rows

_QKV = "model.layers.*.self_attn.{q,k,v}_proj"

# fmt: off
LLAMA = Family("llama", LLAMA_CONFIG, (
    #   Megatron                                                   HuggingFace                                    layout
    Row("embedding.word_embeddings.weight",                        "model.embed_tokens.weight",                   vocab_rows("vocab", "hidden")),
    Row("decoder.layers.*.self_attention.linear_qkv.layer_norm_weight", "model.layers.*.input_layernorm.weight",  copied("hidden")),
    Row("decoder.layers.*.self_attention.linear_qkv.weight",       f"{_QKV}.weight",                              query_groups("hidden")),
    Row("decoder.layers.*.self_attention.linear_qkv.bias",         f"{_QKV}.bias",                                query_groups(), when="qkv_bias"),
    Row("decoder.layers.*.self_attention.linear_proj.weight",      "model.layers.*.self_attn.o_proj.weight",      columns("hidden", "q")),
    Row("decoder.layers.*.self_attention.linear_proj.bias",        "model.layers.*.self_attn.o_proj.bias",        copied("hidden"), when="out_bias"),
    Row("decoder.layers.*.mlp.linear_fc1.layer_norm_weight",       "model.layers.*.post_attention_layernorm.weight", copied("hidden")),
    Row("decoder.layers.*.mlp.linear_fc1.weight",                  "model.layers.*.mlp.{gate,up}_proj.weight",    gate_up("ffn", "hidden")),
    Row("decoder.layers.*.mlp.linear_fc1.bias",                    "model.layers.*.mlp.{gate,up}_proj.bias",      gate_up("ffn"), when="mlp_bias"),
    Row("decoder.layers.*.mlp.linear_fc2.weight",                  "model.layers.*.mlp.down_proj.weight",         columns("hidden", "ffn")),
    Row("decoder.layers.*.mlp.linear_fc2.bias",                    "model.layers.*.mlp.down_proj.bias",           copied("hidden"), when="mlp_bias"),
    Row("decoder.final_layernorm.weight",                          "model.norm.weight",                           copied("hidden")),
    Row("output_layer.weight",                                     "lm_head.weight",                              vocab_rows("vocab", "hidden"), when="untied"),
), recomputed=(
    ("*.rotary_emb.inv_freq", "recomputed from the config"),
))

MISTRAL = LLAMA.derive("mistral", MISTRAL_CONFIG)
QWEN2 = LLAMA.derive("qwen2", QWEN2_CONFIG)
QWEN3 = LLAMA.derive("qwen3", QWEN3_CONFIG, add=(
    Row("decoder.layers.*.self_attention.q_layernorm.weight",      "model.layers.*.self_attn.q_norm.weight",      copied("head_dim")),
    Row("decoder.layers.*.self_attention.k_layernorm.weight",      "model.layers.*.self_attn.k_norm.weight",      copied("head_dim")),
))
# fmt: on
FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3)
