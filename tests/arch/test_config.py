"""config.json and Megatron's args, judged by transformers' real config and rotary classes and by megatron-core."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config
from transformers.masking_utils import sliding_window_causal_mask_function
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from dconv.arch import phi
from dconv.arch.config import LLAMA, MISTRAL, QWEN2, QWEN3, detect_by_args, hf_config_from_meta
from dconv.errors import Damaged, Refused

PHI3 = phi.PHI3.config
FAMILIES = [LLAMA, MISTRAL, QWEN2, QWEN3, PHI3]
CLASSES = {LLAMA: LlamaConfig, MISTRAL: MistralConfig, QWEN2: Qwen2Config, QWEN3: Qwen3Config, PHI3: Phi3Config}
ROTARY = {
    LLAMA: LlamaRotaryEmbedding,
    MISTRAL: MistralRotaryEmbedding,
    QWEN2: Qwen2RotaryEmbedding,
    QWEN3: Qwen3RotaryEmbedding,
    PHI3: Phi3RotaryEmbedding,
}
BY_NAME = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

#: Published config.json files, in the style of the transformers version that wrote them.
LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3_ROPE,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA_32_1B = {
    **LLAMA_31_8B,
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": {**LLAMA3_ROPE, "factor": 32.0},
    "tie_word_embeddings": True,
}
CODE_LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 16384,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "torch_dtype": "bfloat16",
    "vocab_size": 32016,
}
LLAMA_1_7B = {  # before num_key_value_heads, rope_theta and max_position_embeddings were written
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
MISTRAL_V01 = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
MISTRAL_V03 = {**MISTRAL_V01, "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768}
QWEN25_05B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN25_7B = {
    **QWEN25_05B,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "max_window_layers": 28,
    "num_key_value_heads": 4,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
PUBLISHED = {
    "Llama-1-7B": (LLAMA, LLAMA_1_7B),
    "CodeLlama-7b": (LLAMA, CODE_LLAMA_7B),
    "Llama-3.1-8B": (LLAMA, LLAMA_31_8B),
    "Llama-3.2-1B": (LLAMA, LLAMA_32_1B),
    "Mistral-7B-v0.1": (MISTRAL, MISTRAL_V01),
    "Mistral-7B-v0.3": (MISTRAL, MISTRAL_V03),
    "Qwen2.5-0.5B": (QWEN2, QWEN25_05B),
    "Qwen2.5-7B": (QWEN2, QWEN25_7B),
    "Qwen2.5-7B with YaRN": (QWEN2, {**QWEN25_7B, "rope_scaling": {**YARN_ROPE, "type": "yarn"}}),
    "Qwen3-0.6B": (QWEN3, QWEN3_06B),
}

#: Keys of a config class that do not reach the forward pass, or are compared by what they do.
APART = {
    *("architectures", "transformers_version", "use_cache", "pretraining_tp", "use_mrope"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),  # not in Megatron's args
    *("rope_parameters", "use_sliding_window", "max_window_layers", "sliding_window", "layer_types", "head_dim"),
}


def loaded(family, hf):
    """The real class's reading of a config.json that went through a file."""
    return CLASSES[family].from_dict(json.loads(json.dumps(hf)))


def rotary(config, family):
    module = ROTARY[family](config)
    return module.inv_freq, module.attention_scaling


def windows(config, family):
    """Width of each layer's sliding window, as modeling_*.py takes it; None is full attention."""
    if family is LLAMA:
        return [None] * config.num_hidden_layers
    if family in (MISTRAL, PHI3):
        return [config.sliding_window] * config.num_hidden_layers
    return [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]


def assert_same_function(family, one, other):
    """Both config.json files are the same model to transformers."""
    a, b = loaded(family, one), loaded(family, other)
    left, right = ({k: v for k, v in c.to_dict().items() if k not in APART} for c in (a, b))
    assert left == right
    heads = {getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads for c in (a, b)}
    assert len(heads) == 1
    assert windows(a, family) == windows(b, family)
    (frequencies, factor), (others, other_factor) = rotary(a, family), rotary(b, family)
    assert torch.equal(frequencies, others)
    assert factor == other_factor


def old_style(hf):
    """What transformers 4.x would have written for the same model."""
    old = copy.deepcopy(hf)
    rope = old.pop("rope_parameters")
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    old["torch_dtype"] = old.pop("dtype", None)
    return old


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


