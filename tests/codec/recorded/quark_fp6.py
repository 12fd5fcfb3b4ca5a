"""Records how amd-quark 0.13 packs FP6 values, in ``quark_fp6.npz``: run it by hand where amd-quark is installed.

amd-quark is not a test dependency: it brings some thirty packages and compiles a kernel when it is imported.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

FORMATS = {"e2m3": ml_dtypes.float6_e2m3fn, "e3m2": ml_dtypes.float6_e3m2fn}


def record() -> dict[str, Any]:
    from quark.torch.utils import create_pack_method  # pyright: ignore

    codes = np.random.default_rng(0).integers(0, 64, (240, 32), dtype=np.uint8)
    found: dict[str, Any] = {"version": version("amd-quark"), "codes": codes}
    for name, dtype in FORMATS.items():
        method = create_pack_method("per_group", f"fp6_{name}")
        packed = method.pack(torch.from_numpy(codes.view(dtype).astype(np.float32)), reorder=False)
        found[f"{name} packed"] = packed.numpy()
        found[f"{name} values"] = method.unpack(packed, reorder=False).numpy()
    return found


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **record())
