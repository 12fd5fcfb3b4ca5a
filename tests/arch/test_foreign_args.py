"""Args with which Megatron computes, or stores, something that config.json cannot say: refused, whatever the family."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from dconv.arch.registry import detect, families
from dconv.errors import Damaged, Refused
from tests.models import config_of, facts_of

#: arg -> a value of another function. From ``TransformerConfig`` and Megatron-LM's parser, 2026-08.
EVERYWHERE: dict[str, object] = {
    "attention_output_gate": True,
    "qk_l2_norm": True,
    "no_rope_freq": 4,
    "experimental_attention_variant": "gated_delta_net",
    "heterogeneous_layers_config_path": "layers.json",
    "heterogeneous_layers_config_encoded_json": "{}",
    "use_mup": True,
    "rope_scaling": {"rope_type": "longrope"},
    "vision_model_type": "siglip",
    "latent_rotary_halves": 2,
    "block_ffn": {"ffn_type": "block"},
    "scale_emb": 7.5,
    "residual_multiplier": 0.3,
    "final_logit_softcapping": 7.0,
    "embedding_scale": 3.0,
    "rope_local_base_freq": 77.0,
}
OF_EXPERTS: dict[str, object] = {
    "moe_expert_capacity_factor": 1.0,
    "moe_expert_rank_capacity_factor": 1.5,
    "moe_apply_probs_on_input": True,
    "moe_mlp_glu_interleave_size": 32,
    "moe_shared_expert_glu_interleave_size": 32,
    "moe_router_load_balancing_type": "sinkhorn",
    "moe_router_topk_limited_devices": 2,
}
CASES = [(name, arg, value) for name in families() for arg, value in EVERYWHERE.items()] + [
    (name, arg, value)
    for name, family in families().items()
    if facts_of(family, config_of(family)).get("experts")
    for arg, value in (*OF_EXPERTS.items(), ("moe_router_load_balancing_type", ["aux_loss", "quantile_balancing"]))
]


@pytest.mark.parametrize(("name", "arg", "value"), CASES)
def test_a_foreign_arg_is_refused_or_said(name: str, arg: str, value: Any) -> None:
    """By name; or it is this family's own, and config.json says it."""
    family = families()[name].config
    args = family.to_args(config_of(families()[name]))
    before = copy.deepcopy(family.to_hf(args))
    try:
        after = family.to_hf({**args, arg: value})
    except (Refused, Damaged) as refusal:
        assert arg in str(refusal)
    else:
        assert after != before


#: What a Megatron-LM namespace that says little means: (what it says, what its config.json says).
SIZES = {"num_layers": 2, "hidden_size": 192, "num_attention_heads": 4, "padded_vocab_size": 128,
         "max_position_embeddings": 64, "seq_length": 64}  # fmt: skip
PLAIN = {**SIZES, "group_query_attention": False, "attention_dropout": 0.0}
LLAMA = {**PLAIN, "normalization": "RMSNorm", "position_embedding_type": "rope", "swiglu": True,
         "add_bias_linear": False, "untie_embeddings_and_output_weights": True}  # fmt: skip


def test_what_a_namespace_leaves_unsaid_has_megatrons_defaults() -> None:
    """Defaults of ``arguments.py``: LayerNorm, learned positions, biases, 1e-5, GELU of 4 x hidden, tied."""
    family = detect(None, PLAIN)
    assert family.name == "gpt2"
    hf = family.config.to_hf(PLAIN)
    said = {key: hf[key] for key in ("n_inner", "layer_norm_epsilon", "activation_function", "tie_word_embeddings")}
    assert said == {
        "n_inner": 768, "layer_norm_epsilon": 1e-5, "activation_function": "gelu", "tie_word_embeddings": True,
    }  # fmt: skip


def test_a_llama_that_leaves_widths_unsaid() -> None:
    family = detect(None, LLAMA)
    assert family.name == "llama"
    hf = family.config.to_hf(LLAMA)
    # validate_args: two thirds of 4 x hidden, whole multiples of 64
    assert (hf["intermediate_size"], hf["head_dim"], hf["num_key_value_heads"]) == (512, 48, 4)
    assert (hf["rope_theta"], hf["rms_norm_eps"]) == (10000.0, 1e-5)
    assert hf["torch_dtype"] == "float32"
    assert family.config.to_args(hf)["seq_length"] == 64
    assert family.config.to_hf({**LLAMA, "params_dtype": "torch.bfloat16"})["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"add_bias_linear": None}, "llama"),  # it has biases, then
        ({"add_bias_linear": None, "disable_bias_linear": True}, "llama"),
        ({"add_qkv_bias": True}, "qwen2"),
        ({"qk_layernorm": True}, "qwen3"),
        ({"window_size": [15, 0]}, "mistral"),
        ({"window_size": [-1, -1]}, "llama"),
        ({"window_size": [15, 0], "window_attn_skip_freq": 2, "add_qkv_bias": True, "num_layers": 4}, "qwen2"),
    ],
)
def test_the_family_of_a_namespace(change: dict[str, object], expected: str) -> None:
    assert detect(None, {**LLAMA, **change}).name == expected


@pytest.mark.parametrize(
    "change",
    [
        {"normalization": None},
        {"position_embedding_type": None},
        {"swiglu": False},
        {"window_size": [15, 0], "window_attn_skip_freq": 2},  # and no bias
        {"add_qkv_bias": True, "qk_layernorm": True},
        {"rotary_percent": 0.5, "rotary_interleaved": True, "add_qkv_bias": True, "qk_layernorm": True},
        {"num_experts": 8, "moe_router_topk": 2, "multi_latent_attention": True},
    ],
)
def test_a_default_that_makes_it_nobodys_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(Refused):
        detect(None, {**LLAMA, **change})
