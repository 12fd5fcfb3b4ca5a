"""Llamas that speed and memory are measured on: of several sizes, in HuggingFace's files, of noise or of holes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from dconv.arch.llama import LLAMA
from dconv.checkpoint import safetensors
from dconv.checkpoint.source import expected_specs

MODELS: dict[str, dict[str, int]] = {
    "460M": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
             "intermediate_size": 3584, "vocab_size": 32000, "head_dim": 64},
    "3B": {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8,
           "intermediate_size": 8192, "vocab_size": 128256, "head_dim": 128},
    "70B": {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
            "intermediate_size": 28672, "vocab_size": 128256, "head_dim": 128},
}  # fmt: skip


def config_of(name: str) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192, "rope_theta": 500000.0, "tie_word_embeddings": name == "3B",
        "dtype": "bfloat16", **MODELS[name],
    }  # fmt: skip


def make_model(folder: Path, name: str, *, sparse: bool = False) -> int:
    """A random (or all-hole) Llama in bf16; returns its bytes. Kept between runs."""
    config = config_of(name)
    specs = list(expected_specs(LLAMA, LLAMA.config.facts(config)).values())
    total = sum(spec.nbytes for spec in specs)
    if (folder / "config.json").exists():
        return total
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).standard_normal(8 << 20).astype(np.float32) * 0.02
    block = (noise.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    parts = safetensors.by_size(specs, 5_000_000_000)
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        size, first, _ = safetensors.lay_out(part)
        weight_map |= {spec.name: file for spec in part}
        with (folder / file).open("wb") as out:
            out.write(first)
            if sparse:
                out.truncate(size)
            while out.tell() < size and not sparse:
                out.write(block[: size - out.tell()])
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return total
