"""Configs of Gemma, GLM, OLMo 2 and Granite, judged by transformers' real classes and by megatron-core."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: the oracle cannot run")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: the oracle cannot run")

from dconv.arch import gemma, glm, glm_moe, granite, olmo  # noqa: E402
from dconv.arch.config import detect_by_args  # noqa: E402
from dconv.arch.decoder import DecoderConfig  # noqa: E402
from dconv.arch.registry import families  # noqa: E402
from dconv.errors import Damaged, Refused  # noqa: E402
from tests.oracles import hf as oracle  # noqa: E402

CONFIGS: dict[str, DecoderConfig] = {
    family.name: family.config
    for module in (gemma, glm, glm_moe, olmo, granite)
    for family in module.FAMILIES
    if isinstance(family.config, DecoderConfig)
}
_GEMMA = {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "attention_bias": False, "attention_dropout": 0.0}

#: config.json files as published, less what does not concern the function.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma-7b": ("gemma", {
        **_GEMMA, "hidden_act": "gelu", "head_dim": 256, "hidden_size": 3072, "intermediate_size": 24576,
        "max_position_embeddings": 8192, "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 16,
        "rope_scaling": None, "rope_theta": 10000.0, "torch_dtype": "bfloat16", "vocab_size": 256000,
    }),
    "gemma-2-27b": ("gemma2", {
        **_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "head_dim": 128,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 4608, "intermediate_size": 36864,
        "max_position_embeddings": 8192, "num_attention_heads": 32, "num_hidden_layers": 46, "num_key_value_heads": 16,
        "query_pre_attn_scalar": 144, "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_size": 4096,
        "torch_dtype": "float32", "vocab_size": 256000, "use_cache": True,
    }),
    "gemma-3-1b-it": ("gemma3_text", {
        **_GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
        "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16", "vocab_size": 262144,
    }),
    "gemma-3-27b text": ("gemma3_text", {
        **_GEMMA, "head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504, "num_attention_heads": 32,
        "num_hidden_layers": 62, "num_key_value_heads": 16, "query_pre_attn_scalar": 168, "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "vocab_size": 262208,
    }),
    "glm-4-9b-chat-hf": ("glm", {
        "attention_bias": True, "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 13696, "max_position_embeddings": 131072, "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 2, "partial_rotary_factor": 0.5, "rms_norm_eps": 1.5625e-07,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 151552,
    }),
    "GLM-4-32B-0414": ("glm4", {
        "attention_bias": False, "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 6144,
        "intermediate_size": 23040, "max_position_embeddings": 32768, "num_attention_heads": 48,
        "num_hidden_layers": 61, "num_key_value_heads": 8, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 151552,
    }),
    "GLM-4.5": ("glm4_moe", {
        "attention_bias": True, "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
        "partial_rotary_factor": 0.5, "intermediate_size": 12288, "max_position_embeddings": 131072,
        "moe_intermediate_size": 1536, "norm_topk_prob": True, "num_attention_heads": 96, "n_group": 1, "topk_group": 1,
        "n_routed_experts": 160, "n_shared_experts": 1, "routed_scaling_factor": 2.5, "num_experts_per_tok": 8,
        "first_k_dense_replace": 3, "num_hidden_layers": 92, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 1000000, "num_nextn_predict_layers": 1, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "use_qk_norm": True, "vocab_size": 151552,
    }),
    "OLMo-2-1124-7B": ("olmo2", {
        "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 500000, "tie_word_embeddings": False, "torch_dtype": "float32", "vocab_size": 100352,
    }),
    "granite-3.1-8b-base": ("granite", {
        "attention_bias": False, "attention_dropout": 0.1, "attention_multiplier": 0.0078125,
        "embedding_multiplier": 12.0, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 12800,
        "logits_scaling": 16.0, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 8, "residual_multiplier": 0.22, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 10000000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "vocab_size": 49152,
    }),
}  # fmt: skip
BY_NAME = pytest.mark.parametrize("name", PUBLISHED)
#: Keys that do not reach the forward pass, or are spelt in two ways.
APART = {
    *("architectures", "transformers_version", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "dtype"),
    *("sliding_window_size", "hidden_act", "head_dim", "sliding_window_pattern", "_sliding_window_pattern"),
    *("rope_theta", "rope_local_base_freq", "partial_rotary_factor"),  # they are in rope_parameters, too
    "use_bidirectional_attention",  # null or false
}


def published(name: str) -> tuple[DecoderConfig, dict[str, Any]]:
    family, keys = PUBLISHED[name]
    config = CONFIGS[family]
    return config, {"architectures": [config.architecture], "model_type": config.model_type, **keys}


def loaded(hf: dict[str, Any]) -> Any:
    """The real class's reading of a config.json that went through a file."""
    kind = getattr(transformers, oracle.FAMILIES[hf["model_type"]].config)
    return kind.from_dict(json.loads(json.dumps(hf)))


