"""Families with experts and with latent attention, judged by transformers' real classes and by megatron-core."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
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
from dconv.arch.config import LLAMA, MISTRAL, QWEN2, QWEN3, detect_by_args
from dconv.errors import Damaged, Refused
from tests.arch.moe_published import (
    DEEPSEEK_MOE_16B,
    GPT_OSS_20B,
    MINIMAX_M2,
    MIXTRAL_8X7B,
    PUBLISHED,
    QWEN3_30B,
    V2,
    V2_LITE,
    V3,
    yarn,
)

FAMILIES = [LLAMA, MISTRAL, QWEN2, QWEN3, *moe.CONFIGS]
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


@pytest.fixture
def core():
    megatron_cpu = pytest.importorskip("dconv.export.megatron_cpu")
    megatron_cpu.cpu_patches()
    import megatron.core

    return megatron.core


def same_yarn(rope):
    """A rope table without its two spellings of one name."""
    return rope and {key: value for key, value in rope.items() if key not in ("type", "rope_type")}


@BY_NAME
def test_published(name):
    family, hf = PUBLISHED[name]
    args = json.loads(json.dumps(family.to_args(hf)))  # plain values only
    back = family.to_hf(args)
    for key, value in hf.items():
        if key == "rope_scaling":
            assert same_yarn(back[key]) == same_yarn(value)
        elif key not in ("clip_qkv",):  # null, refused otherwise
            assert back[key] == value, key
    assert family.facts(back) == family.facts(hf)
    assert family.to_args(back) == args
    assert family.check_pair(hf, args) == []
    assert family.unsayable(hf) == []


@BY_NAME
def test_published_is_no_other_family(name):
    family, hf = PUBLISHED[name]
    args = family.to_args(hf)
    twins = ["deepseek"] if family is moe.MIXTRAL else []  # with no shared expert and no dense layer, the same function
    assert [one.model_type for one in FAMILIES if one.matches_args(args) == []] == [family.model_type, *twins]
    assert detect_by_args(args, FAMILIES) is family


def test_published_numbers():
    said = {name: family.to_args(hf) for name, (family, hf) in PUBLISHED.items()}
    mixtral, qwen2, qwen3 = said["Mixtral-8x7B"], said["Qwen1.5-MoE-A2.7B"], said["Qwen3-30B-A3B"]
    assert (mixtral["num_experts"], mixtral["moe_router_topk"], mixtral["moe_layer_freq"]) == (8, 2, 1)
    assert (mixtral["moe_ffn_hidden_size"], mixtral["moe_router_pre_softmax"]) == (14336, False)
    assert (qwen2["moe_shared_expert_intermediate_size"], qwen2["moe_shared_expert_gate"]) == (5632, True)
    assert (qwen2["moe_router_pre_softmax"], qwen2["add_qkv_bias"]) == (True, True)
    assert (qwen3["moe_router_pre_softmax"], qwen3["qk_layernorm"], qwen3["ffn_hidden_size"]) == (False, True, 6144)
    assert said["MiniMax-M2"]["rotary_percent"] == 0.5
    assert said["MiniMax-M2"]["moe_router_enable_expert_bias"] is True
    oss = said["gpt-oss-20b"]
    assert (oss["softmax_type"], oss["window_size"], oss["window_attn_skip_freq"]) == (
        "learnable",
        [127, 0],
        [1, 0] * 12,
    )
    assert (oss["quick_geglu"], oss["glu_linear_offset"], oss["activation_func_clamp_value"]) == (True, 1.0, 7.0)
    assert (oss["position_embedding_type"], oss["yarn_correction_range_round_to_int"]) == ("yarn", False)
    v1, v2, v3 = said["deepseek-moe-16b"], said["DeepSeek-V2"], said["DeepSeek-V3"]
    assert v1["moe_layer_freq"] == [0] + [1] * 27
    assert (v1["moe_shared_expert_intermediate_size"], v1["moe_shared_expert_gate"]) == (2816, False)
    assert (v2["moe_router_num_groups"], v2["moe_router_group_topk"]) == (8, 3)
    assert (v3["moe_router_num_groups"], v3["moe_router_group_topk"]) == (8, 4)
    assert (v3["moe_router_score_function"], v3["moe_router_topk_scaling_factor"]) == ("sigmoid", 2.5)
    assert (v3["mtp_num_layers"], v3["multi_latent_attention"], v3["q_lora_rank"]) == (1, True, 1536)
    assert (v3["rope_type"], v3["rotary_scaling_factor"], v3["mscale_all_dim"]) == ("yarn", 40.0, 1.0)
    assert (v3["qk_head_dim"], v3["qk_pos_emb_head_dim"], v3["kv_lora_rank"]) == (128, 64, 512)
    assert said["DeepSeek-V2-Lite"]["q_lora_rank"] is None
    assert said["DeepSeek-V2-Lite"]["moe_router_num_groups"] is None
    assert (said["Moonlight-16B-A3B"]["rope_type"], said["Moonlight-16B-A3B"]["mtp_num_layers"]) == ("rope", None)


def test_facts_of_v3():
    facts = moe.DEEPSEEK_V3.facts(V3)
    moe_layers = (False,) * 3 + (True,) * 58
    assert facts["moe"] == facts["shared"] == facts["expert_bias"] == moe_layers
    assert facts["dense"] == tuple(not here for here in moe_layers)
    assert not any(facts["shared_gate"] + facts["router_bias"] + facts["expert_mlp_bias"])
    assert facts["uniform_layers"] is False
    assert (facts["q_rows"], facts["kv_a_rows"], facts["kv_b_rows"], facts["o_columns"]) == (24576, 576, 32768, 16384)
    assert (facts["q_is_low_rank"], facts["q_is_full"], facts["q_lora"], facts["mtp"]) == (True, False, 1536, 1)
    assert (facts["experts"], facts["moe_ffn"], facts["shared_ffn"], facts["ffn"]) == (256, 2048, 2048, 18432)
    lite = moe.DEEPSEEK_V2.facts(V2_LITE)
    assert (lite["q_is_low_rank"], lite["q_is_full"], lite["q_lora"]) == (False, True, 0)
    oss = moe.GPT_OSS.facts(GPT_OSS_20B)
    assert oss["router_bias"] == oss["expert_mlp_bias"] == (True,) * 24
    assert (oss["sinks"], oss["uniform_layers"], oss["shared_ffn"], oss["mla"]) == (True, True, 0, False)
    assert QWEN3.facts({})["uniform_layers"] is True


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


@BY_CLASS
def test_defaults_are_those_of_the_real_class(family):
    needed = {"num_experts_per_tok": 6} if family is moe.DEEPSEEK_V2 else {}  # its class has none
    real = CLASSES[family](**needed).to_dict()
    elsewhere = {"rope_theta", "rope_parameters", "num_experts"}  # one table, and another name, in this version
    for key, value in family.defaults.items():
        if key == "sliding_window" and family in (moe.QWEN2_MOE, moe.QWEN3_MOE):
            continue  # the class clears it while use_sliding_window is false
        assert value is None or key in elsewhere or real[key] == value, key
    assert family.facts(needed) == family.facts(real)
    assert family.to_args(needed) == family.to_args(real)


@BY_CLASS
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_round_trip(family, data):
    draw = data.draw
    keys = {
        "vocab_size": draw(st.integers(1, 200000)),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "tie_word_embeddings": draw(st.booleans()),
        "dtype": draw(st.sampled_from(["bfloat16", "float32"])),
        "num_experts_per_tok": draw(st.integers(2, 4)),
    }
    if family in (moe.QWEN2_MOE, moe.QWEN3_MOE):
        keys["norm_topk_prob"] = draw(st.booleans())
        keys["decoder_sparse_step"] = draw(st.integers(1, 5))
        keys["mlp_only_layers"] = draw(st.lists(st.integers(0, 3), unique=True))
    if family is moe.OLMOE:
        keys["norm_topk_prob"] = draw(st.booleans())
    if family in (moe.DEEPSEEK_V2, moe.DEEPSEEK_V3):
        keys["first_k_dense_replace"] = draw(st.integers(0, 4))
        keys["q_lora_rank"] = draw(st.none() | st.integers(1, 9))
        keys["n_shared_experts"] = draw(st.integers(1, 3))
        keys["routed_scaling_factor"] = draw(st.sampled_from([1.0, 2.5]))
        keys["n_group"] = draw(st.sampled_from([1, 2, 4]))
        keys["topk_group"] = draw(st.integers((keys["n_group"] + 1) // 2, keys["n_group"]))  # at least four experts
        scaled = {**same_yarn(yarn(draw(st.sampled_from([0.707, 1.0])))), "rope_type": "yarn", "rope_theta": 5e4}
        keys["rope_parameters"] = draw(st.sampled_from([scaled, {"rope_type": "default", "rope_theta": 1e4}]))
    if family is moe.DEEPSEEK_V2:
        keys["topk_method"] = draw(st.sampled_from(["greedy", "group_limited_greedy"]))
    hf = small(family, **keys).to_dict()
    args = json.loads(json.dumps(family.to_args(hf)))
    back = family.to_hf(args)
    assert family.facts(back) == family.facts(hf)
    assert family.to_args(back) == args
    assert family.check_pair(hf, args) == []
    assert family.needs(back) == family.needs(hf)
    one, other = CLASSES[family].from_dict(copy.deepcopy(hf)), CLASSES[family].from_dict(json.loads(json.dumps(back)))
    for key in ("num_experts_per_tok", "hidden_act", "rms_norm_eps", "attention_bias", "routed_scaling_factor"):
        assert getattr(one, key, None) == getattr(other, key, None), key
    assert family.to_args(other.to_dict()) == args


def shapes(config):
    """Parameters and buffers that transformers really makes."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@BY_CLASS
