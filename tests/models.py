"""Random checkpoints of any family in the registry, written without torch: the law suite's raw material."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from dconv.arch.family import Family
from dconv.checkpoint import safetensors
from dconv.checkpoint.source import expected_specs

_ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATE = {
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}  # fmt: skip
_GELU = {"hidden_act": "gelu_pytorch_tanh"}
_LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
    "num_key_value_heads": None, "head_dim": None,
}  # fmt: skip
#: What the families' configs say beside the common keys.
KEYS: dict[str, dict[str, Any]] = {
    "gemma": _GELU,
    "gemma2": {**_GELU, "query_pre_attn_scalar": 12, "sliding_window": 16},
    "gemma3_text": {
        **_GELU, "query_pre_attn_scalar": 12, "sliding_window": 16, "sliding_window_pattern": 3, "rope_theta": 1e6,
        "rope_local_base_freq": 20000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "glm": {"partial_rotary_factor": 0.5},
    "granite": {
        "embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22, "attention_multiplier": 0.125,
    },
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {
        **_ROUTED, "shared_expert_intermediate_size": 24, "mlp_only_layers": [1], "head_dim": None,
        "layer_types": "full_attention",
    },
    "qwen3_moe": _ROUTED,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": None},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 4},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek": {**_LATE, "head_dim": None},
    "glm4_moe": {**_LATE, "use_qk_norm": True, "attention_bias": True, "num_nextn_predict_layers": 1},
    "deepseek_v2": {**_LATE, **_LATENT, "q_lora_rank": None},
    "deepseek_v3": {**_LATE, **_LATENT, "n_group": 2, "topk_group": 1, "num_nextn_predict_layers": 1},
}  # fmt: skip


def config_of(family: Family, **sizes: Any) -> dict[str, Any]:
    """A small config.json of a family; ``sizes`` are its keys (those that the family does not have are left out)."""
    config = {
        "architectures": [family.config.architecture],
        "model_type": family.config.model_type,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 61,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **KEYS.get(family.name, {}),
        **sizes,
    }
    config |= {key: None for key, value in KEYS.get(family.name, {}).items() if value is None}
    if config["head_dim"] is None:  # it is not a key of this family
        config["hidden_size"] = 8 * config["num_attention_heads"]
    if isinstance(config.get("layer_types"), str):  # one kind for all layers
        config["layer_types"] = [config["layer_types"]] * config["num_hidden_layers"]
    return config


def write_random(
    folder: Path, family: Family, config: dict[str, Any], *, seed: int = 0, shard_size: int = 10**12
) -> Path:
    """A HuggingFace directory of random bf16 bits (NaN patterns too: relayout must not look at values)."""
    folder.mkdir(parents=True)
    specs = list(expected_specs(family, family.config.facts(config)).values())
    draw = np.random.default_rng(seed)
    parts = safetensors.by_size(specs, shard_size)
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        size, first, _ = safetensors.lay_out(part)
        (folder / name).write_bytes(first + draw.bytes(size - len(first)))
        weight_map |= {spec.name: name for spec in part}
    if len(parts) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config, indent=3))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a HuggingFace directory as (dtype, shape, bytes), read by this test's own few lines."""
    found: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                low, high = entry["data_offsets"]
                body = data[8 + length + low : 8 + length + high]
                found[name] = (entry["dtype"], tuple(entry["shape"]), body)
    return found


def tree_digest(folder: Path) -> dict[str, str]:
    """sha256 of every file but the receipt."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "dconv.json"
    }
