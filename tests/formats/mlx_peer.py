"""What mlx and mlx-lm make of a directory; run by the interpreter of scripts/mlx_env.sh, which has no dconv.

python tests/formats/mlx_peer.py logits DIR IDS.npy OUT.npy [dequantised]
python tests/formats/mlx_peer.py convert DIR OUT BITS GROUP
"""

from __future__ import annotations

import sys
from pathlib import Path


def logits(folder: str, ids: str, out: str, how: str = "") -> None:
    """Logits [tokens, vocabulary] of a prompt, in fp32 where the weights are."""
    import mlx.core as mx  # pyright: ignore[reportMissingImports]
    import numpy as np
    from mlx_lm.utils import dequantize_model, load_model  # pyright: ignore[reportMissingImports]

    mx.set_default_device(mx.cpu)
    model, _ = load_model(Path(folder), strict=True)
    if how == "dequantised":
        model = dequantize_model(model)
    found = model(mx.array(np.load(ids))[None])[0]
    np.save(out, np.array(found.astype(mx.float32)))


def convert(folder: str, out: str, bits: str, group: str) -> None:
    """What ``mlx_lm.convert`` makes of a HuggingFace directory, without its tokenizer."""
    import mlx.core as mx  # pyright: ignore[reportMissingImports]
    import mlx_lm.utils as utils  # pyright: ignore[reportMissingImports]
    from mlx.utils import tree_map_with_path  # pyright: ignore[reportMissingImports]

    mx.set_default_device(mx.cpu)
    model, config = utils.load_model(Path(folder), lazy=True)
    dtype = getattr(mx, config["torch_dtype"])
    keeps = getattr(model, "cast_predicate", lambda _: True)
    model.update(
        tree_map_with_path(
            lambda k, v: v.astype(dtype) if keeps(k) and mx.issubdtype(v.dtype, mx.floating) else v, model.parameters()
        )
    )
    if int(bits):
        model, config = utils.quantize_model(model, config, int(group), int(bits))
    utils.save_model(out, model)
    utils.save_config(config, Path(out) / "config.json")


if __name__ == "__main__":
    {"logits": logits, "convert": convert}[sys.argv[1]](*sys.argv[2:])
