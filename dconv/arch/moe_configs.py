"""The families with experts, as declarations. Defaults are transformers' own (DeepSeek v1: those of its code)."""

from __future__ import annotations

from typing import Final

from dconv.arch.activation import Activation
from dconv.arch.attention import Biases, Grouped, Window
from dconv.arch.config import COMMON
from dconv.arch.decoder import DecoderConfig
from dconv.arch.experts import Experts
from dconv.arch.latent import Latent, LatentRope
from dconv.arch.predictors import Predictors
from dconv.arch.rotary import Rope
from dconv.arch.routing import Router

_LOCAL: Final = ("num_local_experts", "num_experts")
_BIAS: Final = "attention_bias"

MIXTRAL: Final = DecoderConfig(
    "mixtral", "MixtralForCausalLM",
    {
        **COMMON, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    window=Window("all"),
    rope=Rope(longrope=True),
    more=(Experts(Router(), _LOCAL, "intermediate_size"),),
)  # fmt: skip

_QWEN: Final = {
    **COMMON, "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 24, "max_position_embeddings": 32768,
    "sliding_window": 4096, "decoder_sparse_step": 1, "norm_topk_prob": False,
}  # fmt: skip
QWEN2_MOE: Final = DecoderConfig(
    "qwen2_moe", "Qwen2MoeForCausalLM",
    {
        **_QWEN, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16, "qkv_bias": True,
        "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_experts": 60,
        "num_experts_per_tok": 4,
    },
    bias=Biases(qkv="qkv_bias"),
    window=Window("types", switch=True),
    more=(Experts(
        Router(normalised="norm_topk_prob"), shared="shared_expert_intermediate_size", shared_gate=True, layers="step"
    ),),
)  # fmt: skip
QWEN3_MOE: Final = DecoderConfig(
    "qwen3_moe", "Qwen3MoeForCausalLM",
    {
        **_QWEN, "intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 4,
        "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
    },
    Grouped(qk_norm=True),
    Biases(_BIAS, _BIAS),
    Window("all", switch=True),
    more=(Experts(Router(normalised="norm_topk_prob"), layers="step"),),
)  # fmt: skip

OLMOE: Final = DecoderConfig(
    "olmoe", "OlmoeForCausalLM",
    {
        **COMMON, "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 16,
        "num_attention_heads": 16, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "num_experts": 64,
        "num_experts_per_tok": 8, "norm_topk_prob": False,
    },
    Grouped(qk_norm="full"),
    Biases(_BIAS, _BIAS),
    more=(Experts(Router(normalised="norm_topk_prob"), width="intermediate_size"),),
)  # fmt: skip

MINIMAX_M2: Final = DecoderConfig(
    "minimax_m2", "MiniMaxM2ForCausalLM",
    {
        **COMMON, "vocab_size": 200064, "hidden_size": 3072, "intermediate_size": 1536, "num_hidden_layers": 62,
        "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 196608,
        "rope_theta": 5e6, "num_local_experts": 256, "num_experts_per_tok": 8,
    },
    Grouped(qk_norm="full"),
    rope=Rope(part="rotary_dim"),
    more=(Experts(Router("sigmoid", expert_bias=True), _LOCAL, "intermediate_size"),),
    only={
        "use_qk_norm": True, "qk_norm_type": "per_layer", "scoring_func": "sigmoid", "use_routing_bias": True,
        "shared_intermediate_size": 0,
    },
)  # fmt: skip

#: SiLU with a gain of 1.702 (quick GELU), clamped, times 1 more than the other half.
_CLAMPED: Final = Activation(("silu",), {"quick_geglu": True, "glu_linear_offset": 1.0}, limit="swiglu_limit")
GPT_OSS: Final = DecoderConfig(
    "gpt_oss", "GptOssForCausalLM",
    {
        **COMMON, "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "sliding_window": 128, "rope_theta": 150000.0, "attention_bias": True,
        "num_local_experts": 128, "num_experts_per_tok": 4, "swiglu_limit": 7.0,
        "rope_parameters": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
    Grouped(sinks=True),
    Biases(_BIAS, _BIAS, True),
    Window("types", every=2),
    Rope(stretched=True),
    _CLAMPED,
    more=(Experts(Router(), _LOCAL, "intermediate_size", bias=True),),
    only={"swiglu_alpha": 1.702},
)  # fmt: skip

#: DeepSeek's own names; its code refuses nothing of this, but says a constant where it reads the key at all.
_ROUTED: Final = ("n_routed_experts", "num_local_experts", "num_experts")
_EVERY_LAYER: Final = {"moe_layer_freq": 1, "attention_bias": False, "mlp_bias": False}
DEEPSEEK: Final = DecoderConfig(
    "deepseek", "DeepseekForCausalLM",
    {
        **COMMON, "vocab_size": 102400, "num_hidden_layers": 30, "num_key_value_heads": 32,
        "moe_intermediate_size": 1407, "first_k_dense_replace": 0, "norm_topk_prob": False,
    },
    more=(Experts(Router(normalised="norm_topk_prob"), _ROUTED, shared="n_shared_experts", layers="late"),),
    only={**_EVERY_LAYER, "scoring_func": "softmax"},
)  # fmt: skip
_LATENT: Final = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
DEEPSEEK_V2: Final = DecoderConfig(
    "deepseek_v2", "DeepseekV2ForCausalLM",
    {
        **COMMON, **_LATENT, "vocab_size": 102400, "v_head_dim": 128, "first_k_dense_replace": 0,
        "n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1407, "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
    },
    Latent(),
    rope=LatentRope(),
    more=(Experts(
        Router(
            normalised=False, scaling="routed_scaling_factor", dtype="fp32", groups_judged_by=1,
            grouped_if=("topk_method", "group_limited_greedy", "greedy"),
        ),
        _ROUTED, shared="n_shared_experts", layers="late",
    ),),
    only={**_EVERY_LAYER, "norm_topk_prob": False, "scoring_func": "softmax"},
)  # fmt: skip
DEEPSEEK_V3: Final = DecoderConfig(
    "deepseek_v3", "DeepseekV3ForCausalLM",
    {
        **COMMON, **_LATENT, "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
        "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "v_head_dim": 128,
        "max_position_embeddings": 4096, "first_k_dense_replace": 3, "n_routed_experts": 256, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "routed_scaling_factor": 2.5, "n_group": 8,
        "topk_group": 4, "norm_topk_prob": True, "num_nextn_predict_layers": 1,
    },
    Latent(),
    rope=LatentRope(),
    more=(
        Experts(
            Router(
                "sigmoid", "norm_topk_prob", "routed_scaling_factor", expert_bias=True, groups_judged_by=2, dtype="fp32"
            ),
            _ROUTED, shared="n_shared_experts", layers="late",
        ),
        Predictors(),
    ),
    only={**_EVERY_LAYER, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_interleave": True},
)  # fmt: skip
