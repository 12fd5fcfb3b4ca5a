"""Records what torchao 0.18.0 makes of MX blocks, in ``torchao_mx.npz``: run it by hand where torchao is installed.

torchao is not a test dependency: with it, transformers takes seconds longer to import and writes to stderr.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.codec.tensors import tensors

LARGEST = {"e2m1": 6, "e2m3": 7.5, "e3m2": 28, "e4m3": 448, "e5m2": 57344}
RULES = {"floor": "FLOOR", "ceil": "RCEIL", "even": "EVEN"}


def record() -> dict[str, Any]:
    import torchao
    from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2
    from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx

    formats = {
        "e2m1": torch.float4_e2m1fn_x2, "e2m3": DTYPE_FP6_E2M3, "e3m2": DTYPE_FP6_E3M2,
        "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2,
    }  # fmt: skip
    x = np.concatenate(list(tensors(240, (1, 32))))
    found: dict[str, Any] = {"version": torchao.__version__, "x": x.view(np.uint32)}
    for name, kind in formats.items():
        for rule, theirs in RULES.items():
            scale, codes = to_mx(torch.from_numpy(x), kind, 32, ScaleCalculationMode[theirs])
            found[f"{name} {rule} codes"] = codes.view(torch.uint8).numpy()
            found[f"{name} {rule} scale"] = scale.view(torch.uint8).numpy()
        # one element just above what a power of two makes of the largest
        steps = np.array([1, 2, 3, 4, 8, 16, 64, 256, 1024], np.float32) * np.float32(2**-22) + np.float32(1)
        powers = np.ldexp(np.float32(LARGEST[name]), np.arange(-60, 61, 8))
        near = np.zeros((steps.size * powers.size, 32), np.float32)
        near[:, 5] = np.outer(powers, steps).reshape(-1)
        scale, _ = to_mx(torch.from_numpy(near), kind, 32, ScaleCalculationMode.RCEIL)
        found[f"{name} near"], found[f"{name} near scale"] = near.view(np.uint32), scale.view(torch.uint8).numpy()
    return found


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **record())
