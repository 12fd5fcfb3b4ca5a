"""The args of families with experts, judged by megatron-core: routing, activation, rotary angles, its config class."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import torch
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RotaryEmbedding, DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3RotaryEmbedding,
    DeepseekV3TopkRouter,
    yarn_apply_mscale,
)
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, GptOssTopKRouter
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2RotaryEmbedding, MiniMaxM2TopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from dconv.arch import moe_configs as moe
from tests.arch.moe_classes import BY_NAME, CLASSES, small
from tests.arch.moe_published import (
    MINIMAX_M2,
    PUBLISHED,
    V2,
    V3,
    yarn,
)

ROUTERS = {
    moe.MIXTRAL: MixtralTopKRouter,
    moe.QWEN2_MOE: Qwen2MoeTopKRouter,
    moe.QWEN3_MOE: Qwen3MoeTopKRouter,
    moe.OLMOE: OlmoeTopKRouter,
    moe.MINIMAX_M2: MiniMaxM2TopKRouter,
    moe.GPT_OSS: GptOssTopKRouter,
    moe.DEEPSEEK_V2: DeepseekV2TopkRouter,
    moe.DEEPSEEK_V3: DeepseekV3TopkRouter,
}
#: (family, keys, whether mainline megatron-core computes it)
ROUTING = [
    (moe.MIXTRAL, {}, True),
    *((family, {"norm_topk_prob": norm}, True) for family in (moe.QWEN2_MOE, moe.QWEN3_MOE) for norm in (True, False)),
    (moe.OLMOE, {"norm_topk_prob": False}, True),
    (moe.MINIMAX_M2, {}, True),
    (moe.GPT_OSS, {}, True),
    (moe.DEEPSEEK_V2, {"topk_method": "greedy", "routed_scaling_factor": 2.0}, True),
    (moe.DEEPSEEK_V2, {"topk_method": "group_limited_greedy", "num_experts_per_tok": 2}, True),
    (moe.DEEPSEEK_V2, {"topk_method": "group_limited_greedy", "num_experts_per_tok": 4}, False),
    (moe.DEEPSEEK_V3, {"num_experts_per_tok": 4, "routed_scaling_factor": 2.5}, True),
    (moe.DEEPSEEK_V3, {"num_experts_per_tok": 3}, False),
    (moe.DEEPSEEK_V3, {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 3}, True),
]


@pytest.mark.parametrize(("family", "keys", "same"), ROUTING, ids=lambda it: getattr(it, "model_type", str(it)))
def test_megatron_core_routes_the_same(core, family, keys, same):
    """The args, given to megatron-core's routing function; where it differs, `needs` says so."""
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    torch.manual_seed(0)
    config = small(family, **keys)
    args = family.to_args(config.to_dict())
    router, tokens = ROUTERS[family](config), torch.randn(200, 32)
    bias = torch.randn(8) * 0.1 if args["moe_router_enable_expert_bias"] else None
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    if family is moe.DEEPSEEK_V3:
        router.e_score_correction_bias.copy_(bias)
    with torch.no_grad():
        logits, weights, chosen = router(tokens, bias) if family is moe.MINIMAX_M2 else router(tokens)
        expected = torch.zeros(200, 8).scatter(1, chosen, weights)
        found, _ = topk_routing_with_score_function(
            logits,
            args["moe_router_topk"],
            use_pre_softmax=args["moe_router_pre_softmax"],
            num_groups=args.get("moe_router_num_groups"),
            group_topk=args.get("moe_router_group_topk"),
            scaling_factor=args["moe_router_topk_scaling_factor"],
            score_function=args["moe_router_score_function"],
            expert_bias=bias,
        )
    assert torch.allclose(found, expected, atol=1e-6) is same
    assert (family.needs(config.to_dict()) == []) is (same and family not in (moe.OLMOE, moe.MINIMAX_M2))
    if not same:
        assert "groups of experts" in " ".join(family.needs(config.to_dict()))


def test_megatron_core_activates_gpt_oss_the_same(core):
    from megatron.core.fusions.fused_bias_geglu import quick_gelu

    config = small(moe.GPT_OSS, swiglu_limit=1.5)
    args, states = moe.GPT_OSS.to_args(config.to_dict()), torch.randn(20, 48) * 3
    assert args["quick_geglu"] is True
    limit, offset = args["activation_func_clamp_value"], args["glu_linear_offset"]
    gate, up = states[:, ::2].clamp(max=limit), states[:, 1::2].clamp(-limit, limit)
    torch.testing.assert_close(GptOssExperts(config)._apply_gate(states), quick_gelu(gate) * (up + offset))


