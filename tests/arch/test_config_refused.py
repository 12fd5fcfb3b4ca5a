"""What args or a config.json cannot say, say wrongly, or say twice in two ways: refused, by name."""

from __future__ import annotations

import pytest
import torch

from dconv.arch.config import LLAMA, MISTRAL, QWEN2, QWEN3, detect_by_args
from dconv.errors import Damaged, Refused
from tests.arch.dense_published import (
    CODE_LLAMA_7B,
    FAMILIES,
    LLAMA3_ROPE,
    LLAMA_31_8B,
    MISTRAL_V01,
    QWEN3_06B,
    QWEN25_05B,
    YARN_ROPE,
    assert_same_function,
    loaded,
    windows,
)

REFUSED = {
    "dynamic": (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type dynamic"),
    "longrope": (
        QWEN2,
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        "long",
    ),
    "low_freq_factor": (LLAMA, {"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": 2.0}}, "low_freq_factor 2.0"),
    "original length": (
        LLAMA,
        {"rope_scaling": {**LLAMA3_ROPE, "original_max_position_embeddings": 4096}},
        "original_max_position_embeddings 4096",
    ),
    "original length beside": (
        LLAMA,
        {"original_max_position_embeddings": 4096},
        "original_max_position_embeddings 4096",
    ),
    "fractional linear": (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": 2.5}}, "rope factor 2.5"),
    "linear under one": (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, "rope factor 0.0"),
    "attention_factor": (LLAMA, {"rope_scaling": {**YARN_ROPE, "attention_factor": 1.5}}, "attention_factor 1.5"),
    "mrope": (QWEN2, {"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, "mrope_section"),
    "rope by layer type": (
        QWEN2,
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "one per layer type",
    ),
    "partial": (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "hidden_act": (LLAMA, {"hidden_act": "gelu"}, "hidden_act gelu"),
    "attention_bias": (LLAMA, {"attention_bias": True}, "qkv_bias True, out_bias True, mlp_bias False"),
    "mlp_bias": (LLAMA, {"mlp_bias": True}, "mlp_bias True"),
    "qwen3 attention_bias": (QWEN3, {"attention_bias": True}, "out_bias True"),
    "chunked": (QWEN2, {"layer_types": ["chunked_attention"] * 24}, "chunked_attention"),
    "window without a width": (QWEN2, {"layer_types": ["sliding_attention"] * 24}, "sliding_attention"),
    "mistral mixing": (
        MISTRAL,
        {"layer_types": ["sliding_attention", "full_attention"] * 16},
        "full layers",
    ),
}
BASE = {LLAMA: LLAMA_31_8B, MISTRAL: MISTRAL_V01, QWEN2: QWEN25_05B, QWEN3: QWEN3_06B}


@pytest.mark.parametrize("case", REFUSED)
def test_what_args_cannot_say_is_refused(case):
    family, change, named = REFUSED[case]
    hf = {**BASE[family], **change}
    with pytest.raises(Refused) as refusal:
        family.to_args(hf)
    assert named in refusal.value.found
    assert refusal.value.do
    assert family.unsayable(hf) == refusal.value.found.split("\n")
    args = family.to_args(hf, strict=False)  # the weights may still travel, with this config beside them
    assert args["num_layers"] == hf["num_hidden_layers"]
    assert family.check_pair(hf, args) == []
    assert family.check_pair(hf, {**args, "hidden_size": 64}) != []


@pytest.mark.parametrize(
    ("family", "change"),
    [
        (LLAMA, {"pretraining_tp": 4}),
        (LLAMA, {"rope_scaling": {}}),
        (QWEN2, {"use_sliding_window": False, "sliding_window": 7, "max_window_layers": 0}),
        (QWEN3, {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 28}),
        (LLAMA, {"partial_rotary_factor": 1.0}),
        (LLAMA, {"head_dim": None}),
        (LLAMA, {"hidden_act": "swish"}),
    ],
)
def test_what_has_no_effect_is_taken(family, change):
    hf = {**BASE[family], **change}
    expected = loaded(family, hf)
    assert windows(loaded(family, family.to_hf(family.to_args(hf))), family) == windows(expected, family)


def test_rope_scaling_wins_over_rope_parameters():
    both = {**LLAMA_31_8B, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}}
    assert_same_function(LLAMA, both, LLAMA_31_8B)
    assert LLAMA.to_args(both) == LLAMA.to_args(LLAMA_31_8B)
    new = {key: value for key, value in LLAMA_31_8B.items() if not key.startswith("rope_")}
    new["rope_parameters"] = {**LLAMA3_ROPE, "rope_theta": 500000.0}
    assert LLAMA.to_args({**new, "rope_theta": 3.0}) == LLAMA.to_args(LLAMA_31_8B)
    both_names = {**LLAMA_31_8B, "rope_scaling": {**LLAMA3_ROPE, "type": "default"}}
    assert_same_function(LLAMA, both_names, LLAMA_31_8B)
    assert LLAMA.to_args(both_names) == LLAMA.to_args(LLAMA_31_8B)


DAMAGED = [
    ("hidden_size", 0),
    ("hidden_size", "4096"),
    ("hidden_size", 4096.0),
    ("hidden_size", True),
    ("hidden_size", 4095),
    ("hidden_size", 10**30),
    ("num_hidden_layers", -1),
    ("num_hidden_layers", True),
    ("num_hidden_layers", 10**9),
    ("num_hidden_layers", None),
    ("num_key_value_heads", 5),
    ("num_attention_heads", []),
    ("head_dim", 7),
    ("vocab_size", {}),
    ("tie_word_embeddings", "false"),
    ("mlp_bias", 1),
]


@pytest.mark.parametrize(("key", "value"), DAMAGED, ids=str)
def test_damage_names_its_key(key, value):
    with pytest.raises(Damaged) as damage:
        LLAMA.facts({**LLAMA_31_8B, "head_dim": None, key: value})
    assert key in damage.value.where + damage.value.expected
    assert damage.value.found


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": "10000"},
        {"rope_theta": float("nan")},
        {"rope_scaling": "linear"},
        {"rope_scaling": {"rope_type": "linear"}},
        {"rope_scaling": {"rope_type": "linear", "factor": "2"}},
        {"rms_norm_eps": None},
        {"layer_types": ["full_attention"]},
        {"rope_scaling": {**YARN_ROPE, "beta_fast": []}},
        {"rope_scaling": {**YARN_ROPE, "original_max_position_embeddings": 1.5}},
    ],
    ids=str,
)
def test_damage_to_what_shapes_do_not_need(change):
    with pytest.raises(Damaged):
        LLAMA.to_args({**LLAMA_31_8B, **change})


def test_megatrons_own_namespace():
    """What Megatron-LM writes for itself: quirks, old and new names, dtype objects, padded vocabulary."""
    args = LLAMA.to_args(CODE_LLAMA_7B)
    for gone in ("vocab_size", "layernorm_epsilon", "layernorm_zero_centered_gamma", "bf16", "fp16"):
        del args[gone]
    args |= {"num_query_groups": 1, "group_query_attention": False, "padded_vocab_size": 32128, "kv_channels": None}
    args |= {"params_dtype": torch.bfloat16, "use_rotary_position_embeddings": False, "no_rope_freq": None}
    hf = LLAMA.to_hf(args)
    assert hf["num_key_value_heads"] == 32
    assert hf["head_dim"] == 128
    assert hf["vocab_size"] == 32128
    assert hf["torch_dtype"] == "bfloat16"
    assert hf["rms_norm_eps"] == 1e-5
    assert LLAMA.check_pair(CODE_LLAMA_7B, args) == []
    assert LLAMA.to_hf({**args, "vocab_size": 32016})["vocab_size"] == 32016
    assert LLAMA.to_hf({**args, "params_dtype": "torch.float16"})["torch_dtype"] == "float16"
    assert LLAMA.to_hf({**args, "params_dtype": None, "fp16": True})["torch_dtype"] == "float16"
    renamed = {**args, "layernorm_epsilon": 3e-6, "window_size": (-1, 0)}
    del renamed["norm_epsilon"]
    assert LLAMA.to_hf(renamed)["rms_norm_eps"] == 3e-6
    one_query_group = {**args, "group_query_attention": True}
    assert LLAMA.to_hf(one_query_group)["num_key_value_heads"] == 1
    unscaled = {k: v for k, v in args.items() if k != "rope_scaling_factor"}
    assert LLAMA.to_hf({**unscaled, "use_rope_scaling": True})["rope_scaling"] == LLAMA3_ROPE  # before the arg existed
    legacy = {**args, "position_embedding_type": "learned_absolute", "use_rotary_position_embeddings": True}
    assert LLAMA.matches_args(legacy) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"normalization": "LayerNorm"}, "normalization"),
        ({"swiglu": False}, "swiglu"),
        ({"num_experts": 8}, "num_experts"),
        ({"multi_latent_attention": True}, "multi_latent_attention"),
        ({"layernorm_zero_centered_gamma": True}, "apply_layernorm_1p"),
        ({"rotary_percent": 0.5}, "rotary_percent"),
        ({"rotary_interleaved": True}, "rotary_interleaved"),
        ({"position_embedding_type": "mrope", "use_rotary_position_embeddings": False}, "mrope"),
        ({"no_rope_freq": 4}, "no_rope_freq"),
        ({"use_mup": True}, "use_mup"),
        ({"softmax_type": "learnable"}, "softmax_type"),
        ({"use_rope_scaling": True, "rotary_seq_len_interpolation_factor": 2}, "llama3 and linear"),
        ({"add_bias_linear": False, "add_qkv_bias": True}, "out_bias is False"),
        ({"qk_layernorm": True}, "qk_layernorm"),
        ({"window_size": [15, 0]}, "window_size"),
    ],
    ids=str,
)
def test_what_a_family_cannot_say_of_args_is_refused(change, named):
    args = {**LLAMA.to_args(CODE_LLAMA_7B), **change}
    assert named in " ".join(LLAMA.matches_args(args))
    with pytest.raises(Refused, match="not a llama model") as refusal:
        LLAMA.to_hf(args)
    assert named in refusal.value.found