def meant(hf: dict[str, Any]) -> dict[str, Any]:
    """What the real class makes of it."""
    return {key: value for key, value in loaded(hf).to_dict().items() if key not in APART}


@BY_NAME
def test_published(name: str) -> None:
    """There and back it is the same to the real class; so is what that class writes itself."""
    config, hf = published(name)
    args = json.loads(json.dumps(config.to_args(hf)))  # plain values only
    back = config.to_hf(args)
    assert meant(back) == meant(hf)
    assert config.facts(back) == config.facts(hf)
    assert config.to_args(back) == args
    assert config.to_args(loaded(hf).to_dict()) == args
    assert config.unsayable(hf) == config.check_pair(hf, args) == []


@BY_NAME
def test_published_is_no_other_family(name: str) -> None:
    config, hf = published(name)
    args = config.to_args(hf)
    everyone = [family.config for family in families().values()]
    assert [one.model_type for one in everyone if one.matches_args(args) == []] == [config.model_type]
    assert detect_by_args(args, everyone) is config


@pytest.mark.parametrize("family", CONFIGS)
def test_defaults_are_those_of_the_real_class(family: str) -> None:
    config = CONFIGS[family]
    real = loaded({"model_type": family}).to_dict()
    for key, value in config.defaults.items():
        if value is not None and key not in ("rope_theta", "rope_local_base_freq", "partial_rotary_factor"):
            assert key not in real or real[key] == value, key
    said = {"head_dim": 128} if family == "glm4_moe" else {}  # its own default is 42 2/3
    assert config.facts(said) == config.facts({**real, **said})
    assert config.to_args(said) == config.to_args({**real, **said})


def test_published_numbers() -> None:
    said = {name: published(name)[0].to_args(published(name)[1]) for name in PUBLISHED}
    one, two, three, wide = (said[name] for name in ("gemma-7b", "gemma-2-27b", "gemma-3-1b-it", "gemma-3-27b text"))
    assert (one["gated_linear_unit"], one.get("softmax_scale")) == (True, None)
    assert (two["softmax_scale"], two["window_size"], two["window_attn_skip_freq"]) == (1 / 12, [4095, 0], [1, 0] * 23)
    assert (three["rotary_base"], three["rope_local_base_freq"]) == (1000000, 10000.0)
    assert three["window_attn_skip_freq"] == [1, 1, 1, 1, 1, 0] * 4 + [1, 1]
    assert (wide["rotary_seq_len_interpolation_factor"], wide["rotary_base"]) == (8, 1000000)
    assert (said["glm-4-9b-chat-hf"]["rotary_percent"], said["GLM-4-32B-0414"]["rotary_interleaved"]) == (0.5, True)
    assert said["granite-3.1-8b-base"]["softmax_scale"] == 0.0078125
    assert said["OLMo-2-1124-7B"]["qk_layernorm_full_width"] is True


#: A key that changes the function, what the family says of it.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gemma-7b", {"hidden_act": "silu"}, "hidden_act silu"),
    ("gemma-7b", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma-2-27b", {"hidden_activation": "gelu"}, "hidden_activation gelu"),
    ("gemma-3-1b-it", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("gemma-3-1b-it", {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}}, "linear"),
    ("gemma-3-1b-it", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "factor, rope_type"),
    ("gemma-3-1b-it", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type dynamic"),
    ("OLMo-2-1124-7B", {"attention_bias": True}, "out_bias True"),
    ("granite-3.1-8b-base", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
]


@pytest.mark.parametrize(("name", "change", "named"), REFUSED)
def test_what_args_cannot_say_is_refused(name: str, change: dict[str, Any], named: str) -> None:
    config, hf = published(name)
    with pytest.raises(Refused) as refusal:
        config.to_args({**hf, **change})
    assert named in refusal.value.found


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gemma-3-1b-it", {"rope_local_base_freq": "10000"}),
        ("gemma-3-1b-it", {"sliding_window_pattern": 0}),
        ("gemma-3-1b-it", {"rope_parameters": {"full_attention": [1]}}),
        ("gemma-2-27b", {"query_pre_attn_scalar": 0}),
        ("granite-3.1-8b-base", {"embedding_multiplier": "12"}),
    ],
)
def test_damage_is_named(name: str, change: dict[str, Any]) -> None:
    config, hf = published(name)
    with pytest.raises(Damaged):
        config.to_args({**hf, **change})


