"""GPT-2, and GPT as Megatron trained it: learned positions, LayerNorm, biases. HuggingFace has matrices transposed."""

from __future__ import annotations

from dconv.arch.absolute import Gelu, Learned, Multihead
from dconv.arch.attention import Biases
from dconv.arch.decoder import DecoderConfig
from dconv.arch.family import Family, Row
from dconv.arch.layouts import columns, copied, query_groups_in_one, rows, transposed, vocab_rows

_CONFIG = DecoderConfig(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    defaults={
        "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
        "activation_function": "gelu_new", "attn_pdrop": 0.1, "layer_norm_epsilon": 1e-5, "initializer_range": 0.02,
        "tie_word_embeddings": True,
    },
    attention=Multihead("n_head", "n_embd"),
    bias=Biases(qkv=True, out=True, mlp=True),
    rope=Learned("n_positions"),
    activation=Gelu("activation_function"),
    constants={"normalization": "LayerNorm"},
    only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    sizes={
        "n_layer": "num_layers", "n_embd": "hidden_size", "n_inner": "ffn_hidden_size",
        "n_positions": "max_position_embeddings",
    },
    numbers={"initializer_range": "init_method_std", "attn_pdrop": "attention_dropout"},
    norm_eps="layer_norm_epsilon",
)  # fmt: skip

_LAYER, _HF = "decoder.layers.*", "transformer.h.*"

# fmt: off
GPT2 = Family("gpt2", _CONFIG, (
    Row("embedding.word_embeddings.weight",                          "transformer.wte.weight",       vocab_rows("vocab", "hidden")),
    Row("embedding.position_embeddings.weight",                      "transformer.wpe.weight",       copied("positions", "hidden")),
    Row(f"{_LAYER}.self_attention.linear_qkv.layer_norm_weight",     f"{_HF}.ln_1.weight",           copied("hidden")),
    Row(f"{_LAYER}.self_attention.linear_qkv.layer_norm_bias",       f"{_HF}.ln_1.bias",             copied("hidden")),
    Row(f"{_LAYER}.self_attention.linear_qkv.weight",                f"{_HF}.attn.c_attn.weight",    transposed(query_groups_in_one("hidden"))),
    Row(f"{_LAYER}.self_attention.linear_qkv.bias",                  f"{_HF}.attn.c_attn.bias",      query_groups_in_one()),
    Row(f"{_LAYER}.self_attention.linear_proj.weight",               f"{_HF}.attn.c_proj.weight",    transposed(columns("hidden", "q"))),
    Row(f"{_LAYER}.self_attention.linear_proj.bias",                 f"{_HF}.attn.c_proj.bias",      copied("hidden")),
    Row(f"{_LAYER}.mlp.linear_fc1.layer_norm_weight",                f"{_HF}.ln_2.weight",           copied("hidden")),
    Row(f"{_LAYER}.mlp.linear_fc1.layer_norm_bias",                  f"{_HF}.ln_2.bias",             copied("hidden")),
    Row(f"{_LAYER}.mlp.linear_fc1.weight",                           f"{_HF}.mlp.c_fc.weight",       transposed(rows("ffn", "hidden"))),
    Row(f"{_LAYER}.mlp.linear_fc1.bias",                             f"{_HF}.mlp.c_fc.bias",         rows("ffn")),
    Row(f"{_LAYER}.mlp.linear_fc2.weight",                           f"{_HF}.mlp.c_proj.weight",     transposed(columns("hidden", "ffn"))),
    Row(f"{_LAYER}.mlp.linear_fc2.bias",                             f"{_HF}.mlp.c_proj.bias",       copied("hidden")),
    Row("decoder.final_layernorm.weight",                            "transformer.ln_f.weight",      copied("hidden")),
    Row("decoder.final_layernorm.bias",                              "transformer.ln_f.bias",        copied("hidden")),
    Row("output_layer.weight",                                       "lm_head.weight",               vocab_rows("vocab", "hidden"), when="untied"),
), recomputed=(
    ("*h.*.attn.bias", "the causal mask, recomputed"),
    ("*h.*.attn.masked_bias", "a constant, recomputed"),
), base="transformer.", classes=("GPT2Model",))
# fmt: on
FAMILIES = (GPT2,)
