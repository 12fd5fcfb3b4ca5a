"""MiniCPM-V 2.6 put together from public parts: transformers' Qwen2 and SigLIP, and torch's attention as a resampler.

Its modules have the names of OpenBMB's ``modeling_minicpmv.py`` and ``resampler.py``, so that ``state_dict`` is what a
checkpoint has. Only the language model is ever asked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from tests.oracles import hf

VISION: dict[str, Any] = {
    "model_type": "siglip", "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "image_size": 42, "patch_size": 14,
}  # fmt: skip


class Resampler(nn.Module):
    def __init__(self, queries: int, hidden: int, tower: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(queries, hidden))
        self.kv_proj = nn.Identity() if tower == hidden else nn.Linear(tower, hidden, bias=False)
        self.attn = nn.MultiheadAttention(hidden, 1)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(hidden) for _ in range(3))
        self.proj = nn.Parameter(torch.zeros(hidden, hidden))


class MiniCPMV(nn.Module):
    """Around a Qwen2, whose weights stay as they are."""

    def __init__(self, llm: Any, keys: dict[str, Any]) -> None:
        super().__init__()
        config = transformers.SiglipVisionConfig(**{**keys["vision_config"], "vision_use_head": False})
        tower: Any = transformers.SiglipVisionModel(config)
        self.llm, self.vpm = llm, getattr(tower, "vision_model", tower)
        if keys["drop_vision_last_layer"]:
            self.vpm.encoder.layers = self.vpm.encoder.layers[:-1]
        self.resampler = Resampler(keys["query_num"], llm.config.hidden_size, config.hidden_size)


def tiny(seed: int = 0, drop: bool = False, vision: dict[str, Any] | None = None, **sizes: Any) -> tuple[Any, Any]:
    """config.json and model: a random fp32 Qwen2 (`hf.tiny`), all else normally distributed."""
    plain, llm = hf.tiny("qwen2", seed=seed, **sizes)
    keys = {
        "architectures": ["MiniCPMV"], "model_type": "minicpmv", "version": 2.6, "query_num": 5,
        "drop_vision_last_layer": drop, "image_size": 42, "vision_config": {**VISION, **(vision or {})},
        "auto_map": {"AutoModel": "modeling_minicpmv.MiniCPMV"},
    }  # fmt: skip
    model = MiniCPMV(llm, keys).requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if not name.startswith("llm."):
            value.copy_(torch.randn(value.shape, generator=draw))
    return {**plain.to_dict(), **keys}, model


def save(config: dict[str, Any], model: Any, folder: Path) -> Path:
    """A checkpoint, with the code that such a one has beside it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_minicpmv.py").write_text("raise SystemExit('code of a checkpoint was run')\n")
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del state["llm.lm_head.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