def test_facts_follow_the_real_model(family):
    config = small(family, **({"mlp_only_layers": [2]} if family in (moe.QWEN2_MOE, moe.QWEN3_MOE) else {}))
    names, facts = shapes(config), family.facts(config.to_dict())
    for layer in range(4):
        at = f"model.layers.{layer}."
        has = {fact: any(name.startswith(at) and part in name for name in names) for fact, part in (
            ("moe", ".experts.gate_up_proj"),
            ("dense", "mlp.gate_proj.weight"),
            ("shared", "shared_expert"),
            ("shared_gate", "shared_expert_gate"),
            ("router_bias", "router.bias"),
            ("expert_bias", "e_score_correction_bias"),
            ("expert_mlp_bias", "down_proj_bias"),
        )}  # fmt: skip
        assert {fact: facts[fact][layer] for fact in has} == has
        assert facts["sinks"] is (at + "self_attn.sinks" in names)
    last = "model.layers.3."
    experts = next(shape for name, shape in names.items() if name.startswith(last) and "experts.down_proj" in name)
    assert experts[0] == facts["experts"]
    assert sorted(experts[1:]) == sorted((facts["hidden"], facts["moe_ffn"]))
    if facts["shared_ffn"]:
        shared = next(s for n, s in names.items() if n.startswith(last) and "shared_expert" in n and "down_proj" in n)
        assert shared == (facts["hidden"], facts["shared_ffn"])
    attention = last + "self_attn."
    assert names[attention + "o_proj.weight"][1] == facts["o_columns" if facts["mla"] else "q"]
    if facts["mla"]:
        assert names[attention + "q_a_proj.weight"] == (facts["q_lora"], facts["hidden"])
        assert names[attention + "q_b_proj.weight"] == (facts["q_rows"], facts["q_lora"])
        assert names[attention + "kv_a_proj_with_mqa.weight"] == (facts["kv_a_rows"], facts["hidden"])
        assert names[attention + "kv_b_proj.weight"] == (facts["kv_b_rows"], facts["kv_lora"])
        full = shapes(small(family, q_lora_rank=None))
        assert full[attention + "q_proj.weight"] == (facts["q_rows"], facts["hidden"])
    else:
        assert (attention + "q_norm.weight" in names) is facts["qk_norm"]
        assert (attention + "k_proj.bias" in names) is facts["qkv_bias"]
        assert (attention + "o_proj.bias" in names) is facts["out_bias"]
    if family in (moe.OLMOE, moe.MINIMAX_M2):
        assert names[attention + "q_norm.weight"] == (facts["q"],)
        assert names[attention + "k_norm.weight"] == (facts["kv"],)


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


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@BY_NAME
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_junk_meets_the_closed_set_of_errors(name, data):
    family, hf = PUBLISHED[name]
    args = family.to_args(hf)
    side = data.draw(st.sampled_from(["config", "args"]))
    where = hf if side == "config" else args
    broken = {**where, data.draw(st.sampled_from(sorted(where))): data.draw(JUNK)}
    with contextlib.suppress(Damaged, Refused):
        if side == "args":
            family.facts(family.to_hf(broken))
        else:
            family.to_args(broken)
    with contextlib.suppress(Damaged, Refused):
        family.check_pair(*((hf, broken) if side == "args" else (broken, args)))
    with contextlib.suppress(Damaged, Refused):
        family.needs(broken if side == "config" else hf)