@pytest.mark.parametrize("rope", [None, yarn(1.0), yarn(0.707), {"type": "yarn", "factor": 4.0}], ids=str)
@pytest.mark.parametrize("version", [2, 3])
def test_megatron_core_rotates_latents_the_same(core, rope, version):
    from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as theirs
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    family, hf = (moe.DEEPSEEK_V2, V2) if version == 2 else (moe.DEEPSEEK_V3, V3)
    hf = {**hf, "rope_scaling": rope}
    args, positions = family.to_args(hf), 40
    config = CLASSES[family].from_dict(json.loads(json.dumps(hf)))
    module = (DeepseekV2RotaryEmbedding if version == 2 else DeepseekV3RotaryEmbedding)(config)
    mscale = theirs._yarn_get_mscale(args["rotary_scaling_factor"], args["mscale_all_dim"])
    width = args["qk_head_dim"] + args["qk_pos_emb_head_dim"]
    ours = yarn_apply_mscale(config.rope_parameters, config.qk_head_dim**-0.5)
    assert mscale * mscale / math.sqrt(width) == pytest.approx(ours, rel=1e-12)
    if args["rope_type"] == "yarn":
        numbers = ("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
        embedding = theirs.YarnRotaryEmbedding(
            args["qk_pos_emb_head_dim"],
            rotary_base=args["rotary_base"],
            scaling_factor=args["rotary_scaling_factor"],
            use_cpu_initialization=True,
            **{name: args[name] for name in numbers},
        )
        angles, concentration = embedding.get_emb(positions)
        angles = angles[:, 0, 0, : module.inv_freq.numel()]
        assert concentration == pytest.approx(module.attention_scaling, rel=1e-12)
    else:
        embedding = RotaryEmbedding(
            args["qk_pos_emb_head_dim"], args["rotary_percent"], rotary_base=args["rotary_base"],
            use_cpu_initialization=True,
        )  # fmt: skip
        angles = embedding.get_freqs_non_repeated(positions)
        assert module.attention_scaling == 1.0
    expected = torch.outer(torch.arange(positions).float(), module.inv_freq)
    torch.testing.assert_close(angles, expected, rtol=1e-5, atol=1e-6)


def test_megatron_core_rotates_the_same_part(core):
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    config = CLASSES[moe.MINIMAX_M2].from_dict(copy.deepcopy(MINIMAX_M2))
    for hf in (MINIMAX_M2, config.to_dict()):
        args = moe.MINIMAX_M2.to_args(hf)
        module = RotaryEmbedding(
            args["kv_channels"], args["rotary_percent"], rotary_base=args["rotary_base"], use_cpu_initialization=True
        )
        torch.testing.assert_close(module.inv_freq, MiniMaxM2RotaryEmbedding(config).inv_freq)


@BY_NAME
def test_megatron_core_takes_the_args(core, name):
    """core_transformer_config_from_args: fields by their name, activation and experts under other names."""
    from megatron.core.fusions.fused_bias_geglu import quick_gelu
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    family, hf = PUBLISHED[name]
    args, facts = family.to_args(hf), family.facts(hf)
    kind = MLATransformerConfig if facts["mla"] else TransformerConfig
    fields = {f.name for f in dataclasses.fields(kind)}
    given = {key: value for key, value in args.items() if key in fields}
    activation = quick_gelu if args.get("quick_geglu") else torch.nn.functional.silu
    config = kind(
        **{**given, "gated_linear_unit": True, "activation_func": activation, "num_moe_experts": args["num_experts"]}
    )
    assert config.num_moe_experts == facts["experts"]
    assert config.moe_ffn_hidden_size == facts["moe_ffn"]
    assert config.num_query_groups == facts["groups"]
    own = {"qk_layernorm_full_width", "latent_norm_epsilon", "moe_router_group_score_topk"}
    unknown = {key for key in args if key.startswith(("moe_", "mtp_", "glu_", "activation_")) and key not in fields}
    assert unknown <= own
