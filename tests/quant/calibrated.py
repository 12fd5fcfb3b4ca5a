"""Small models for GPTQ, and requests to calibrate them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from dconv.pipeline import Request

_SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "eos_token_id": None, "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip
#: Of small models whose experts transformers keeps in one tensor.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 96},
    "mixtral": {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2,
        "norm_topk_prob": False, "intermediate_size": 96,
    },
    "olmoe": {"intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {
        "intermediate_size": 96, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1,
    },
}  # fmt: skip


def model_of(family: str, folder: Path, **more: Any) -> Path:
    """A small model as transformers writes it, with enough variance that routing is uneven."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **(_SIZES | FAMILIES[family] | more), tie_word_embeddings=False)
    net = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, value in net.named_parameters():
            if value.ndim > 1:
                value.normal_(0, 0.3)
            elif name.endswith("bias"):
                value.zero_()
    net.save_pretrained(folder)
    return folder


def request_for(model: Path, ids: Path, out: Path, *, quant: str | None = None, **said: Any) -> Request:
    """12 samples of 512 tokens are two blocks."""
    settings = {"bits": 4, "group_size": 32, "nsamples": 12, "seqlen": 512, **said}
    config = json.dumps(settings)
    return Request(model, "gptq", out, calibration=str(ids), quantization_config=config, quant=quant)
