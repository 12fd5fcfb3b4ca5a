"""Gemma 1, 2 and 3 (text): zero-centred norms, scaled embeddings, a gated tanh-GELU.

From 2 on there are norms of what leaves attention and feed-forward, too.

Megatron names: Megatron-Bridge's ``models/gemma`` (``gemma2_bridge.py``, ``gemma3_bridge.py``), where a norm of what
leaves a linear layer is that layer's. Values: transformers' ``configuration_gemma*.py``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from dconv.arch.activation import GEGLU
from dconv.arch.attention import Biases, Grouped, Scaled, Window
from dconv.arch.carried import POST_NORMS, POST_NORMS_LACKING, Carried
from dconv.arch.config import COMMON
from dconv.arch.decoder import DecoderConfig
from dconv.arch.family import Row
from dconv.arch.layouts import copied
from dconv.arch.llama import LLAMA
from dconv.arch.moe import head_norms
from dconv.arch.rotary import TwoBases

_BIASES: Final = Biases("attention_bias", "attention_bias")
_EMBEDDING: Final = {"apply_layernorm_1p": True, "embedding_scale": "sqrt(hidden_size)"}
_SCALED: Final = "embedding_scale: embeddings are multiplied by the square root of hidden_size"
_CAUSAL: Final = {"use_bidirectional_attention": False}
_FINAL_CAP: Final = {"final_logit_softcapping": "the logits are capped by a tanh"}
_CAPS: Final = {"attn_logit_softcapping": "the attention scores are capped by a tanh", **_FINAL_CAP}
_LATER: Final = {
    **COMMON, "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "attention_bias": False, "query_pre_attn_scalar": 256, "sliding_window": 4096,
}  # fmt: skip
_GEGLU: Final = replace(GEGLU, key="hidden_activation")

_CONFIG = DecoderConfig(
    "gemma", "GemmaForCausalLM",
    {
        **COMMON, "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192, "tie_word_embeddings": True, "attention_bias": False,
    },
    bias=_BIASES,
    # published as "gelu", by which its class means the tanh form
    activation=replace(GEGLU, names=(*GEGLU.names, "gelu")),
    constants=_EMBEDDING,
    only=_CAUSAL,
    lacking=(_SCALED,),
)  # fmt: skip
_CONFIG_2 = DecoderConfig(
    "gemma2", "Gemma2ForCausalLM",
    {**_LATER, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    bias=_BIASES,
    window=Window("types", every=2),
    activation=_GEGLU,
    more=(Scaled("query_pre_attn_scalar", -0.5), Carried(_CAPS)),
    constants={**_EMBEDDING, **POST_NORMS},
    only=_CAUSAL,
    lacking=(_SCALED, POST_NORMS_LACKING),
)  # fmt: skip
_CONFIG_3 = DecoderConfig(
    "gemma3_text", "Gemma3ForCausalLM",
    {
        **_LATER, "vocab_size": 262208, "max_position_embeddings": 131072, "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0,
    },
    Grouped(qk_norm=True),
    _BIASES,
    Window("types", every=6, pattern="sliding_window_pattern"),
    TwoBases(),
    _GEGLU,
    (Scaled("query_pre_attn_scalar", -0.5), Carried(_FINAL_CAP, optional=True)),
    {**_EMBEDDING, **POST_NORMS},
    {**_CAUSAL, "attn_logit_softcapping": None},  # its class has the key and does nothing with it
    lacking=(_SCALED, POST_NORMS_LACKING),
)  # fmt: skip

_FC1_NORM = "decoder.layers.*.mlp.linear_fc1.layer_norm_weight"
_PROJ_NORM = "decoder.layers.*.self_attention.linear_proj.post_layernorm.weight"
_FC2_NORM = "decoder.layers.*.mlp.linear_fc2.post_layernorm.weight"

GEMMA = LLAMA.derive("gemma", _CONFIG)
GEMMA2 = LLAMA.derive("gemma2", _CONFIG_2, drop=(_FC1_NORM,), add=(
    Row(_PROJ_NORM, "model.layers.*.post_attention_layernorm.weight",    copied("hidden")),
    Row(_FC1_NORM,  "model.layers.*.pre_feedforward_layernorm.weight",   copied("hidden")),
    Row(_FC2_NORM,  "model.layers.*.post_feedforward_layernorm.weight",  copied("hidden")),
))  # fmt: skip
GEMMA3 = GEMMA2.derive("gemma3_text", _CONFIG_3, add=head_norms("head_dim", "head_dim"))
FAMILIES = (GEMMA, GEMMA2, GEMMA3)
