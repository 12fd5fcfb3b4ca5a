"""Block FP8 checkpoints of any family: what is quantised, its scales and the config are each the caller's choice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dconv.arch.registry import by_name
from dconv.checkpoint import safetensors
from dconv.checkpoint.source import expected_specs
from dconv.sharding.tensor import TensorSpec
from tests.models import config_of

BLOCK = 16
Edit = Callable[[dict[str, TensorSpec]], object]


def linear(name: str) -> bool:
    """What a release has in FP8: attention and feed-forward, not the router, the output layer and the rest."""
    return ("_proj" in name or ".experts." in name) and name.endswith(".weight") and "eh_proj" not in name


def write_fp8(
    folder: Path,
    family: str = "minimax_m2",
    *,
    quantised: Callable[[str], bool] = linear,
    quantization: dict[str, Any] | None = None,
    edit: Edit = lambda specs: None,
    value: float | None = None,
    **sizes: Any,
) -> Path:
    """A model in blocks of `BLOCK`.

    Args:
        quantised: by a tensor's name.
        quantization: more keys of ``quantization_config``, None values being left out.
        edit: changes the tensors' specs before they are written.
        value: of all scales; by default they are drawn.
    """
    known = by_name(family)
    said = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], **(quantization or {})}
    config = config_of(known, **sizes)
    config["quantization_config"] = {key: value for key, value in said.items() if value != "absent"}
    specs = expected_specs(known, known.facts(config))
    for name, spec in list(specs.items()):
        if quantised(name):
            specs[name] = TensorSpec(name, spec.shape, "f8_e4m3")
            shape = tuple(-(-n // BLOCK) for n in spec.shape)
            specs[f"{name}_scale_inv"] = TensorSpec(f"{name}_scale_inv", shape, "f32")
    edit(specs)
    size, first, offsets = safetensors.lay_out(list(specs.values()))
    body, draw = bytearray(first + bytes(size - len(first))), np.random.default_rng(0)
    for spec, offset in zip(specs.values(), offsets, strict=True):
        if spec.name.endswith("_scale_inv") and spec.dtype == "f32":
            drawn = np.exp(draw.normal(-9, 0.7, spec.shape)) if value is None else np.full(spec.shape, value)
            body[offset : offset + spec.nbytes] = drawn.astype("<f4").tobytes()
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(body)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
