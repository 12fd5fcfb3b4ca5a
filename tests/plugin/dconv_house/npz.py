"""FORMAT npz: one numpy archive, each tensor in fp32 under HuggingFace's name."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import dconv
from dconv.checkpoint import safetensors
from dconv.errors import DconvError

_FILE = "model.npz"


class Npz:
    """An engine: three answers, and no exception for what is wrong with a model."""

    def convert(self, model: str | Path, out: str | Path, **options: Any) -> tuple[bool, dict[str, Any] | None]:
        """By way of a HuggingFace directory, in which dconv has named, cut, decoded and cast everything already."""
        out = Path(out)
        if out.exists():
            return False, {"error": f"{out} exists", "exit_code": 2}
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            try:
                dconv.convert(model, "huggingface", Path(folder) / "hf", dtype="f32", **options)
            except DconvError as error:
                return False, {"error": str(error), "exit_code": error.exit_code}
            arrays = _arrays(Path(folder) / "hf")
            made = Path(folder) / "made"
            made.mkdir()
            np.savez(made / _FILE, **arrays)
            made.rename(out)  # whole, or not there
        return True, {"out": str(out), "tensors": len(arrays)}

    def validate(self, path: str | Path) -> bool:
        """Whether the archive is there and every number in it is one."""
        try:
            with np.load(Path(path) / _FILE, allow_pickle=False) as arrays:
                return all(np.isfinite(arrays[name]).all() for name in arrays.files)
        except (OSError, ValueError):
            return False

    def can_infer(self, path: str | Path) -> bool:
        """Nothing runs it."""
        return False


def _arrays(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = np.memmap(file, np.uint8, "r")
        for name, stored in safetensors.read_header(file).items():
            (extent,) = stored.extents
            raw = data[extent.offset : extent.offset + stored.spec.nbytes]
            found[name] = raw.view(np.float32).reshape(stored.spec.shape)
    return found


ENGINE = Npz()
