"""Families with experts and with latent attention, judged by transformers' real classes."""

from __future__ import annotations

import contextlib
import copy
import json

import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from dconv.arch import moe_configs as moe
from dconv.arch.config import QWEN3, detect_by_args
from dconv.errors import Damaged, Refused
from tests.arch.moe_classes import BY_CLASS, BY_NAME, CLASSES, FAMILIES, small
from tests.arch.moe_published import (
    GPT_OSS_20B,
    PUBLISHED,
    V2_LITE,
    V3,
    yarn,
)


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
