"""Random checkpoints of any family in the registry, written without torch: the law suite's raw material."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dconv.arch.family import Family
from dconv.arch.registry import families
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
    "t5": {
        "feed_forward_proj": "gated-gelu", "scale_decoder_outputs": False, "num_decoder_layers": 3,
        "relative_attention_num_buckets": 8,
    },
    "gpt2": {"head_dim": None, "hidden_act": "gelu_new"},
    "megatron-bert": {"head_dim": None, "hidden_act": "gelu", "type_vocab_size": 2},
    "bert": {"head_dim": None, "hidden_act": "gelu", "type_vocab_size": 2},
    "deepseek": {**_LATE, "head_dim": None},
    "minicpmv": {
        "version": 2.6, "query_num": 5, "drop_vision_last_layer": False, "use_sliding_window": False,
        "slice_config": {"max_slice_nums": 9, "patch_size": 4, "model_type": "minicpmv"},
        "vision_config": {
            "model_type": "siglip", "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3,
            "num_attention_heads": 4, "image_size": 17, "patch_size": 4,
        },
    },
    "glm4_moe": {**_LATE, "use_qk_norm": True, "attention_bias": True, "num_nextn_predict_layers": 1},
    "deepseek_v2": {**_LATE, **_LATENT, "q_lora_rank": None},
    "mamba2": {"num_heads": 8, "n_groups": 4, "state_size": 6, "chunk_size": 8},
    "nemotron_h": {
        "hybrid_override_pattern": "M*-E", "mamba_num_heads": 8, "mamba_head_dim": 6, "n_groups": 4,
        "ssm_state_size": 6, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 24, "mlp_hidden_act": "relu2",
    },
    "bamba": {
        "attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_head": "auto", "mamba_n_groups": 4,
        "mamba_d_state": 6,
    },
    "minicpm": {
        "head_dim": None, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256,
        "sparse_config": {"kernel_size": 32, "topk": 64, "use_nope": False}, "mup_denominator": 32,
    },
    "minicpm_moe": {
        "head_dim": None, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256, "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "minicpm_blockffn": {
        "head_dim": None, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256, "num_experts": 6,
        "expert_size": 3, "router_act": "relu",
    },
    "blockffn": {
        "head_dim": None, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256, "num_experts": 6,
        "expert_size": 3, "router_act": "relu", "ffn_type": "block", "norm_after_router": "rms",
    },
    "blockffn_mla": {
        **_LATENT, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256, "num_experts": 6, "expert_size": 3,
        "attention_type": "mla", "ffn_type": "block", "norm_after_router": "sum",
    },
    "minicpm3": {**_LATENT, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256},
    "deepseek_v3": {**_LATE, **_LATENT, "n_group": 2, "topk_group": 1, "num_nextn_predict_layers": 1},
}  # fmt: skip
#: Common keys that a family calls otherwise.
NAMES: dict[str, dict[str, str]] = {
    "gpt2": {
        "hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head", "max_position_embeddings": "n_positions", "hidden_act": "activation_function",
        "rms_norm_eps": "layer_norm_epsilon",
    },
    "t5": {
        "hidden_size": "d_model", "intermediate_size": "d_ff", "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads", "head_dim": "d_kv", "rms_norm_eps": "layer_norm_epsilon",
    },
    "megatron-bert": {"rms_norm_eps": "layer_norm_eps"},
    "bert": {"rms_norm_eps": "layer_norm_eps"},
}  # fmt: skip


#: Of a layer's tensors whose shapes no config says, and the layers that have them.
_BLOCKS = {
    "moe_router.weight": (6, 32), "router_norm.weight": (6,), "moe_w_in.weight": (6, 3, 32),
    "moe_w_out.weight": (6, 32, 3),
}  # fmt: skip
_PUBLISHED = {"router_proj.weight": (6, 32), "up_proj": (6, 3, 32), "down_proj": (6, 32, 3)}
BLOCKS = {
    "minicpm_blockffn": _BLOCKS,
    "blockffn": {**_PUBLISHED, "router_norm.weight": (6,)},
    "blockffn_mla": _PUBLISHED,
}


def stored_shapes(family: Family, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of what a family has as the source has it: every other layer is block-sparse."""
    layers = range(1, config["num_hidden_layers"], 2) if family.name in BLOCKS else ()
    return blocks(family.name, layers)


