"""config.json and Megatron's args, judged by transformers' real config and rotary classes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dconv.arch.config import LLAMA, MISTRAL, QWEN2, QWEN3, detect_by_args
from dconv.errors import Damaged, Refused
from tests.arch.dense_published import (
    BY_NAME,
    CLASSES,
    FAMILIES,
    LLAMA3_ROPE,
    PHI3,
    PUBLISHED,
    YARN_ROPE,
    assert_same_function,
    loaded,
    old_style,
)

PLAIN = st.just({"rope_type": "default"})
ROPES = st.one_of(
    PLAIN,
    st.builds(lambda f: {"rope_type": "linear", "factor": float(f)}, st.integers(2, 16)),
    st.builds(lambda f: {**LLAMA3_ROPE, "factor": f}, st.sampled_from([8.0, 32.0, 4.5])),
    st.builds(
        lambda f, more: {**YARN_ROPE, "factor": f, **more},
        st.sampled_from([2.0, 4.0, 40.0]),
        st.sampled_from(
            [
                {},
                {"beta_fast": 24.0, "beta_slow": 2.0},
                {"truncate": False},
                {"mscale": 0.7, "mscale_all_dim": 1.1},
            ]
        ),
    ),
)


@st.composite
def configs(draw, family):
    """A config.json as the real class of this version writes it."""
    groups, per_group = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    head_dim, layers = 2 * draw(st.integers(1, 40)), draw(st.integers(1, 6))
    heads = groups * per_group
    said = {
        "hidden_size": heads * head_dim if family is QWEN2 else heads * draw(st.integers(1, 64)),
        "num_hidden_layers": layers,
        "intermediate_size": draw(st.integers(1, 999)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": draw(st.integers(1, 200000)),
        "max_position_embeddings": draw(st.sampled_from([2048, 32768, 131072])),
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-6, 3e-7])),
        "initializer_range": draw(st.sampled_from([0.02, 0.006])),
        "attention_dropout": draw(st.sampled_from([0.0, 0.1])),
        "tie_word_embeddings": draw(st.booleans()),
        "dtype": draw(st.sampled_from(["bfloat16", "float16", "float32"])),
        "rope_parameters": {
            "rope_theta": draw(st.sampled_from([10000.0, 5e5, 1e6, 12345.5])),
            **draw(PLAIN if family is PHI3 else ROPES),
        },
    }
    if family is not QWEN2:
        said["head_dim"] = head_dim
    if family is LLAMA:
        said["attention_bias"] = said["mlp_bias"] = draw(st.booleans())
    if family in (MISTRAL, PHI3):
        said["sliding_window"] = draw(st.none() | st.integers(1, 4096))
    if family in (QWEN2, QWEN3) and draw(st.booleans()):
        said |= {"use_sliding_window": True, "sliding_window": draw(st.integers(1, 4096))}
        if draw(st.booleans()):
            said["max_window_layers"] = draw(st.integers(0, layers + 1))
        else:
            kinds = st.sampled_from(["full_attention", "sliding_attention"])
            said["layer_types"] = draw(st.lists(kinds, min_size=layers, max_size=layers))
    return CLASSES[family](**said).to_dict()


@BY_NAME
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_round_trip(family, data):
    hf = data.draw(configs(family))
    args = json.loads(json.dumps(family.to_args(hf)))  # plain values only
    back = family.to_hf(args)
    assert family.facts(back) == family.facts(hf)
    assert_same_function(family, hf, back)
    assert family.to_args(back) == args
    assert family.check_pair(hf, args) == []
    assert family.unsayable(hf) == []


@BY_NAME
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_old_style_says_the_same(family, data):
    hf = data.draw(configs(family))
    assert_same_function(family, hf, old_style(hf))
    assert family.to_args(old_style(hf)) == family.to_args(hf)


@BY_NAME
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_facts_are_the_shapes_of_the_real_class(family, data):
    hf = data.draw(configs(family))
    config, facts = loaded(family, hf), family.facts(hf)
    assert facts["q"] == facts["heads"] * facts["head_dim"]
    assert facts["kv"] == facts["groups"] * facts["head_dim"]
    assert facts["untied"] is not facts["tied"]
    assert (facts["layers"], facts["hidden"], facts["ffn"], facts["vocab"], facts["tied"]) == (
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.vocab_size,
        config.tie_word_embeddings,
    )


@pytest.mark.parametrize("family", FAMILIES[:4], ids=lambda family: family.model_type)  # of own q, k and v
def test_facts_follow_the_real_model(family):
    """Biases, norms and head sizes: the parameters that transformers really makes."""
    from transformers import AutoModelForCausalLM

    for bias in (False, True) if family in (LLAMA, QWEN3) else (False,):
        sizes = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1, "vocab_size": 11}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None}
        said = {**sizes, **heads, **({"attention_bias": bias} if family in (LLAMA, QWEN3) else {})}
        config = CLASSES[family](**said, **({"mlp_bias": bias} if family is LLAMA else {}))
        with torch.device("meta"):
            names = {name: tuple(p.shape) for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
        facts, layer = family.facts(config.to_dict()), "model.layers.0."
        assert names[layer + "self_attn.q_proj.weight"] == (facts["q"], facts["hidden"])
        assert names[layer + "self_attn.k_proj.weight"] == (facts["kv"], facts["hidden"])
        for fact, tensor in (
            ("qkv_bias", "self_attn.k_proj.bias"),
            ("out_bias", "self_attn.o_proj.bias"),
            ("mlp_bias", "mlp.down_proj.bias"),
            ("qk_norm", "self_attn.q_norm.weight"),
        ):
            assert facts[fact] is (layer + tensor in names), tensor
        assert facts["untied"] is ("lm_head.weight" in names)


@BY_NAME
def test_defaults_are_those_of_the_real_class(family):
    real = CLASSES[family]().to_dict()
    for key, value in family.defaults.items():
        if key == "sliding_window" and family is not MISTRAL:
            continue  # the class clears it while use_sliding_window is false
        assert value is None or real[key] == value, key
    assert family.facts({}) == family.facts(real)
    unsaid = {} if family is MISTRAL else {"num_key_value_heads": None}  # its class of today takes no null
    narrow = {"hidden_size": 1024, "num_attention_heads": 16, **unsaid}
    config = CLASSES[family](**narrow)
    assert family.facts(narrow)["head_dim"] == (getattr(config, "head_dim", None) or 1024 // 16)
    assert family.facts(narrow)["groups"] == config.num_key_value_heads
    assert family.to_args({}) == family.to_args(real)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name):
    family, hf = PUBLISHED[name]
    args = family.to_args(hf)
    assert_same_function(family, hf, family.to_hf(args))
    assert family.check_pair(hf, args) == []
    twin = LLAMA if family is MISTRAL and args["window_size"] is None else family
    assert detect_by_args(args, FAMILIES) is twin
    assert args["bf16"] is (hf["torch_dtype"] == "bfloat16")


def test_published_numbers():
    said = {name: family.to_args(hf) for name, (family, hf) in PUBLISHED.items()}
    assert (said["Llama-3.1-8B"]["use_rope_scaling"], said["Llama-3.1-8B"]["rope_scaling_factor"]) == (True, 8.0)
    assert said["Llama-3.2-1B"]["rope_scaling_factor"] == 32.0
    assert said["Llama-3.2-1B"]["untie_embeddings_and_output_weights"] is False
    assert said["CodeLlama-7b"]["rotary_base"] == 1000000
    assert said["CodeLlama-7b"]["use_rope_scaling"] is False
    assert said["Mistral-7B-v0.1"]["window_size"] == [4095, 0]
    assert said["Mistral-7B-v0.3"]["window_size"] is None
    assert said["Qwen2.5-0.5B"]["add_qkv_bias"] is True
    assert said["Qwen2.5-0.5B"]["add_bias_linear"] is False
    assert said["Qwen2.5-0.5B"]["window_size"] is None
    assert said["Qwen3-0.6B"]["kv_channels"] == 128
    assert said["Qwen3-0.6B"]["qk_layernorm"] is True
    assert said["Llama-1-7B"]["num_query_groups"] == 32
    assert said["Llama-1-7B"]["group_query_attention"] is False
    assert said["Llama-3.1-8B"]["norm_epsilon"] == said["Llama-3.1-8B"]["layernorm_epsilon"] == 1e-5


def test_importing_it_is_cheap():
    code = (
        "import sys, dconv.arch.config; "
        "print([name for name in ('torch', 'transformers', 'numpy', 'megatron') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@pytest.mark.parametrize("name", PUBLISHED)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_junk_meets_the_closed_set_of_errors(name, data):
    family, hf = PUBLISHED[name]
    args = family.to_args(hf)
    where = {"config": hf, "args": args, "rope": {**LLAMA3_ROPE, **YARN_ROPE}}
    side = data.draw(st.sampled_from(sorted(where)))
    keys = sorted({*where[side], *(("layer_types", "rope_parameters", "dtype") if side == "config" else ())})
    broken = {**where[side], data.draw(st.sampled_from(keys)): data.draw(JUNK)}
    if side == "rope":
        broken = {
            **hf,
            "rope_scaling": {**broken, "rope_type": data.draw(st.sampled_from(["linear", "llama3", "yarn"]))},
        }
    with contextlib.suppress(Damaged, Refused):
        if side == "args":
            family.check_pair(hf, broken)
            family.to_hf(broken)
            detect_by_args(broken, FAMILIES)
        else:
            family.to_args(broken)
