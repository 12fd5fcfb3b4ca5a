"""Tiny random transformers models: what a HuggingFace checkpoint must compute, said by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES: dict[str, tuple[type[PretrainedConfig], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
}

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


def tiny(family: str, *, seed: int = 0, **overrides: Any) -> tuple[PretrainedConfig, PreTrainedModel]:
    """A random fp32 model of a family in evaluation mode, with eager attention.

    Norms are spread around 1 and biases around 0 (transformers starts them at exactly 1 and 0, where a swapped or
    forgotten one would not be seen); matrices are normal with standard deviation 1/sqrt(columns), so that attention
    and MLP both move the logits.

    Args:
        family: llama, mistral, qwen2 (QKV bias), qwen3 (q/k norms) or phi3 (fused projections).
        seed: of all weights.
        overrides: fields of the family's config, over `SIZES`.

    Returns:
        config, model.
    """
    config_class, model_class = FAMILIES[family]
    config = config_class(**{**SIZES, **overrides}, dtype=torch.float32)
    config._attn_implementation = "eager"
    model = model_class(config).float().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.copy_(1 + 0.1 * values)
        elif parameter.ndim < 2:
            parameter.copy_(0.1 * values)
        else:
            parameter.copy_(values / parameter.shape[-1] ** 0.5)
    return config, model


def save(model: PreTrainedModel, directory: str | Path, shard_size: int | str | None = None) -> Path:
    """Write config and safetensors; ``shard_size`` in bytes or like ``"200KB"`` splits the weights over files."""
    model.save_pretrained(directory, max_shard_size="50GB" if shard_size is None else shard_size)
    return Path(directory)


def logits(source: str | Path | PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """fp32 logits [batch, sequence, vocabulary] of a model or of a directory that transformers loads."""
    if isinstance(source, str | Path):
        source = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return source(input_ids=tokens, use_cache=False).logits.float()