def test_detection():
    plain = LLAMA.to_args(CODE_LLAMA_7B)
    assert detect_by_args(plain, FAMILIES) is LLAMA
    assert detect_by_args({**plain, "add_bias_linear": True}, FAMILIES) is LLAMA
    assert detect_by_args({**plain, "add_qkv_bias": True}, FAMILIES) is QWEN2
    assert detect_by_args({**plain, "qk_layernorm": True}, FAMILIES) is QWEN3
    assert detect_by_args({**plain, "window_size": (15, 0)}, FAMILIES) is MISTRAL
    assert detect_by_args({**plain, "window_size": (15, 0), "qk_layernorm": True}, FAMILIES) is QWEN3
    for nobody in ({"add_qkv_bias": True, "qk_layernorm": True}, {"window_size": (9, 0), "window_attn_skip_freq": 2}):
        with pytest.raises(Refused, match="none of the families") as refusal:
            detect_by_args({**plain, **nobody}, FAMILIES)
        assert "not llama: " in refusal.value.found
    with pytest.raises(Refused):
        detect_by_args({"hidden_size": 8, "num_attention_heads": 2, "num_layers": 1}, FAMILIES)


@pytest.mark.parametrize(
    "change",
    [
        {"window_size": "all"},
        {"window_size": (4, 3)},
        {"window_size": (4, 0), "window_attn_skip_freq": [1]},
        {"num_layers": None},
        {"hidden_size": "big"},
        {"rotary_base": "x"},
        {"padded_vocab_size": None, "vocab_size": None},
        {"untie_embeddings_and_output_weights": "yes"},
    ],
    ids=str,
)
def test_damaged_args(change):
    with pytest.raises(Damaged):
        MISTRAL.to_hf({**MISTRAL.to_args(MISTRAL_V01), **change})


