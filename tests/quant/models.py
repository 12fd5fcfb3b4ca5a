"""Small checkpoints with weights as a trained model has them, for formats that look at values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dconv.arch.family import Family
from dconv.checkpoint import safetensors
from dconv.checkpoint.source import expected_specs
from tests.models import KEYS, config_of, facts_of

#: What a family's own keys have narrower, all of it in-features of some layer: latent attention, Mamba, experts.
NARROW = {
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "kv_lora_rank": 32, "q_lora_rank": 32,
    "v_head_dim": 8, "mamba_head_dim": 16, "moe_shared_expert_intermediate_size": 32,
}  # fmt: skip
#: Wide enough for blocks of 32 columns.
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def sizes_of(family: Family) -> dict[str, Any]:
    """`SIZES` less what a family's own keys rule out, `NARROW` for them."""
    own = KEYS.get(family.name, {})
    sizes = {key: value for key, value in SIZES.items() if own.get(key, value) is not None}
    return sizes | {key: value for key, value in NARROW.items() if own.get(key) is not None}


def write_normal(folder: Path, family: Family, *, seed: int = 0, **sizes: Any) -> Path:
    """A HuggingFace directory of normally distributed bf16 weights, each tensor with a spread of its own."""
    folder.mkdir(parents=True)
    config = config_of(family, **{**sizes_of(family), **sizes})
    facts = facts_of(family, config)
    specs = expected_specs(family, facts)
    _, first, _ = safetensors.lay_out(list(specs.values()))
    draw, body = np.random.default_rng(seed), bytearray(first)
    for spec in specs.values():
        values = draw.normal(0, np.exp(draw.normal(-3, 1)), spec.shape)
        if len(spec.shape) == 2 and spec.shape[0] > 3:
            values[1, 3:9], values[2] = 0, values[2] * 1e-4  # zeros, and a row far smaller than its block
        body += values.astype(ml_dtypes.bfloat16).tobytes()
    (folder / "model.safetensors").write_bytes(body)
    (folder / "config.json").write_text(json.dumps(config, indent=3))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


def values_of(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor of a HuggingFace directory that is floating, as float64."""
    found = {}
    kinds = {"BF16": ml_dtypes.bfloat16, "F32": np.float32, "F16": np.float16}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__" and entry["dtype"] in kinds:
                low, high = entry["data_offsets"]
                raw = np.frombuffer(data[8 + length + low : 8 + length + high], kinds[entry["dtype"]])
                found[name] = raw.astype(np.float64).reshape(entry["shape"])
    return found