@pytest.fixture
def core():
    megatron_cpu = pytest.importorskip("dconv.export.megatron_cpu")
    megatron_cpu.cpu_patches()
    import megatron.core

    return megatron.core


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 3.0},
        LLAMA3_ROPE,
        {**LLAMA3_ROPE, "factor": 32.0},
        YARN_ROPE,
        {**YARN_ROPE, "truncate": False, "beta_fast": 24.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.1},
        {**YARN_ROPE, "mscale": 0.7},  # without its partner it counts for nothing
        {**YARN_ROPE, "mscale_all_dim": 0.7},
    ],
    ids=str,
)
def test_megatron_core_rotates_the_same(core, rope):
    """The args, given to megatron-core's rotary classes as gpt_builders.py and argument_utils.py give them."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

    hf = {**QWEN3_06B, "max_position_embeddings": 131072, "rope_scaling": rope}
    args, positions = QWEN3.to_args(hf), 50
    inv_freq, factor = rotary(loaded(QWEN3, hf), QWEN3)
    common = {
        "kv_channels": args["kv_channels"],
        "rotary_percent": args["rotary_percent"],
        "rotary_interleaved": args["rotary_interleaved"],
        "seq_len_interpolation_factor": args["rotary_seq_len_interpolation_factor"],
        "rotary_base": args["rotary_base"],
        "use_cpu_initialization": True,
    }
    if args["position_embedding_type"] == "yarn":
        module = YarnRotaryEmbedding(
            **common,
            scaling_factor=args["rotary_scaling_factor"],
            original_max_position_embeddings=args["yarn_original_max_position_embeddings"],
            beta_fast=args["yarn_beta_fast"],
            beta_slow=args["yarn_beta_slow"],
            mscale=args["mscale"],
            mscale_all_dim=args["mscale_all_dim"],
            correction_range_round_to_int=args["yarn_correction_range_round_to_int"],
        )
        angles, concentration = module.get_emb(positions)
        assert concentration == pytest.approx(factor, rel=1e-12)
        angles = angles[:, 0, 0, : inv_freq.numel()]
    else:
        module = RotaryEmbedding(
            **common, rope_scaling=args["use_rope_scaling"], rope_scaling_factor=args["rope_scaling_factor"]
        )
        angles = module.get_freqs_non_repeated(positions)
        assert factor == 1.0
    torch.testing.assert_close(angles, torch.outer(torch.arange(positions).float(), inv_freq), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [1, 2, 5])
def test_megatron_core_masks_the_same_window(core, width):
    from megatron.core.fusions import fused_softmax

    args = MISTRAL.to_args({**MISTRAL_V01, "sliding_window": width})
    blocked = fused_softmax.get_sliding_window_causal_mask(7, 7, args["window_size"])
    sees = sliding_window_causal_mask_function(width)
    for q in range(7):
        for k in range(7):
            assert bool(sees(0, 0, torch.tensor(q), torch.tensor(k))) is not bool(blocked[q, k])


def test_megatron_core_slides_in_the_same_layers(core):
    from megatron.core.transformer.utils import is_layer_window_attention

    hf = {**QWEN3_06B, "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 20}
    args, kinds = QWEN3.to_args(hf), loaded(QWEN3, hf).layer_types
    found = [
        is_layer_window_attention(tuple(args["window_size"]), args["window_attn_skip_freq"], layer + 1)
        for layer in range(28)
    ]
    assert found == [kind == "sliding_attention" for kind in kinds]
    assert set(found) == {False, True}
    assert QWEN3.to_hf(args)["max_window_layers"] == 20  # transformers before layer_types reads only this
    every_third_full = [is_layer_window_attention((63, 0), 3, layer + 1) for layer in range(28)]
    back = QWEN3.to_hf({**args, "window_attn_skip_freq": 3})["layer_types"]
    assert [kind == "sliding_attention" for kind in back] == every_third_full


@pytest.mark.parametrize("name", PUBLISHED)
def test_megatron_core_takes_the_args(core, name):
    """core_transformer_config_from_args copies the args that TransformerConfig has a field for."""
    from megatron.core.transformer import TransformerConfig

    family, hf = PUBLISHED[name]
    args, facts = family.to_args(hf), family.facts(hf)
    fields = {f.name for f in dataclasses.fields(TransformerConfig)}
    config = TransformerConfig(**{k: v for k, v in args.items() if k in fields}, gated_linear_unit=args["swiglu"])
    assert config.num_query_groups == facts["groups"]
    assert config.kv_channels == facts["head_dim"]
    assert config.layernorm_epsilon == hf["rms_norm_eps"]
    assert (config.add_bias_linear or config.add_qkv_bias) is facts["qkv_bias"]
    assert config.qk_layernorm is facts["qk_norm"]
    assert config.ffn_hidden_size == facts["ffn"]


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


def meta(dim, layers, heads, groups=None, step=256, stretch=None, theta=None, vocab=-1, scaled=False):
    """params.json as Meta writes it: keys that a generation did not have are left out."""
    said = {
        "dim": dim,
        "n_layers": layers,
        "n_heads": heads,
        "norm_eps": 1e-05,
        "multiple_of": step,
        "vocab_size": vocab,
    }
    later = {
        "n_kv_heads": groups,
        "ffn_dim_multiplier": stretch,
        "rope_theta": theta,
        "use_scaled_rope": scaled or None,
    }
    return said | {key: value for key, value in later.items() if value is not None}


#: Published params.json and the feed-forward size of the same model's config.json.
META = {
    "Llama-2-7b": (meta(4096, 32, 32), 11008),
    "Llama-2-13b": (meta(5120, 40, 40), 13824),
    "Llama-2-70b": (meta(8192, 80, 64, 8, 4096, 1.3), 28672),
    "CodeLlama-34b": (meta(8192, 48, 64, 8, 256, 1.0, 1000000), 22016),
    "Llama-3-8B": (meta(4096, 32, 32, 8, 1024, 1.3, 500000.0, 128256), 14336),
    "Llama-3.2-1B": (meta(2048, 16, 32, 8, 256, 1.5, 500000.0, 128256, scaled=True), 8192),
    "Llama-3.1-405B": (meta(16384, 126, 128, 8, 4096, 1.2, 500000.0, 128256, scaled=True), 53248),
}


@pytest.mark.parametrize("name", META)
def test_meta(name):
    params, ffn = META[name]
    hf = hf_config_from_meta(params, 32000)
    assert hf["intermediate_size"] == ffn
    assert hf["vocab_size"] == (128256 if name.startswith("Llama-3") else 32000)
    assert_same_function(LLAMA, {**hf, "torch_dtype": "float32"}, LLAMA.to_hf(LLAMA.to_args(hf)))
    assert hf_config_from_meta({"model": params}, 32000) == hf


def test_meta_rope_and_length():
    said = {name: hf_config_from_meta(params, 32016) for name, (params, _) in META.items()}
    assert_same_function(LLAMA, {**said["Llama-3.2-1B"], "torch_dtype": "bfloat16"}, LLAMA_32_1B)
    assert said["Llama-3.1-405B"]["rope_scaling"] == LLAMA3_ROPE
    assert said["Llama-3.1-405B"]["tie_word_embeddings"] is False
    assert said["Llama-3-8B"]["rope_scaling"] is None
    assert [said[name]["max_position_embeddings"] for name in META] == [4096, 4096, 4096, 16384, 8192, 131072, 131072]
    assert said["Llama-2-7b"]["rope_theta"] == 10000.0
    assert said["CodeLlama-34b"]["rope_theta"] == 1e6
    assert said["CodeLlama-34b"]["vocab_size"] == 32016
    stated = {**META["Llama-3.2-1B"][0], "rope_scaling_factor": 16}
    assert hf_config_from_meta(stated, None)["rope_scaling"]["factor"] == 16.0


def test_meta_refusals():
    params = META["Llama-2-7b"][0]
    with pytest.raises(Damaged):
        hf_config_from_meta({**params, "vocab_size": -1}, None)
    with pytest.raises(Damaged):
        hf_config_from_meta({**params, "n_layers": None}, 32000)
    for foreign in ("hidden_dim", "quantization_args", "vision_chunk_size", "moe"):
        with pytest.raises(Refused) as refusal:
            hf_config_from_meta({**params, foreign: 1}, 32000)
        assert refusal.value.found == foreign


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
