"""Tiny models as FORMAT onnx, each converted once in a run of the tests."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch

from dconv.export.onnx_run import Runs
from dconv.pipeline import Job, prepare, run
from dconv.request import Request
from dconv.sharding.rank import Settings
from tests.oracles import hf

#: Two layers, so that a graph is traced in half the time.
SMALL: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 2},
    "gemma": {"num_hidden_layers": 2},
    "mixtral": {"num_hidden_layers": 1, "num_local_experts": 4},
    "bert": {"num_hidden_layers": 2},
    "t5": {"num_layers": 2},
}
_ROOT = Path(mkdtemp(prefix="dconv-onnx-tests-"))


@dataclass(frozen=True)
class Made:
    """A model, and what became of it."""

    model: Any
    source: Path
    out: Path
    job: Job

    @property
    def runs(self) -> Runs:
        return Runs(self.out)

    @property
    def narrow(self) -> Any:
        """transformers' own of the same, in fp16."""
        kind = type(self.model)
        return kind.from_pretrained(self.source, dtype=torch.float16, attn_implementation="eager").eval()


def source(name: str, small: bool = True) -> tuple[Any, Path]:
    return _source(name, small)


@cache
def _source(name: str, small: bool) -> tuple[Any, Path]:
    _, model = hf.tiny(name, **(SMALL.get(name, {}) if small else {}))
    return model, hf.save(model, _ROOT / f"{name}-{small}")


def made(name: str, dtype: str = "f32", quant: str | None = None, small: bool = True) -> Made:
    return _made(name, dtype, quant, small)


@cache
def _made(name: str, dtype: str, quant: str | None, small: bool) -> Made:
    model, folder = source(name, small)
    out = _ROOT / f"{name}-{dtype}-{quant}-{small}"
    job = prepare(Request(folder, "onnx", out, dtype=dtype, quant=quant))
    run(job, Settings())
    return Made(model, folder, out, job)


def tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 320, (batch, length), np.int64)


def theirs(model: Any, ids: np.ndarray, **more: np.ndarray) -> np.ndarray:
    """transformers' logits."""
    given = {key: torch.from_numpy(value) for key, value in more.items()}
    return hf.logits(model, torch.from_numpy(ids), **given).numpy()


def apart(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, relative to the largest logit."""
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())
