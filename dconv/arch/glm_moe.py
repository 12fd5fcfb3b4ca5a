"""GLM-4.5 and 4.6: grouped queries, half of each head rotated, DeepSeek-V3's experts, router and token predictor.

Megatron names: Megatron-Bridge's ``models/glm/glm45_bridge.py``.
"""

from __future__ import annotations

from dataclasses import replace

from dconv.arch.attention import Biases, Grouped
from dconv.arch.config import COMMON
from dconv.arch.decoder import DecoderConfig
from dconv.arch.deepseek import EXPERT_BIAS, TWINS, predictors
from dconv.arch.experts import Experts
from dconv.arch.llama import LLAMA
from dconv.arch.moe import DENSE, DENSE_NAMES, ROUTED, head_norms, shared
from dconv.arch.predictors import Predictors
from dconv.arch.rotary import Rope
from dconv.arch.routing import Router

_CONFIG = DecoderConfig(
    "glm4_moe", "Glm4MoeForCausalLM",
    {
        **COMMON, "vocab_size": 151552, "intermediate_size": 10944, "num_hidden_layers": 46, "num_attention_heads": 96,
        "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "attention_bias": False,
        "partial_rotary_factor": 0.5, "use_qk_norm": False, "first_k_dense_replace": 1, "n_routed_experts": 128,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 1408, "routed_scaling_factor": 1.0,
        "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "num_nextn_predict_layers": 1,
    },
    Grouped(qk_norm_key="use_qk_norm"),
    Biases(qkv="attention_bias"),
    rope=Rope(part="partial_rotary_factor"),
    more=(
        Experts(
            Router(
                "sigmoid", "norm_topk_prob", "routed_scaling_factor", expert_bias=True, groups_judged_by=2, dtype="fp32"
            ),
            ("n_routed_experts", "num_local_experts", "num_experts"), shared="n_shared_experts", layers="late",
        ),
        Predictors(),
    ),
)  # fmt: skip

_NORMS = tuple(replace(row, when="qk_norm") for row in head_norms("head_dim", "head_dim"))
_ATTENTION = tuple(row for row in LLAMA.rows if ".self_attention." in row.megatron)
_EXPERTS = (*DENSE, *ROUTED, *shared("shared_experts"), EXPERT_BIAS)

GLM4_MOE = LLAMA.derive(
    "glm4_moe",
    _CONFIG,
    drop=DENSE_NAMES,
    add=(*_NORMS, *_EXPERTS, *predictors((*_ATTENTION, *_NORMS, *_EXPERTS))),
    twins=TWINS,
)
FAMILIES = (GLM4_MOE,)
