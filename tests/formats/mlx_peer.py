"""What mlx and mlx-lm make of directories; run by the interpreter of scripts/mlx_env.sh, which has no dconv.

python tests/formats/mlx_peer.py JOBS.json      a list of [what, arguments…], see `DO`
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm import utils

mx.set_default_device(mx.cpu)


def logits(folder: str, ids: str, out: str, dequantised: bool = False) -> None:
    """Logits [tokens, vocabulary] of a prompt; every tensor of the directory has to be the model's, and the reverse."""
    model, _ = utils.load_model(Path(folder), strict=True)
    if dequantised:
        model = utils.dequantize_model(model)
    found = model(mx.array(np.load(ids))[None])[0]
    np.save(out, np.array(found.astype(mx.float32)))


def names(folder: str, out: str) -> None:
    """Names and shapes of what the class that a config.json names has."""
    config = json.loads((Path(folder) / "config.json").read_text())
    model_class, args_class = utils._get_classes(config)
    model = model_class(args_class.from_dict(config))
    model.sanitize({}) if config["model_type"] == "gemma3_text" and config["tie_word_embeddings"] else None
    found = {name: list(value.shape) for name, value in tree_flatten(model.parameters())}
    Path(out).write_text(json.dumps(found))


def convert(folder: str, out: str, bits: int, group: int) -> None:
    """What ``mlx_lm.convert`` makes of a HuggingFace directory, without its tokenizer."""
    model, config = utils.load_model(Path(folder), lazy=True)
    dtype = getattr(mx, config["torch_dtype"])
    keeps = getattr(model, "cast_predicate", lambda _: True)

    def in_its_dtype(name: str, value: Any) -> Any:
        return value.astype(dtype) if keeps(name) and mx.issubdtype(value.dtype, mx.floating) else value

    model.update(tree_map_with_path(in_its_dtype, model.parameters()))
    if bits:
        model, config = utils.quantize_model(model, config, group, bits)
    utils.save_model(out, model)
    utils.save_config(config, Path(out) / "config.json")


def quantise(weights: str, out: str) -> None:
    """``mx.quantize`` of arrays named ``dtype.bits.group`` in a .npz, as three arrays each; bf16 as its bits."""
    made: dict[str, Any] = {}
    kinds = {"f32": mx.float32, "bf16": mx.bfloat16, "f16": mx.float16}
    for name, values in np.load(weights).items():
        dtype, bits, group = name.split(".")
        parts = mx.quantize(mx.array(values).astype(kinds[dtype]), int(group), int(bits))
        for part, value in zip(("weight", "scales", "biases"), parts, strict=True):
            made[f"{name}.{part}"] = np.array(value.view(mx.uint16) if value.dtype == mx.bfloat16 else value)
    np.savez(out, **made)


DO = {"logits": logits, "names": names, "convert": convert, "quantise": quantise}

if __name__ == "__main__":
    for what, *arguments in json.loads(Path(sys.argv[1]).read_text()):
        DO[what](*arguments)
