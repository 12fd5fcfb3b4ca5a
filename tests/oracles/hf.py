"""Tiny random transformers models: what a HuggingFace checkpoint must compute, said by transformers itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Family:
    """Names of transformers' two classes, and the sizes that this family has over `SIZES`."""

    config: str
    model: str
    sizes: Mapping[str, Any] = field(default_factory=dict)


# divisible by 4 where tensor parallelism cuts (heads, ffn); 8 heads of 16 make 128, but head_dim may be overridden
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 344,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
# the head's three widths, both ranks and the experts' width all differ, so that none can stand for another
_MLA = {
    "num_key_value_heads": 8, "q_lora_rank": 48, "kv_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "head_dim": None,
}  # fmt: skip
_DEEPSEEK = _MOE | _MLA | {
    "n_routed_experts": 16, "n_shared_experts": 2, "first_k_dense_replace": 1,
    # as published, two experts for each chosen group: else megatron-core scores the groups otherwise
    "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5,
}  # fmt: skip
_ENCODER = {"head_dim": None, "num_key_value_heads": None, "intermediate_size": 352, "type_vocab_size": 2}
_MAMBA = {"mamba_n_heads": 16, "mamba_d_head": 16, "mamba_n_groups": 4, "mamba_d_state": 16, "mamba_chunk_size": 8}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaConfig", "LlamaForCausalLM"),
    "mistral": Family("MistralConfig", "MistralForCausalLM"),
    "qwen2": Family("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": Family("Qwen3Config", "Qwen3ForCausalLM"),
    "phi3": Family("Phi3Config", "Phi3ForCausalLM"),
    "gemma": Family("GemmaConfig", "GemmaForCausalLM", {"tie_word_embeddings": True}),
    "gemma2": Family(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {"tie_word_embeddings": True, "sliding_window": 8, "query_pre_attn_scalar": 24},
    ),
    "gemma3_text": Family(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {"tie_word_embeddings": True, "sliding_window": 8, "query_pre_attn_scalar": 24, "sliding_window_pattern": 2},
    ),
    "glm": Family("GlmConfig", "GlmForCausalLM"),
    "glm4": Family("Glm4Config", "Glm4ForCausalLM"),
    "olmo2": Family("Olmo2Config", "Olmo2ForCausalLM"),
    "granite": Family(
        "GraniteConfig",
        "GraniteForCausalLM",
        {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    ),
    "mixtral": Family("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen2_moe": Family(
        "Qwen2MoeConfig", "Qwen2MoeForCausalLM", _MOE | {"num_experts": 8, "shared_expert_intermediate_size": 80}
    ),
    "qwen3_moe": Family("Qwen3MoeConfig", "Qwen3MoeForCausalLM", _MOE | {"num_experts": 8}),
    "olmoe": Family(
        "OlmoeConfig", "OlmoeForCausalLM", {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 48}
    ),
    "deepseek_v2": Family("DeepseekV2Config", "DeepseekV2ForCausalLM", _DEEPSEEK),
    "deepseek_v3": Family("DeepseekV3Config", "DeepseekV3ForCausalLM", _DEEPSEEK | {"num_mtp_layers": 0}),
    "minimax_m2": Family(
        "MiniMaxM2Config",
        "MiniMaxM2ForCausalLM",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 48, "rotary_dim": 8},
    ),
    "gpt_oss": Family(
        "GptOssConfig",
        "GptOssForCausalLM",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 48, "sliding_window": 8},
    ),
    "glm4_moe": Family(
        "Glm4MoeConfig",
        "Glm4MoeForCausalLM",
        _MOE | {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_mtp_layers": 0},
    ),
    "minicpm3": Family("MiniCPM3Config", "MiniCPM3ForCausalLM", _MLA | {"dim_model_base": 64}),
    "gpt2": Family("GPT2Config", "GPT2LMHeadModel", {"intermediate_size": None, "tie_word_embeddings": True}),
    "bert": Family("BertConfig", "BertForPreTraining", _ENCODER | {"tie_word_embeddings": True}),
    "megatron-bert": Family(
        "MegatronBertConfig", "MegatronBertForPreTraining", _ENCODER | {"tie_word_embeddings": True}
    ),
    "t5": Family(
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "num_layers": 4, "d_model": 128, "d_kv": 16, "d_ff": 352, "num_heads": 8,
            "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20,
            "decoder_start_token_id": 0, "tie_word_embeddings": True,
        },
    ),
    "mamba2": Family(
        "Mamba2Config",
        "Mamba2ForCausalLM",
        {"num_heads": 16, "n_groups": 4, "state_size": 12, "chunk_size": 8, "expand": 2},
    ),
    "llava": Family(
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        {
            **dict.fromkeys(SIZES),
            "text_config": {**SIZES, "model_type": "llama"},
            "vision_config": {
                "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
                "num_attention_heads": 4, "image_size": 56, "patch_size": 14, "projection_dim": 16,
            },
            "image_token_index": 300, "image_seq_length": 16,
        },
    ),
    "bamba": Family("BambaConfig", "BambaForCausalLM", _MAMBA | {"attn_layer_indices": [1, 3]}),
    "nemotron_h": Family(
        "NemotronHConfig",
        "NemotronHForCausalLM",
        {
            "layers_block_type": ["mamba", "mlp", "attention", "moe"], "mamba_num_heads": 16, "mamba_head_dim": 16,
            "n_groups": 4, "ssm_state_size": 12, "chunk_size": 8, "num_hidden_layers": None,
            **_MOE, "n_routed_experts": 8, "moe_shared_expert_intermediate_size": 80,
        },
    ),
}  # fmt: skip


