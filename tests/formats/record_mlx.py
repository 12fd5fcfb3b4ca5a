"""Writes what MLX and mlx-lm make of our small models: their environment is another than ours.

By hand, with the environment of scripts/mlx_env.sh::

    PYTHONPATH=. python tests/formats/record_mlx.py .venvs/mlx/bin/python
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from dconv.pipeline import Request, convert
from tests.codec.test_affine import NAMES, RECORDED, digest, weights
from tests.formats.mlx_models import MODELS, SMALL, write_model

HERE = Path(__file__).parent / "recorded" / "mlx"


def main(python: str) -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    base = Path(tempfile.mkdtemp())
    jobs: list[list[Any]] = []
    for name in MODELS:
        convert(Request(write_model(base / name, name), "mlx", base / f"{name}-mlx"))
        jobs.append(["names", f"{base}/{name}-mlx", f"{base}/{name}.json"])
    for (name, bits, group), more in SMALL.items():
        folder = f"{name}_{bits}bit_g{group}"
        write_model(base / folder, name, **more)
        jobs.append(["convert", f"{base / folder}", f"{HERE / folder}", bits, group])
    dense: dict[str, Any] = {name: weights(name.split(".")[0]) for name in NAMES}
    np.savez(base / "weights.npz", **dense)
    jobs.append(["quantise", f"{base}/weights.npz", f"{base}/codes.npz"])
    (base / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run([python, "tests/formats/mlx_peer.py", base / "jobs.json"], check=True)
    names = {name: json.loads((base / f"{name}.json").read_text()) for name in MODELS}
    (HERE / "names.json").write_text(json.dumps(names, indent=0, sort_keys=True) + "\n")
    codes = np.load(base / "codes.npz")
    found = {name: [digest(codes[f"{name}.{part}"]) for part in ("weight", "scales", "biases")] for name in NAMES}
    RECORDED.write_text(json.dumps(found, indent=0) + "\n")
    shutil.rmtree(base)


if __name__ == "__main__":
    main(sys.argv[1])