@pytest.mark.parametrize(
    ("name", "arg"),
    [
        ("gemma-2-27b", "post_mlp_layernorm"),
        ("gemma-3-1b-it", "rope_local_base_freq"),
        ("OLMo-2-1124-7B", "no_pre_layernorm"),
        ("GLM-4-32B-0414", "post_self_attn_layernorm"),
        ("granite-3.1-8b-base", "softmax_scale"),
    ],
)
def test_args_without_it_are_refused(name: str, arg: str) -> None:
    config, hf = published(name)
    with pytest.raises(Refused) as refusal:
        config.to_hf({**config.to_args(hf), arg: None})
    assert arg in refusal.value.found


def test_layers_without_a_window_stay_so() -> None:
    """The class would let every other layer slide where ``layer_types`` is absent."""
    config, hf = published("gemma-2-27b")
    back = config.to_hf({**config.to_args(hf), "window_size": None, "window_attn_skip_freq": None})
    assert set(loaded(back).layer_types) == {"full_attention"}


TOKENS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(6))
#: family -> what `needs` names, each an arg or a key under which it travels.
LACKING = {
    "gemma": ["gated tanh-GELU", "embedding_scale"],
    "gemma2": [
        *("gated tanh-GELU", "embedding_scale", "post_self_attn_layernorm, post_mlp_layernorm", "softmax_scale"),
        *("attn_logit_softcapping", "final_logit_softcapping"),
    ],
    "gemma3_text": [
        *("gated tanh-GELU", "embedding_scale", "post_self_attn_layernorm, post_mlp_layernorm", "softmax_scale"),
        "rope_local_base_freq",
    ],
    "glm": [],
    "glm4": ["post_self_attn_layernorm, post_mlp_layernorm"],
    "glm4_moe": [],
    "olmo2": ["post_self_attn_layernorm, post_mlp_layernorm", "no_pre_layernorm", "query and key over all heads"],
    "granite": ["softmax_scale", "embedding_multiplier", "residual_multiplier", "logits_scaling"],
}


@pytest.mark.parametrize("family", LACKING)
def test_what_mainline_lacks_is_said(family: str) -> None:
    config, _ = oracle.tiny(family)
    lines = CONFIGS[family].needs(config.to_dict())
    assert len(lines) == len(LACKING[family])
    assert all(any(words in line for line in lines) for words in LACKING[family])


def test_megatron_core_has_no_such_thing() -> None:
    """The real library: neither a field nor a place in a layer, and so the judge refuses to compute such a model."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed: the oracle cannot run")
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

    from dconv.export.megatron_config import as_dict

    fields = {
        field.name for kind in (TransformerConfig, TransformerLayerSubmodules) for field in dataclasses.fields(kind)
    }
    for family, words in LACKING.items():
        config, _ = oracle.tiny(family)
        args = CONFIGS[family].to_args(config.to_dict()) | {"padded_vocab_size": 320}
        own = {arg for line in words for arg in line.split(", ") if arg in args and arg != "softmax_scale"}
        assert not own & fields
        if own:
            with pytest.raises(Refused) as refusal:
                as_dict(args)
            assert all(f"{arg}=" in refusal.value.found for arg in own)
        else:
            assert as_dict(args)["apply_layernorm_1p"] is False


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": 16}),  # the size of a head, as Megatron takes it
        ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e6}}}),
        ("granite", {"embedding_multiplier": 1.0}),
        ("granite", {"residual_multiplier": 1.0}),
        ("granite", {"logits_scaling": 1.0}),
        ("granite", {"attention_multiplier": 0.25}),
    ],
)
def test_what_is_lacking_changes_the_function(family: str, change: dict[str, Any]) -> None:
    """transformers computes something else without it, by more than two runtimes may differ: passing over is wrong."""
    logits, without = (oracle.logits(oracle.tiny(family, **keys)[1], TOKENS) for keys in ({}, change))
    assert (logits - without).abs().max() > 1e-4 * logits.abs().max()
