"""OLMo 2: what leaves attention and feed-forward is normalised, not what enters; query and key over all heads at once.

Megatron names: mcore-bridge's (``model/gpts/olmo2.py``); Megatron-LM and Megatron-Bridge have no such layer. Not its
order of rows in ``linear_qkv``, all queries, all keys, all values: here they are grouped as in every other model.
"""

from __future__ import annotations

from dconv.arch.attention import Biases, Grouped
from dconv.arch.carried import NO_PRE_NORMS, POST_NORMS, POST_NORMS_LACKING
from dconv.arch.config import COMMON
from dconv.arch.decoder import DecoderConfig
from dconv.arch.glm import post_norms
from dconv.arch.llama import LLAMA
from dconv.arch.moe import head_norms

_CONFIG = DecoderConfig(
    "olmo2", "Olmo2ForCausalLM",
    {**COMMON, "vocab_size": 50304, "rms_norm_eps": 1e-5, "attention_bias": False},
    Grouped(qk_norm="full"),
    Biases("attention_bias", "attention_bias"),
    constants={**POST_NORMS, **NO_PRE_NORMS},
    lacking=(POST_NORMS_LACKING, "no_pre_layernorm: nothing is normalised before attention and feed-forward"),
)  # fmt: skip

_PRE_NORMS = tuple(row.megatron for row in LLAMA.rows if row.megatron.endswith(".layer_norm_weight"))

OLMO2 = LLAMA.derive("olmo2", _CONFIG, drop=_PRE_NORMS, add=(
    *head_norms("q", "kv"), *post_norms("post_attention_layernorm", "post_feedforward_layernorm")
))  # fmt: skip
FAMILIES = (OLMO2,)
