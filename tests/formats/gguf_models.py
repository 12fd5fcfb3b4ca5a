"""Small models of the families that a GGUF may hold, the same whenever they are written."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dconv.arch.registry import by_name
from dconv.checkpoint import safetensors
from dconv.checkpoint.source import expected_specs
from tests.models import config_of, facts_of

_YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_FACTORS = {"long_factor": [1.0, 1.25, 2.5, 4.0], "short_factor": [1.0, 1.0, 1.125, 1.5]}
_SCALED = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}
_TIED = {"tie_word_embeddings": True}
#: Family -> what its config says beside `tests.models.config_of`: what llama.cpp's graphs take for granted among it.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": _LLAMA3, "rope_theta": 500000.0},
    "mistral": {"sliding_window": None, "head_dim": 16},
    "mixtral": {"sliding_window": None},
    "granite": _TIED,
    "minicpm": {
        **_SCALED, "sparse_config": None, "mup_denominator": None, "max_position_embeddings": 512,
        "rope_scaling": {"rope_type": "longrope", **_FACTORS, "original_max_position_embeddings": 512},
    },
    "minicpm3": {**_SCALED, "num_key_value_heads": 4},
    "qwen2": {},
    "qwen3": {**_TIED, "head_dim": 16, "rope_scaling": {**_YARN, "truncate": True, "factor": 4.0}},
    "qwen2_moe": {"mlp_only_layers": []},
    "qwen3_moe": {"norm_topk_prob": True},
    "olmo2": {},
    "olmoe": {},
    "minimax_m2": {"scoring_func": "sigmoid"},
    "gpt_oss": {"swiglu_limit": 7.0, "rope_scaling": _YARN},
    "gemma": _TIED,
    "gemma2": {
        **_TIED, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {**_TIED, "query_pre_attn_scalar": 8, "sliding_window_pattern": 6, "num_hidden_layers": 7},
    "glm4": {},
    "phi3": {"original_max_position_embeddings": 128, "sliding_window": None, "pad_token_id": None},
    "deepseek": {},
    "deepseek_v2": {
        "topk_method": "greedy", "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "scoring_func": "softmax",
        "routed_scaling_factor": 1.0,
        "rope_scaling": {
            "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
        },
    },
    "deepseek_v3": {
        "num_nextn_predict_layers": 0, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "routed_scaling_factor": 2.5, "q_lora_rank": 24,
    },
}  # fmt: skip


def weights_of(name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """A tensor's values, which bf16 has: multiples of 1/64 up to 1/8, so that recordings are small."""
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    return draw.integers(-8, 9, shape).astype(np.float32) / 64


def write_model(folder: Path, name: str, **keys: Any) -> Path:
    """A HuggingFace directory in bf16; what balances a router is fp32, as in released models."""
    folder.mkdir(parents=True)
    family = by_name(name)
    config = config_of(family, **{"num_hidden_layers": 2, **MODELS[name], **keys})
    specs = [
        replace(spec, dtype="f32" if spec.name.endswith("e_score_correction_bias") else "bf16")
        for spec in expected_specs(family, facts_of(family, config)).values()
    ]
    _, first, _ = safetensors.lay_out(specs)
    kinds = {"f32": np.float32, "bf16": ml_dtypes.bfloat16}
    body = [weights_of(spec.name, spec.file_shape).astype(kinds[spec.dtype]).tobytes() for spec in specs]
    (folder / "model.safetensors").write_bytes(first + b"".join(body))
    (folder / "config.json").write_text(json.dumps(config))
    return folder
