"""mlx-lm itself loads what FORMAT mlx writes, and computes what transformers computes (scripts/mlx_env.sh)."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dconv.export import huggingface
from dconv.pipeline import Request, convert
from tests.formats.mlx_models import MODELS, write_model
from tests.models import tensors

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venvs" / "mlx" / "bin" / "python"
#: Of fp32 logits, relative to the largest. mlx-lm's Gemma has another GELU, its Gemma 3 a scale rounded to bf16.
BOUNDS = {"gemma": 1e-3, "gemma3_text": 2e-4}
IDS = (np.arange(24) * 7 + 3) % 96

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="no mlx: bash scripts/mlx_env.sh")


def _peer(folder: Path, *jobs: list[Any]) -> None:
    said = [[str(part) if isinstance(part, Path) else part for part in job] for job in jobs]
    (folder / "jobs.json").write_text(json.dumps(said))
    command = [PYTHON, "tests/formats/mlx_peer.py", folder / "jobs.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def _logits(model: Path) -> NDArray[Any]:
    import torch

    loaded = huggingface._load(model, None, "decoder", None)  # pyright: ignore[reportPrivateUsage]
    with torch.no_grad():
        return loaded(torch.tensor(IDS)[None]).logits[0].float().numpy()


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_transformers_s_and_codes_mlx_s(tmp_path: Path, name: str) -> None:
    np.save(tmp_path / "ids.npy", IDS)
    wide, model = write_model(tmp_path / "wide", name, "f32"), write_model(tmp_path / "model", name)
    for source, out, quant in (
        (wide, "wide-mlx", None),
        (model, "mlx", None),
        (model, "4bit", "4bit"),
        (wide, "coded", "4bit"),
    ):
        convert(Request(source, "mlx", tmp_path / out, quant=quant))
    ids = tmp_path / "ids.npy"
    _peer(
        tmp_path,
        ["logits", tmp_path / "wide-mlx", ids, tmp_path / "wide.npy"],
        ["logits", tmp_path / "coded", ids, tmp_path / "coded.npy"],
        ["logits", tmp_path / "coded", ids, tmp_path / "plain.npy", True],
        ["convert", tmp_path / "mlx", tmp_path / "theirs", 4, 64],
    )
    assert tensors(tmp_path / "4bit") == tensors(tmp_path / "theirs")
    expected, found = _logits(wide), np.load(tmp_path / "wide.npy")
    assert np.abs(found - expected).max() <= BOUNDS.get(name, 1e-4) * np.abs(expected).max()
    coded, plain = np.load(tmp_path / "coded.npy"), np.load(tmp_path / "plain.npy")
    assert np.abs(coded - plain).max() <= 1e-4 * np.abs(plain).max()
