"""Published config.json files of dense families, and when two of them are one model to transformers."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from dconv.arch import phi
from dconv.arch.config import LLAMA, MISTRAL, QWEN2, QWEN3

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