def blocks(family: str, layers: Iterable[int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the block-sparse layers' own tensors."""
    return {f"model.layers.{layer}.mlp.{name}": shape for layer in layers for name, shape in BLOCKS[family].items()}


def facts_of(family: Family, config: dict[str, Any]) -> dict[str, Any]:
    """What shapes follow from, in a random checkpoint of `write_random`."""
    return family.facts(config, stored_shapes(family, config))


#: The tower of a family that sees.
_TOWER = {
    "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "image_size": 8, "patch_size": 4,
}  # fmt: skip


def config_of(family: Family, **sizes: Any) -> dict[str, Any]:
    """A small config.json of a family; ``sizes`` are common keys (those that the family does not have are left out)."""
    if family.name == "llava":
        text = {**config_of(families()["llama"], **sizes), "architectures": ["LlamaForCausalLM"]}
        own = {"architectures": [family.config.architecture], "model_type": "llava", "torch_dtype": "bfloat16"}
        return {**own, "text_config": text, "vision_config": _TOWER, "image_token_index": 60}
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
    if "num_heads" in config:  # all heads of a mixer together are twice as wide as the model
        config["hidden_size"] = config["num_heads"] * config["head_dim"] // 2
    if "hybrid_override_pattern" in config:
        pattern, layers = config["hybrid_override_pattern"], config["num_hidden_layers"]
        config["hybrid_override_pattern"] = (pattern * layers)[:layers]
    if "attn_layer_indices" in config:
        config["attn_layer_indices"] = [at for at in config["attn_layer_indices"] if at < config["num_hidden_layers"]]
    if isinstance(config.get("layer_types"), str):  # one kind for all layers
        config["layer_types"] = [config["layer_types"]] * config["num_hidden_layers"]
    names = NAMES.get(family.name, {})
    return {names.get(key, key): value for key, value in config.items()}


def write_random(
    folder: Path,
    family: Family,
    config: dict[str, Any],
    *,
    seed: int = 0,
    shard_size: int = 10**12,
    small: bool = False,
) -> Path:
    """A HuggingFace directory of random bf16 bits (NaN patterns too: relayout must not look at values).

    ``small`` keeps NaN and infinity, and all else below 2: what is scaled stays finite.
    """
    folder.mkdir(parents=True)
    facts = facts_of(family, config)
    specs, twins = expected_specs(family, facts), family.twin_names(facts)
    again = [replace(specs[name], name=twin) for twin, name in twins.items()]
    draw = np.random.default_rng(seed)
    drawn: dict[str, bytes] = {}
    parts = safetensors.by_size([*specs.values(), *again], shard_size)
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        _, first, _ = safetensors.lay_out(part)
        drawn |= {spec.name: draw.bytes(spec.nbytes) for spec in part if spec.name not in twins}
        if small:
            drawn |= {spec.name: _small(drawn[spec.name]) for spec in part if spec.name not in twins}
        (folder / name).write_bytes(first + b"".join(drawn[twins.get(spec.name, spec.name)] for spec in part))
        weight_map |= {spec.name: name for spec in part}
    if len(parts) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config, indent=3))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


def _small(drawn: bytes) -> bytes:
    """Without the highest bit of the exponent, but for NaN and infinity."""
    bits = np.frombuffer(drawn, "<u2")
    return np.where((bits & 0x7FFF) >= 0x7F80, bits, bits & 0xBFFF).astype("<u2").tobytes()


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
