"""What a family with experts cannot say, says wrongly, or what mainline Megatron lacks: by name."""

from __future__ import annotations

import pytest

from dconv.arch import moe_configs as moe
from dconv.errors import Damaged, Refused
from tests.arch.moe_published import (
    DEEPSEEK_MOE_16B,
    MIXTRAL_8X7B,
    PUBLISHED,
    QWEN3_30B,
    yarn,
)

NEEDS = {
    "Mixtral-8x7B": [],
    "gpt-oss-20b": [],
    "DeepSeek-V3": [],
    "DeepSeek-V2-Lite": [],
    "OLMoE-1B-7B": ["query and key over all heads"],
    "MiniMax-M2": ["query and key over all heads"],
    "DeepSeek-V2": ["groups of experts judged by their best 1"],
    "Moonlight-16B-A3B": ["an epsilon of 1e-06 in the norms of the latents"],
}


@pytest.mark.parametrize("name", NEEDS)
def test_what_mainline_lacks_is_said(name):
    family, hf = PUBLISHED[name]
    lines = family.needs(hf)
    assert len(lines) == len(NEEDS[name])
    assert all(words in line for words, line in zip(NEEDS[name], lines, strict=True))


REFUSED = {
    "topk 1": ("Mixtral-8x7B", {"num_experts_per_tok": 1}, "num_experts_per_tok 1"),
    "more than there are": ("Mixtral-8x7B", {"num_experts_per_tok": 9}, "there are 8 experts"),
    "window by default": (
        "Qwen1.5-MoE-A2.7B", {"use_sliding_window": True, "sliding_window": 64}, "layer_types is absent",
    ),
    "qwen3 bias": ("Qwen3-30B-A3B", {"attention_bias": True}, "out_bias True"),
    "clip_qkv": ("OLMoE-1B-7B", {"clip_qkv": 8.0}, "clip_qkv 8.0"),
    "norms of each head": ("MiniMax-M2", {"qk_norm_type": "per_head"}, "qk_norm_type"),
    "shared expert": ("MiniMax-M2", {"shared_intermediate_size": 64}, "shared_intermediate_size"),
    "gain": ("gpt-oss-20b", {"swiglu_alpha": 1.0}, "swiglu_alpha"),
    "no attention bias": ("gpt-oss-20b", {"attention_bias": False}, "mlp_bias True"),
    "experts in some layers": ("deepseek-moe-16b", {"moe_layer_freq": 2}, "moe_layer_freq"),
    "sigmoid in v1": ("deepseek-moe-16b", {"scoring_func": "sigmoid"}, "scoring_func"),
    "v2 normalised": ("DeepSeek-V2", {"norm_topk_prob": True}, "norm_topk_prob"),
    "v2 method": ("DeepSeek-V2", {"topk_method": "noaux_tc"}, "topk_method noaux_tc"),
    "groups do not divide": ("DeepSeek-V2", {"n_group": 7}, "n_group 7"),
    "latent bias": ("DeepSeek-V3", {"attention_bias": True}, "attention_bias"),
    "halves": ("DeepSeek-V3", {"rope_interleave": False}, "rope_interleave"),
    "unnormalised sigmoid": ("DeepSeek-V3", {"norm_topk_prob": False}, "norm_topk_prob False"),
    "grouped latents": ("DeepSeek-V3", {"num_key_value_heads": 8}, "num_key_value_heads 8"),
    "linear": ("DeepSeek-V3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type linear"),
    "untruncated": ("DeepSeek-V3", {"rope_scaling": {**yarn(1.0), "truncate": False}}, "truncate False"),
    "one multiplier": (
        "DeepSeek-V3", {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale_all_dim": 1.0}}, "without its partner",
    ),
    "attention_factor": ("DeepSeek-V3", {"rope_scaling": {**yarn(1.0), "attention_factor": 2.0}}, "attention_factor"),
    "no factor": ("DeepSeek-V3", {"routed_scaling_factor": 0.0}, "routed_scaling_factor 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_args_cannot_say_is_refused(case):
    name, change, named = REFUSED[case]
    family, hf = PUBLISHED[name]
    hf = {**hf, **change}
    with pytest.raises(Refused) as refusal:
        family.to_args(hf)
    assert named in refusal.value.found
    args = family.to_args(hf, strict=False)  # the weights may still travel, with this config beside them
    assert family.check_pair(hf, args) == []
    assert family.check_pair(hf, {**args, "hidden_size": 64}) != []


#: Args of a published model with one changed: what its family says about it.
ODD = [
    ("Mixtral-8x7B", {"num_experts": None}, "num_experts is not set"),
    ("Mixtral-8x7B", {"moe_router_pre_softmax": True}, "moe_router_pre_softmax"),
    ("Mixtral-8x7B", {"moe_shared_expert_intermediate_size": 64}, "shares no expert"),
    ("Mixtral-8x7B", {"moe_layer_freq": 2}, "moe_layer_freq"),
    ("Mixtral-8x7B", {"moe_router_load_balancing_type": "sinkhorn"}, "sinkhorn"),
    ("Mixtral-8x7B", {"moe_router_load_balancing_type": ["aux_loss", "sinkhorn"]}, "sinkhorn"),
    ("Mixtral-8x7B", {"moe_expert_capacity_factor": 1.25}, "moe_expert_capacity_factor"),
    ("Mixtral-8x7B", {"moe_latent_size": 64}, "moe_latent_size"),
    ("Mixtral-8x7B", {"moe_router_topk_scaling_factor": 2.0}, "moe_router_topk_scaling_factor"),
    ("Mixtral-8x7B", {"moe_router_num_groups": 4, "moe_router_group_topk": 2}, "moe_router_num_groups"),
    ("Mixtral-8x7B", {"moe_router_topk": 1}, "moe_router_topk is 1"),
    ("Mixtral-8x7B", {"moe_router_score_function": "sigmoid"}, "moe_router_score_function"),
    ("Mixtral-8x7B", {"qk_layernorm_full_width": True}, "qk_layernorm_full_width"),
    ("Qwen1.5-MoE-A2.7B", {"moe_shared_expert_gate": False}, "moe_shared_expert_gate"),
    ("Qwen1.5-MoE-A2.7B", {"moe_shared_expert_intermediate_size": None}, "has a shared expert"),
    ("deepseek-moe-16b", {"moe_shared_expert_intermediate_size": 1409}, "no multiple"),
    ("deepseek-moe-16b", {"moe_layer_freq": [1, 0] * 14}, "after the first dense ones"),
    ("DeepSeek-V3", {"moe_router_topk": 4}, "judges a group by its best 2"),
    ("DeepSeek-V3", {"norm_epsilon": 1e-5, "layernorm_epsilon": 1e-5}, "norms of the latents"),
    ("DeepSeek-V3", {"qk_layernorm": False}, "qk_layernorm"),
    ("DeepSeek-V3", {"mscale": 0.5, "mscale_all_dim": 0.0}, "transformers wants both"),
    ("DeepSeek-V3", {"rotary_interleaved": True}, "rotary_interleaved"),
    ("DeepSeek-V3", {"rope_type": "rope"}, "mscale_all_dim scales the softmax"),
    (
        "DeepSeek-V3",
        {"use_rotary_position_embeddings": False, "position_embedding_type": "learned_absolute"},
        "not rope",
    ),
    ("gpt-oss-20b", {"activation_func_clamp_value": None}, "activation_func_clamp_value is not set"),
    ("gpt-oss-20b", {"glu_linear_offset": 0.0}, "glu_linear_offset"),
    ("gpt-oss-20b", {"softmax_type": "vanilla"}, "softmax_type"),
]


@pytest.mark.parametrize(("name", "change", "named"), ODD, ids=str)
def test_what_a_family_cannot_say_of_args_is_refused(name, change, named):
    family, hf = PUBLISHED[name]
    args = {**family.to_args(hf), **change}
    assert named in " ".join(family.matches_args(args))
    with pytest.raises(Refused) as refusal:
        family.to_hf(args)
    assert named in refusal.value.found


def test_megatrons_own_namespace():
    """Args as a training run writes them: own names absent, widths left to their defaults, a pattern as a step."""
    args = moe.MIXTRAL.to_args(MIXTRAL_8X7B) | {"moe_ffn_hidden_size": None, "moe_router_topk_scaling_factor": None}
    assert moe.MIXTRAL.to_hf(args)["intermediate_size"] == 14336
    assert moe.MIXTRAL.to_hf({**args, "moe_ffn_hidden_size": 96})["intermediate_size"] == 96
    step = moe.QWEN3_MOE.to_args(QWEN3_30B) | {"num_layers": 4, "moe_layer_freq": 2}
    assert moe.QWEN3_MOE.facts(moe.QWEN3_MOE.to_hf(step))["moe"] == (True, False, True, False)
    by_two = moe.QWEN3_MOE.to_hf({**step, "moe_layer_freq": [0, 1, 0, 1]})
    assert (by_two["decoder_sparse_step"], by_two["mlp_only_layers"]) == (2, [])
    unshared = moe.DEEPSEEK.to_args({**DEEPSEEK_MOE_16B, "n_shared_experts": None})
    assert moe.DEEPSEEK.to_hf(unshared)["n_shared_experts"] == 0  # transformers' classes of V2 and V3 take no null


STALE = [
    ("Mixtral-8x7B", {"num_experts": 4}, "num_local_experts 8 != args.num_experts 4"),
    ("Mixtral-8x7B", {"moe_router_topk": 3}, "num_experts_per_tok 2 != args.moe_router_topk 3"),
    ("Qwen3-30B-A3B", {"moe_ffn_hidden_size": 96}, "moe_intermediate_size 768"),
    ("Qwen3-30B-A3B", {"moe_router_pre_softmax": True}, "norm_topk_prob True"),
    ("Qwen1.5-MoE-A2.7B", {"moe_shared_expert_intermediate_size": 96}, "shared_expert_intermediate_size 5632"),
    ("DeepSeek-V3", {"moe_layer_freq": [0] * 4 + [1] * 57}, "first_k_dense_replace 3"),
    ("DeepSeek-V3", {"kv_lora_rank": 96}, "kv_lora_rank 512 != args.kv_lora_rank 96"),
    ("DeepSeek-V3", {"q_lora_rank": None}, "q_lora_rank 1536 != args.q_lora_rank None"),
    ("DeepSeek-V3", {"rotary_scaling_factor": 32.0}, "rope_scaling"),
    ("DeepSeek-V3", {"mtp_num_layers": None}, "num_nextn_predict_layers 1"),
    ("DeepSeek-V3", {"moe_router_topk_scaling_factor": 1.0}, "routed_scaling_factor 2.5"),
    ("gpt-oss-20b", {"activation_func_clamp_value": 5.0}, "swiglu_limit 7.0"),
    ("MiniMax-M2", {"rotary_percent": 1.0}, "rotary_dim 64"),
]


@pytest.mark.parametrize(("name", "change", "line"), STALE, ids=str)
def test_a_stale_config_is_noticed(name, change, line):
    family, hf = PUBLISHED[name]
    lines = family.check_pair(hf, {**family.to_args(hf), **change})
    assert any(found.startswith(line) for found in lines), lines


DAMAGED = [
    ("Mixtral-8x7B", "num_local_experts", 0),
    ("Mixtral-8x7B", "num_local_experts", 10**6),
    ("Qwen3-30B-A3B", "decoder_sparse_step", 0),
    ("Qwen3-30B-A3B", "mlp_only_layers", [0.5]),
    ("Qwen3-30B-A3B", "moe_intermediate_size", "768"),
    ("DeepSeek-V3", "first_k_dense_replace", None),
    ("DeepSeek-V3", "qk_rope_head_dim", 63),
    ("DeepSeek-V3", "v_head_dim", 0),
    ("DeepSeek-V3", "num_nextn_predict_layers", -1),
]


@pytest.mark.parametrize(("name", "key", "value"), DAMAGED, ids=str)
def test_damage_names_its_key(name, key, value):
    family, hf = PUBLISHED[name]
    with pytest.raises(Damaged) as damage:
        family.facts({**hf, key: value})
    assert key in damage.value.where
