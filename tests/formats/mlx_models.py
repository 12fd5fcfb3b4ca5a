"""Small models of the families that mlx-lm has, the same whenever they are written, with whole groups of 64 columns."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np

from dconv.arch.registry import by_name
from dconv.checkpoint import safetensors
from dconv.checkpoint.source import expected_specs
from tests.models import config_of, facts_of

_SIZES: Final = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 256, "torch_dtype": "bfloat16",
}  # fmt: skip
_LLAMA3: Final = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_YARN: Final = {
    "rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 64,
}  # fmt: skip
_MSCALE: Final = {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}
_LONG: Final = {"rope_type": "longrope", "original_max_position_embeddings": 256}
_SCALED: Final = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 64}
_ROUTED: Final = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LATE: Final = {
    "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_routed_experts": 4, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": False,
}  # fmt: skip
_LATENT: Final = {
    "kv_lora_rank": 64, "q_lora_rank": 64, "qk_nope_head_dim": 64, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "num_key_value_heads": 4, "head_dim": None,
}  # fmt: skip
_TIED: Final = {"tie_word_embeddings": True}
#: Family -> what its config says beside the sizes.
MODELS: Final[dict[str, dict[str, Any]]] = {
    "llama": {"rope_scaling": _LLAMA3, "rope_theta": 500000.0, **_TIED},
    "mistral": {"sliding_window": None, "head_dim": 64},
    "qwen2": {"rope_scaling": _YARN, "head_dim": None},
    "qwen3": {**_TIED, "head_dim": 64},
    "olmo2": {},
    "granite": {**_TIED, "head_dim": None},
    "gemma": {**_TIED, "head_dim": 64},
    "gemma2": {
        **_TIED, "head_dim": 64, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "sliding_window": 256,
    },
    "gemma3_text": {
        **_TIED, "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 8, "sliding_window_pattern": 2,
        "num_hidden_layers": 3,
    },
    "phi3": {"head_dim": None, "original_max_position_embeddings": 256, "sliding_window": None, "pad_token_id": None},
    "glm4": {"pad_token_id": None, "head_dim": 32, "partial_rotary_factor": 0.5},
    "minicpm": {
        **_SCALED, **_TIED, "head_dim": None, "sparse_config": None, "mup_denominator": None,
        "rope_scaling": {**_LONG, "long_factor": [1.25] * 16, "short_factor": [1.25] * 16},
    },
    "minicpm3": {
        **_SCALED, **_TIED, **_LATENT, "rms_norm_eps": 1e-5,
        "rope_scaling": {**_LONG, "long_factor": [1.25] * 8, "short_factor": [1.25] * 8},
    },
    "mixtral": {"num_local_experts": 4, "sliding_window": None, "head_dim": None},
    "qwen2_moe": {
        **_ROUTED, "shared_expert_intermediate_size": 64, "mlp_only_layers": [], "head_dim": None,
        "norm_topk_prob": False,
    },
    "qwen3_moe": {**_ROUTED, "norm_topk_prob": True, "head_dim": 64, "mlp_only_layers": [0]},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": None},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64, "rotary_dim": 32},
    "glm4_moe": {
        **_LATE, "use_qk_norm": True, "attention_bias": True, "head_dim": 64, "partial_rotary_factor": 0.5,
        "num_nextn_predict_layers": 0, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    },
    "deepseek": {**_LATE, "head_dim": None},
    "deepseek_v2": {
        **_LATE, **_LATENT, "q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
        "scoring_func": "softmax", "rope_scaling": {**_MSCALE, "type": "yarn"},
    },
    "deepseek_v3": {
        **_LATE, **_LATENT, "n_group": 2, "topk_group": 1, "num_nextn_predict_layers": 1, "topk_method": "noaux_tc",
        "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5, "rope_scaling": _MSCALE,
    },
    "gpt_oss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64, "swiglu_limit": 7.0, "sliding_window": 8,
        "rope_scaling": _YARN,
    },
}  # fmt: skip

_ONE: Final = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 32}
#: What mlx_lm.convert's output is recorded of: family, bits and group, and what its config says.
SMALL: Final[dict[tuple[str, int, int], dict[str, Any]]] = {
    ("llama", 4, 64): _ONE,
    ("qwen2", 3, 32): _ONE,
    ("qwen3_moe", 6, 32): {**_ONE, "mlp_only_layers": [], "decoder_sparse_step": 1},
}


def write_model(folder: Path, name: str, dtype: str = "bf16", **more: Any) -> Path:
    """A HuggingFace directory; what balances a router is fp32, as in released models."""
    folder.mkdir(parents=True)
    family = by_name(name)
    config = config_of(family, **{**_SIZES, **MODELS[name], **more})
    config["hidden_size"] = more.get("hidden_size", _SIZES["hidden_size"])
    if config.get("head_dim") is None:
        del config["head_dim"]
    config["torch_dtype"] = {"bf16": "bfloat16", "f32": "float32"}[dtype]
    specs = [
        replace(spec, dtype="f32" if spec.name.endswith("e_score_correction_bias") else dtype)
        for spec in expected_specs(family, facts_of(family, config)).values()
    ]
    _, first, _ = safetensors.lay_out(specs)
    kinds = {"f32": np.float32, "bf16": ml_dtypes.bfloat16}
    body = [weights_of(spec.name, spec.file_shape).astype(kinds[spec.dtype]).tobytes() for spec in specs]
    (folder / "model.safetensors").write_bytes(first + b"".join(body))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def weights_of(name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """A tensor's values: norms around 1, all else around 0."""
    drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    return 1 + drawn / 8 if len(shape) == 1 and "norm" in name else drawn / 12