def tiny(family: str, *, seed: int = 0, **overrides: Any) -> tuple[PretrainedConfig, PreTrainedModel]:
    """A random fp32 model of a family in evaluation mode, with eager attention.

    Vectors (norms, biases, sinks, router corrections) are spread by 0.1 around the whole number that transformers
    starts them at, 0 or 1, where a swapped or forgotten one would not be seen; matrices are normal with standard
    deviation 1/sqrt(columns), so that attention and MLP both move the logits. Saved buffers are filled as well.

    Args:
        family: a key of `FAMILIES`.
        seed: of all weights.
        overrides: fields of the family's config, over `SIZES` and the family's own.

    Returns:
        config, model. transformers 5 keeps the experts of a layer in one tensor; `save` writes the published names.
    """
    known = FAMILIES[family]
    sizes = {**SIZES, **known.sizes, **overrides}
    for name in [name for name, value in known.sizes.items() if value is None and name not in overrides]:
        del sizes[name]  # transformers derives it, or the family has no such field
    config: PretrainedConfig = getattr(transformers, known.config)(**sizes, dtype=torch.float32)
    config._attn_implementation = "eager"
    model: PreTrainedModel = getattr(transformers, known.model)(config).float().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    saved = model.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in saved and buffer.is_floating_point()]
    for _, weight in [*model.named_parameters(), *buffers]:
        values = torch.randn(weight.shape, generator=generator)
        if weight.ndim < 2:
            weight.copy_(round(float(weight.mean())) + 0.1 * values)
        else:
            weight.copy_(values / weight.shape[-1] ** 0.5)
    return config, model


def save(model: PreTrainedModel, directory: str | Path, shard_size: int | str | None = None) -> Path:
    """Write config and safetensors; ``shard_size`` in bytes or like ``"200KB"`` splits the weights over files."""
    model.save_pretrained(directory, max_shard_size="50GB" if shard_size is None else shard_size)
    return Path(directory)


def load(directory: str | Path) -> PreTrainedModel:
    """The model that a directory's config names, fp32, eager attention."""
    architecture = transformers.AutoConfig.from_pretrained(directory).architectures[0]
    kind = getattr(transformers, architecture)
    return kind.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def logits(source: str | Path | PreTrainedModel, tokens: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    """fp32 logits [batch, sequence, vocabulary] of a model or of a directory that transformers loads.

    ``inputs`` are further ones by transformers' names (``decoder_input_ids``, ``attention_mask``, …). An encoder's
    are those of its language model head.
    """
    model = load(source) if isinstance(source, str | Path) else source
    with torch.no_grad():
        result = model(input_ids=tokens, **inputs)
    return (result.prediction_logits if "prediction_logits" in result else result.logits).float()
