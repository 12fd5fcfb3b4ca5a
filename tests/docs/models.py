"""What the names in the documentation stand for where its commands run: tiny models with random weights, by one seed.

Every name that a page lists in ``<!-- models: … -->`` is an entry here.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from dconv.arch.registry import by_name
from tests.docs.commands import ROOT
from tests.formats.gguf_tokenizers import byte_pairs
from tests.quant.models import write_normal

#: Wide enough for K-quants' blocks of 256 and FP8's of 128, small enough for seconds.
_SIZES: Final[Mapping[str, Any]] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 320, "max_position_embeddings": 2048,
    "bos_token_id": None, "eos_token_id": 260, "pad_token_id": None,
}  # fmt: skip
_MOE: Final = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
_TEXT: Final = (
    "A checkpoint is what is left of a training run when the machines are given back. It holds numbers and names, "
    "and a promise that the two belong together. Whoever moves it keeps the promise or breaks it. "
)


def llama(folder: Path, family: str = "llama", **sizes: Any) -> None:
    """A HuggingFace directory that transformers itself wrote, with a tokenizer of bytes."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**_SIZES, **sizes}, tie_word_embeddings=False)
    net = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    net.save_pretrained(folder)
    byte_pairs(folder)


def plain(folder: Path, family: str, **sizes: Any) -> None:
    """One of a family that transformers may lack."""
    write_normal(folder, by_name(family), **{**_SIZES, **sizes})
    byte_pairs(folder)


def minicpm(folder: Path) -> None:
    """MiniCPM with its muP scalars, without sparse attention."""
    plain(folder, "minicpm", head_dim=None, hidden_size=64, intermediate_size=128, num_key_value_heads=8)
    config = json.loads((folder / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in ("sparse_config", "mup_denominator")}
    (folder / "config.json").write_text(json.dumps(kept))


def surprising(folder: Path) -> None:
    """A Llama with a tensor that no Llama has, in each layer."""
    import torch
    from safetensors.torch import load_file, save_file

    llama(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"model.layers.{layer}.mlp.surprise.weight": torch.zeros(4, 4) for layer in range(4)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def prose(path: Path) -> None:
    """A text to calibrate on."""
    path.write_text(_TEXT * 400)


def _converted(source: str, *words: str) -> Callable[[Path], None]:
    """What ``dconv convert`` makes of another entry."""

    def make(out: Path) -> None:
        had = (out.parent / source).exists()
        if not had:
            MODELS[source](out.parent / source)
        command = [sys.executable, "-m", "dconv", "convert", source, *words, "-o", out.name, "--quiet"]
        subprocess.run(command, cwd=out.parent, check=True, stdout=subprocess.DEVNULL)
        if not had:
            shutil.rmtree(out.parent / source)

    return make


MODELS: Final[Mapping[str, Callable[[Path], object]]] = {
    "llama-8b": llama,
    "MODEL": lambda folder: llama(
        folder,
        hidden_size=288,
        intermediate_size=576,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_hidden_layers=2,
    ),
    "qwen3-8b": lambda folder: llama(folder, "qwen3"),
    "qwen3-30b": lambda folder: llama(folder, "qwen3_moe", **_MOE, num_experts=4),
    "olmoe": lambda folder: llama(folder, "olmoe", intermediate_size=128, num_experts=4, num_experts_per_tok=2),
    "minicpm-2b": minicpm,
    "minimax-bf16": lambda folder: llama(
        folder, "minimax_m2", num_local_experts=4, num_experts_per_tok=2, intermediate_size=128, rotary_dim=16
    ),
    "minimax-m2": _converted("minimax-bf16", "fp8"),
    "megatron-run": _converted("llama-8b", "megatron", "--tp", "2", "--pp", "2"),
    "qwen3-megatron": _converted("qwen3-30b", "megatron", "--tp", "2", "--ep", "2"),
    "house-llama": surprising,
    "prose.txt": prose,
    "dconv-house": lambda folder: shutil.copytree(
        ROOT / "tests" / "plugin", folder, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info", "test_*")
    ),
}