STALE = [
    ("hidden_size", 2048, "hidden_size 4096 != args.hidden_size 2048"),
    ("num_layers", 31, "num_hidden_layers 32 != args.num_layers 31"),
    ("ffn_hidden_size", 8, "intermediate_size 14336 != args.ffn_hidden_size 8"),
    ("num_query_groups", 4, "num_key_value_heads 8 != args.num_query_groups 4"),
    ("kv_channels", 64, "head_dim 128 != args.kv_channels 64"),
    ("rotary_base", 10000, "rope_theta 500000.0 != args.rotary_base 10000"),
    ("rope_scaling_factor", 32.0, "rope_scaling"),
    ("use_rope_scaling", False, "rope_scaling"),
    ("layernorm_epsilon", 1e-6, "rms_norm_eps 1e-05 != args.norm_epsilon 1e-06"),
    ("untie_embeddings_and_output_weights", False, "tie_word_embeddings False"),
    ("add_bias_linear", True, "attention_bias False"),
    ("add_qkv_bias", True, "attention_bias False"),
    ("qk_layernorm", True, "qk_layernorm is True"),
    ("window_size", (15, 0), "window_size"),
    ("normalization", "LayerNorm", "normalization is LayerNorm"),
    ("padded_vocab_size", 32000, "vocab_size 128256"),
    ("vocab_size", 128257, "vocab_size 128256"),
]


@pytest.mark.parametrize(("arg", "value", "line"), STALE)
def test_a_stale_config_is_noticed(arg, value, line):
    args = LLAMA.to_args(LLAMA_31_8B)
    for copy_of_it in ("norm_epsilon", "vocab_size"):
        del args[copy_of_it]
    lines = LLAMA.check_pair(LLAMA_31_8B, {**args, arg: value})
    assert any(found.startswith(line) for found in lines), lines
    assert LLAMA.check_pair(LLAMA_31_8B, {arg: value}) != []  # also where it is the only arg


def test_a_pair_may_differ_where_the_function_does_not():
    args = LLAMA.to_args(LLAMA_31_8B)
    harmless = {"max_position_embeddings": 4096, "seq_length": 4096, "attention_dropout": 0.1, "bf16": False}
    assert LLAMA.check_pair(LLAMA_31_8B, {**args, **harmless, "padded_vocab_size": 128512}) == []
    assert LLAMA.check_pair(LLAMA_31_8B, {}) == []
    # no flag beside it: the namespace is not Megatron-LM's own, its number counts
    assert LLAMA.check_pair(CODE_LLAMA_7B, {"num_query_groups": 8}) != []
    assert LLAMA.check_pair(CODE_LLAMA_7B, {"num_query_groups": 1, "group_query_attention": False}) == []
    assert LLAMA.check_pair(CODE_LLAMA_7B, {"position_embedding_type": "none"}) != []
    biased = {**LLAMA_31_8B, "attention_bias": True}
    stale = {**LLAMA.to_args(biased, strict=False), "add_qkv_bias": False}
    assert LLAMA.check_pair(biased, stale) == ["attention_bias True != args.add_qkv_bias False"]
