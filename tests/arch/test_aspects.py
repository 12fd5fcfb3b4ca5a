"""What a later family can declare without new code: each aspect goes both ways, and another family refuses it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP

from dconv.arch.activation import GEGLU
from dconv.arch.attention import Grouped, Scaled, Window
from dconv.arch.carried import Carried
from dconv.arch.config import COMMON, LLAMA
from dconv.arch.decoder import DecoderConfig
from dconv.arch.rotary import Rope
from dconv.arch.translate import Config
from dconv.errors import Damaged, Refused
from tests.arch.moe_classes import FAMILIES

CAPS = {"attn_logit_softcapping": "tanh caps the scores", "final_logit_softcapping": "tanh caps the logits"}
#: Everything at once, as Gemma 2 has most of it.
FULL = DecoderConfig(
    "full",
    "FullForCausalLM",
    {**COMMON, "sliding_window": 64, "partial_rotary_factor": 0.5},
    window=Window("types", every=2),
    rope=Rope(part="partial_rotary_factor", interleaved=True),
    activation=GEGLU,
    more=(Carried(CAPS), Scaled("query_pre_attn_scalar", -0.5)),
    constants={"apply_layernorm_1p": True, "embedding_scale": "sqrt(hidden_size)"},
    norm_eps="layer_norm_eps",
    lacking=("embeddings multiplied by the square root of hidden_size",),
)
HF: dict[str, Any] = {
    "architectures": ["FullForCausalLM"],
    "model_type": "full",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 100,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-4,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 224,
    "rope_theta": 10000.0,
}


def test_both_ways():
    args = FULL.to_args(HF)
    back = FULL.to_hf(args)
    assert {key: back[key] for key in HF} == HF
    assert back["partial_rotary_factor"] == 0.5
    assert back["layer_types"] == ["sliding_attention", "full_attention"] * 2
    assert FULL.to_args(back) == args | {"bf16": False}
    assert (args["attn_logit_softcapping"], args["softmax_scale"]) == (50.0, 224**-0.5)
    assert (args["rotary_percent"], args["rotary_interleaved"]) == (0.5, True)
    assert args["layernorm_zero_centered_gamma"] is args["apply_layernorm_1p"] is True
    assert (args["swiglu"], args["gated_linear_unit"]) == (False, True)
    assert (args["layernorm_epsilon"], args["embedding_scale"]) == (1e-4, "sqrt(hidden_size)")
    assert FULL.unsayable(HF) == FULL.matches_args(args) == FULL.check_pair(HF, args) == []


def test_what_mainline_lacks():
    words = "\n".join(FULL.needs(HF))
    for named in (*CAPS.values(), "GELU", "softmax_scale", "square root"):
        assert named in words
    assert CAPS["final_logit_softcapping"] not in "\n".join(FULL.needs({**HF, "final_logit_softcapping": None}))
    assert LLAMA.needs({}) == []


@pytest.mark.parametrize("other", FAMILIES, ids=lambda one: one.model_type)
def test_nobody_else_takes_its_args(other):
    args = FULL.to_args(HF)
    reasons = " ".join(other.matches_args(args))
    for arg in ("attn_logit_softcapping", "softmax_scale", "apply_layernorm_1p", "embedding_scale"):
        assert arg in reasons
    with pytest.raises(Refused):
        other.to_hf(args)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attn_logit_softcapping": None, "final_logit_softcapping": None}, "none of attn_logit_softcapping"),
        ({"softmax_scale": None}, "softmax_scale is not set"),
        ({"embedding_scale": None}, "embedding_scale"),
        ({"apply_layernorm_1p": False, "layernorm_zero_centered_gamma": False}, "apply_layernorm_1p"),
        ({"gated_linear_unit": None}, "gated_linear_unit"),
        ({"bias_gelu_fusion": False}, "bias_gelu_fusion"),
        ({"swiglu": True}, "swiglu"),
        ({"rotary_interleaved": False}, "rotary_interleaved"),
    ],
    ids=str,
)
def test_args_without_it_are_refused(change, named):
    with pytest.raises(Refused) as refusal:
        FULL.to_hf({**FULL.to_args(HF), **change})
    assert named in refusal.value.found


def test_stale_and_damaged():
    args = FULL.to_args(HF)
    for change, line in (
        ({"attn_logit_softcapping": 20.0}, "attn_logit_softcapping 50.0 != args.attn_logit_softcapping 20.0"),
        ({"softmax_scale": 0.5}, "query_pre_attn_scalar 224"),
        ({"rotary_percent": 1.0}, "partial_rotary_factor 0.5"),
        ({"layernorm_epsilon": 1e-6}, "layer_norm_eps 0.0001"),
    ):
        found = FULL.check_pair(HF, {key: value for key, value in args.items() if key != "norm_epsilon"} | change)
        assert any(one.startswith(line) for one in found), found
    for key, value in (("query_pre_attn_scalar", 0), ("attn_logit_softcapping", "50"), ("layer_norm_eps", None)):
        with pytest.raises(Damaged):
            FULL.to_args({**HF, key: value})


@pytest.mark.parametrize("scalar", [1, 7, 64, 144, 168, 224, 256, 0.3, 4096])
def test_a_power_and_its_inverse(scalar):
    back = FULL.to_hf(FULL.to_args({**HF, "query_pre_attn_scalar": scalar}))["query_pre_attn_scalar"]
    assert back == (scalar if isinstance(scalar, int) else pytest.approx(scalar, rel=1e-15))


def test_megatron_core_computes_the_gated_gelu():
    """With these args megatron-core's fused kernel is Gemma's feed-forward activation."""
    pytest.importorskip("megatron.core")
    from megatron.core.fusions.fused_bias_geglu import geglu

    args = FULL.to_args(HF)
    assert (args["gated_linear_unit"], args["bias_gelu_fusion"]) == (True, True)
    mlp = Gemma2MLP(Gemma2Config(hidden_size=8, intermediate_size=8, hidden_activation="gelu_pytorch_tanh"))
    states = torch.randn(50, 16)
    gate, up = states.chunk(2, -1)
    torch.testing.assert_close(geglu(states), mlp.act_fn(gate) * up, rtol=1e-5, atol=1e-6)


def test_full_width_norms_are_told_from_norms_of_each_head():
    heads = DecoderConfig("heads", "HeadsForCausalLM", COMMON, Grouped(qk_norm=True))
    full = DecoderConfig("wide", "WideForCausalLM", COMMON, Grouped(qk_norm="full"))
    assert heads.matches_args(full.to_args({})) != []
    assert full.matches_args(heads.to_args({})) != []
    assert full.matches_args(full.to_args({})) == heads.matches_args(heads.to_args({})) == []


def test_a_config_of_another_kind_is_one_by_its_methods():
    """`Config` asks for no base class: what the engine calls is all there on a decoder's."""
    methods = {name for name in vars(Config) if not name.startswith("_")}
    assert methods == {
        *("model_type", "architecture", "facts", "to_args", "unsayable", "needs", "to_hf", "matches_args", "check_pair")
    }
    assert all(hasattr(FULL, name) for name in methods)
