"""Mamba-2 and Nemotron-H: config.json and Megatron's args say the same model, or are refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dconv.arch.bamba import BAMBA
from dconv.arch.layouts import check_heads
from dconv.arch.mamba import MAMBA2, NEMOTRON_H
from dconv.arch.registry import detect
from dconv.errors import Damaged, Refused

#: nvidia/Nemotron-H-8B-Base-8K, with what concerns the function.
NEMOTRON: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "attention_bias": False,
    "attention_dropout": 0.0, "chunk_size": 128, "conv_kernel": 4, "expand": 2, "head_dim": 128, "hidden_size": 4096,
    "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    "initializer_range": 0.02, "intermediate_size": 21504, "layer_norm_epsilon": 1e-05, "mamba_head_dim": 64,
    "mamba_hidden_act": "silu", "mamba_num_heads": 128, "mamba_proj_bias": False, "max_position_embeddings": 8192,
    "mlp_bias": False, "mlp_hidden_act": "relu2", "n_groups": 8, "num_attention_heads": 32, "num_hidden_layers": 52,
    "num_key_value_heads": 8, "residual_in_fp32": False, "ssm_state_size": 128, "tie_word_embeddings": False,
    "time_step_limit": [0.0, math.inf], "time_step_max": 0.1, "time_step_min": 0.001, "torch_dtype": "bfloat16",
    "use_bias": False, "use_conv_bias": True, "vocab_size": 131072,
}  # fmt: skip
#: mistralai/Mamba-Codestral-7B-v0.1, the same.
CODESTRAL: dict[str, Any] = {
    "architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "chunk_size": 256, "conv_kernel": 4, "expand": 2,
    "head_dim": 64, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.1, "layer_norm_epsilon": 1e-05,
    "n_groups": 8, "num_heads": 128, "num_hidden_layers": 64, "residual_in_fp32": True, "state_size": 128,
    "tie_word_embeddings": False, "time_step_limit": [0.0, math.inf], "use_bias": False, "use_conv_bias": True,
    "vocab_size": 32768, "torch_dtype": "bfloat16",
}  # fmt: skip


#: ibm-ai-platform/Bamba-9B, the same.
BAMBA_9B: dict[str, Any] = {
    "architectures": ["BambaForCausalLM"], "model_type": "bamba", "attention_bias": False, "attention_dropout": 0.0,
    "attn_layer_indices": [9, 18, 27], "attn_rotary_emb": 64, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 14336, "mamba_chunk_size": 256, "mamba_conv_bias": True,
    "mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_expand": 2, "mamba_n_groups": 1,
    "mamba_n_heads": 128, "mamba_proj_bias": False, "max_position_embeddings": 4096, "mlp_bias": False,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 128256,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "hf"),
    [(NEMOTRON_H, NEMOTRON), (MAMBA2, CODESTRAL), (BAMBA, BAMBA_9B)],
    ids=["nemotron_h", "mamba2", "bamba"],
)
def test_args_alone_give_the_config_again(family: Any, hf: dict[str, Any]) -> None:
    args = family.config.to_args(hf)
    assert detect(None, args) is family
    back = family.config.to_hf(args)
    assert family.config.facts(back) == family.config.facts(hf)
    assert {key: hf[key] for key in back.keys() & hf.keys()} == {key: back[key] for key in back.keys() & hf.keys()}
    assert family.config.check_pair(hf, args) == []
    assert family.config.to_args(back) == args


def test_nemotron_h_in_words_that_megatron_takes() -> None:
    args = NEMOTRON_H.config.to_args(NEMOTRON)
    expected = {
        "hybrid_override_pattern": NEMOTRON["hybrid_override_pattern"], "is_hybrid_model": True, "num_layers": 52,
        "mamba_state_dim": 128, "mamba_head_dim": 64, "mamba_num_groups": 8, "mamba_num_heads": 128,
        "squared_relu": True, "position_embedding_type": "none", "num_query_groups": 8, "kv_channels": 128,
    }  # fmt: skip
    assert {key: args[key] for key in expected} == expected


def test_the_pattern_has_two_spellings_on_each_side() -> None:
    kinds = {"M": "mamba", "*": "full_attention", "-": "mlp"}
    listed = {**NEMOTRON, "layers_block_type": [kinds[letter] for letter in NEMOTRON["hybrid_override_pattern"]]}
    del listed["hybrid_override_pattern"], listed["num_hidden_layers"]
    args = NEMOTRON_H.config.to_args(listed)
    assert args == NEMOTRON_H.config.to_args(NEMOTRON)
    newer = {**args, "hybrid_override_pattern": None, "hybrid_layer_pattern": "M-M-|" + listed_pattern()[4:]}
    assert NEMOTRON_H.config.to_hf(newer)["hybrid_override_pattern"] == listed_pattern()


def listed_pattern() -> str:
    return str(NEMOTRON["hybrid_override_pattern"])


@pytest.mark.parametrize(
    ("family", "hf", "change", "word"),
    [
        (NEMOTRON_H, NEMOTRON, {"conv_kernel": 3}, "conv_kernel"),
        (NEMOTRON_H, NEMOTRON, {"time_step_limit": [0.001, 0.1]}, "time_step_limit"),
        (NEMOTRON_H, NEMOTRON, {"mlp_hidden_act": "silu"}, "mlp_hidden_act"),
        (NEMOTRON_H, NEMOTRON, {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers"),
        (NEMOTRON_H, NEMOTRON, {"mlp_bias": True}, "mlp_bias"),
        (MAMBA2, CODESTRAL, {"use_conv_bias": False}, "use_conv_bias"),
        (MAMBA2, CODESTRAL, {"use_bias": True}, "use_bias"),
        (MAMBA2, CODESTRAL, {"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_what_megatron_does_not_compute_is_refused(family: Any, hf: Any, change: dict[str, Any], word: str) -> None:
    with pytest.raises(Refused) as caught:
        family.config.to_args({**hf, **change})
    assert word in str(caught.value)


@pytest.mark.parametrize(
    ("family", "hf", "change"),
    [
        (NEMOTRON_H, NEMOTRON, {"hybrid_override_pattern": "M-G"}),
        (NEMOTRON_H, NEMOTRON, {"num_hidden_layers": 51}),
        (NEMOTRON_H, NEMOTRON, {"layers_block_type": ["mamba", "gated"]}),
        (NEMOTRON_H, NEMOTRON, {"n_groups": 7}),
        (MAMBA2, CODESTRAL, {"expand": 3}),
    ],
)
def test_what_cannot_be_a_model_is_damaged(family: Any, hf: Any, change: dict[str, Any]) -> None:
    with pytest.raises(Damaged):
        family.config.facts({**hf, **change})


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"hybrid_override_pattern": None, "is_hybrid_model": False, "spec": None}, "hybrid_override_pattern"),
        ({"hybrid_override_pattern": None, "hybrid_attention_ratio": 0.08}, "hybrid_attention_ratio"),
        ({"hybrid_override_pattern": "M-/M"}, "token predictors"),
        ({"position_embedding_type": "rope"}, "position_embedding_type"),
        ({"mamba_state_dim": None}, "mamba_state_dim"),
    ],
)
def test_args_of_another_model_are_not_taken(change: dict[str, Any], word: str) -> None:
    args = NEMOTRON_H.config.to_args(NEMOTRON)
    assert word in "\n".join(NEMOTRON_H.config.matches_args({**args, **change}))


def test_groups_of_a_mixer_must_divide() -> None:
    """B and C of one group lie on one rank, although their rows would divide."""
    facts = MAMBA2.config.facts({**CODESTRAL, "n_groups": 1})
    check_heads(facts, 1)
    with pytest.raises(Refused, match="Mamba heads") as caught:
        check_heads(facts, 2)
    assert "128 Mamba heads in 1 groups" in str(caught.value)


def test_a_layer_of_bamba_is_two_of_the_stack() -> None:
    args = BAMBA.config.to_args(BAMBA_9B)
    expected = {
        "num_layers": 64, "hybrid_override_pattern": "".join("*-" if at in (9, 18, 27) else "M-" for at in range(32)),
        "rotary_percent": 0.5, "position_embedding_type": "rope", "swiglu": True, "mamba_head_dim": 64,
        "ffn_hidden_size": 14336,
    }  # fmt: skip
    assert {key: args[key] for key in expected} == expected
    entries = list(BAMBA.entries(BAMBA.config.facts(BAMBA_9B)))
    names = {entry.fused.name: [spec.name for spec in entry.fused.specs] for entry in entries}
    attention = [f"model.layers.9.self_attn.{it}_proj.weight" for it in "qkv"]
    assert names["decoder.layers.18.self_attention.linear_qkv.weight"] == attention
    assert names["decoder.layers.19.mlp.linear_fc1.layer_norm_weight"] == ["model.layers.9.pre_ff_layernorm.weight"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mamba_proj_bias": True}, "mamba_proj_bias"),
        ({"attn_rotary_emb": 128}, "attn_rotary_emb"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type linear"),
        ({"partial_rotary_factor": 1.0}, "partial_rotary_factor"),
    ],
)
def test_what_a_stack_cannot_say_of_bamba_is_refused(change: dict[str, Any], word: str) -> None:
    with pytest.raises(Refused, match=word):
        BAMBA.config.to_args({**BAMBA_9B, **change})


@pytest.mark.parametrize("change", [{"attn_layer_indices": [32]}, {"mamba_d_head": 32}, {"attn_layer_indices": "9"}])
def test_a_bamba_that_cannot_be_is_damaged(change: dict[str, Any]) -> None:
    with pytest.raises(Damaged):
        BAMBA.config.facts({**BAMBA_9B, **change})


def test_a_stack_in_another_order_is_no_bamba() -> None:
    args = BAMBA.config.to_args({**BAMBA_9B, "num_hidden_layers": 2, "attn_layer_indices": [1]})
    assert BAMBA.config.matches_args(args) == []
    assert BAMBA.config.matches_args({**args, "hybrid_override_pattern": "M*--"})
