"""What the tests of ``inspect --explain`` share: small models, and the codes of FP8 ones as torch reads them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

import dconv
from dconv.arch.registry import by_name
from tests.quant.models import write_normal

Weights = dict[str, NDArray[np.float64]]
E4M3 = torch.float8_e4m3fn
BLOCK = (32, 32)


@dataclass(frozen=True)
class Stored:
    """The codes and scales of an FP8 checkpoint, as torch reads them."""

    codes: dict[str, torch.Tensor]
    scales: dict[str, torch.Tensor]
    block: tuple[int, int]
    divides: bool = False

    def each(self, name: str) -> NDArray[np.float64]:
        """What multiplies each code of a tensor."""
        found, (rows, columns) = self.scales[name].double().numpy(), self.codes[name].shape
        found = found if found.ndim == 2 else found.reshape(1, 1)
        grid = found[np.ix_(np.arange(rows) // self.block[0], np.arange(columns) // self.block[1])]
        return 1 / grid if self.divides else grid

    def weights(self) -> Weights:
        return {name: codes.double().numpy() * self.each(name) for name, codes in self.codes.items()}


def plain(folder: Path, family: str = "minimax_m2", **sizes: Any) -> Path:
    return write_normal(folder, by_name(family), **{"num_hidden_layers": 2, **sizes})


def stored_in(folder: Path, block: tuple[int, int] = BLOCK, divides: bool = False) -> Stored:
    tensors = load_file(folder / "model.safetensors")
    codes = {name: value for name, value in tensors.items() if value.dtype == E4M3}
    return Stored(codes, {name: tensors[f"{name}_scale_inv"] for name in codes}, block, divides)


def said(path: Path, asked: str | bool = True, **options: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dconv.inspect(path, explain=asked, **options).to_dict()))["explained"]


def linear(name: str) -> bool:
    return "_proj" in name or ".experts." in name
