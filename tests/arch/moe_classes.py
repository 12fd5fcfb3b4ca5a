"""The real config classes of families with experts, and small models of them."""

from __future__ import annotations

import pytest
import transformers

from dconv.arch import moe_configs as moe
from dconv.arch.config import LLAMA, MISTRAL, QWEN2, QWEN3
from tests.arch.moe_published import (
    PUBLISHED,
)

#: In the order in which a checkpoint's args are tried.
FAMILIES = [
    LLAMA, MISTRAL, QWEN2, QWEN3, moe.MIXTRAL, moe.QWEN2_MOE, moe.QWEN3_MOE, moe.OLMOE, moe.MINIMAX_M2, moe.GPT_OSS,
    moe.DEEPSEEK, moe.DEEPSEEK_V2, moe.DEEPSEEK_V3,
]  # fmt: skip
CLASSES = {
    moe.MIXTRAL: transformers.MixtralConfig,
    moe.QWEN2_MOE: transformers.Qwen2MoeConfig,
    moe.QWEN3_MOE: transformers.Qwen3MoeConfig,
    moe.OLMOE: transformers.OlmoeConfig,
    moe.MINIMAX_M2: transformers.MiniMaxM2Config,
    moe.GPT_OSS: transformers.GptOssConfig,
    moe.DEEPSEEK_V2: transformers.DeepseekV2Config,
    moe.DEEPSEEK_V3: transformers.DeepseekV3Config,
}
BY_CLASS = pytest.mark.parametrize("family", CLASSES, ids=lambda family: family.model_type)

BY_NAME = pytest.mark.parametrize("name", PUBLISHED)


def small(family, **keys):
    """A model of the real class that is quick to build, and its config.json."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 11,
        "num_experts_per_tok": 2,
        "pad_token_id": None,
    }
    if family.defaults.get("head_dim"):
        sizes["head_dim"] = 16
    if family in (moe.QWEN2_MOE, moe.QWEN3_MOE, moe.DEEPSEEK_V2, moe.DEEPSEEK_V3):
        sizes["moe_intermediate_size"] = 12
    if family in (moe.DEEPSEEK_V2, moe.DEEPSEEK_V3):
        ranks = {"kv_lora_rank": 10, "q_lora_rank": 14, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
        sizes |= {**ranks, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}
    elif family in (moe.QWEN2_MOE, moe.OLMOE, moe.QWEN3_MOE):
        sizes["num_experts"] = 8
    else:
        sizes["num_local_experts"] = 8
    if family is moe.QWEN2_MOE:
        sizes["shared_expert_intermediate_size"] = 20
    if family is moe.GPT_OSS:
        sizes["layer_types"] = ["sliding_attention", "full_attention"] * 2
    return CLASSES[family](**{**sizes, **keys})
