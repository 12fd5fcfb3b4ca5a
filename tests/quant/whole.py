"""GPTQ, AWQ and pack-quantized checkpoints of any family, packed code by code as described: slow and obvious."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from dconv.arch.registry import by_name
from tests.quant.models import write_normal

Array = NDArray[Any]
#: Column of each nibble, the lowest first. Source: AutoAWQ's ``gemm.py``, ``order_map``.
_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def words_of(codes: list[int], bits: int) -> list[int]:
    """Codes one after another in one long number, cut into words of 32 bits."""
    number = sum(code << (bits * at) for at, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    return [(number >> (32 * at)) & 0xFFFF_FFFF for at in range(count)]


def along_rows(matrix: Array, bits: int) -> Array:
    """Every row packed: [n, m] → i32 [n, words]."""
    return np.array([words_of([int(v) for v in row], bits) for row in matrix], np.uint32).view(np.int32)


@dataclass
class Layer:
    """A weight in whole numbers: codes [out, in], zeros and scales [out, groups], the group of each column."""

    codes: Array
    zeros: Array
    scales: Array
    groups: Array
    bits: int

    @property
    def weight(self) -> Array:
        """In fp64, where it is exact."""
        difference = self.codes.astype(np.float64) - self.zeros.astype(np.float64)[:, self.groups]
        return difference * self.scales.astype(np.float64)[:, self.groups]

    def gptq(self, version: int, *, g_idx: bool = True) -> dict[str, Array]:
        zeros = self.zeros.astype(np.int64) - (version == 1)
        assert zeros.min() >= 0
        found = {
            "qweight": np.ascontiguousarray(along_rows(self.codes, self.bits).T),
            "qzeros": along_rows(zeros.T, self.bits),
            "scales": np.ascontiguousarray(self.scales.T),
        }
        return {**found, "g_idx": self.groups.astype(np.int32)} if g_idx else found

    def awq(self) -> dict[str, Array]:
        def turned(matrix: Array) -> Array:
            across = matrix.T
            eights = across.reshape(len(across), -1, 8)[:, :, list(_AWQ)]
            return along_rows(eights.reshape(across.shape), 4)

        return {"qweight": turned(self.codes), "qzeros": turned(self.zeros), "scales": self.scales.T.copy()}

    @property
    def even(self) -> bool:
        return bool((self.zeros == 1 << (self.bits - 1)).all())

    def packed(self, *, symmetric: bool = False, g_idx: bool = False) -> dict[str, Array]:
        assert self.even or not symmetric
        found = {
            "weight_packed": along_rows(self.codes, self.bits),
            "weight_scale": self.scales,
            "weight_shape": np.array(self.codes.shape, np.int64),
        }
        if not symmetric:
            found["weight_zero_point"] = np.ascontiguousarray(along_rows(self.zeros.T, self.bits).T)
        return {**found, "weight_g_idx": self.groups.astype(np.int32)} if g_idx else found


@dataclass
class Model:
    """A checkpoint and what its weights in whole numbers are, by the module's name."""

    folder: Path
    layers: dict[str, Layer] = field(default_factory=dict)


def linear(name: str) -> bool:
    return ("_proj" in name or ".experts." in name) and name.endswith(".weight") and "eh_proj" not in name


def draw(
    shape: tuple[int, int], bits: int, group: int, seed: int, *, dtype: Any = np.float16, least: int = 1,
    ordered: bool = False, even: bool = False,
) -> Layer:  # fmt: skip
    """Drawn numbers; ``least`` is the smallest zero, and with ``even`` all are half the range."""
    rng, (rows, columns) = np.random.default_rng(seed), shape
    size = columns if group < 0 else group
    groups = np.arange(columns) // size
    count = int(groups[-1]) + 1
    return Layer(
        rng.integers(0, 1 << bits, shape),
        np.full((rows, count), 1 << (bits - 1)) if even else rng.integers(least, 1 << bits, (rows, count)),
        np.exp(rng.normal(-6, 1, (rows, count))).astype(dtype),
        rng.permutation(groups) if ordered else groups,
        bits,
    )


def write(
    folder: Path,
    config: Mapping[str, Any],
    pack: Callable[[str, Layer], Mapping[str, Array]],
    *,
    family: str = "llama",
    make: Callable[[str, tuple[int, int], int], Layer] | None = None,
    quantised: Callable[[str], bool] = linear,
    beside: bool = False,
    **sizes: Any,
) -> Model:
    """A model whose linear layers are drawn numbers.

    Args:
        pack: a module and its layer → its tensors.
        make: a module, its shape and a seed → its layer.
        beside: the config is not in config.json but in quantize_config.json.
    """
    write_normal(folder, by_name(family), **sizes)
    made = Model(folder)
    tensors = load_file(folder / "model.safetensors")
    make = make or (lambda _, shape, seed: draw(shape, 4, 32, seed))
    for seed, name in enumerate(sorted(tensors)):
        if quantised(name):
            module = name.removesuffix(".weight")
            shape = tensors.pop(name).shape
            made.layers[module] = layer = make(module, (shape[0], shape[1]), seed)
            tensors |= {f"{module}.{part}": value for part, value in pack(module, layer).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    if beside:
        (folder / "quantize_config.json").write_text(json.dumps(dict(config)))
    else:
        (folder / "config.json").write_text(json.dumps({**said, "quantization_config": dict(config)}))
    return made


def gptq_config(**more: Any) -> dict[str, Any]:
    base = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
    return {**base, "checkpoint_format": "gptq", **more}


def awq_config(**more: Any) -> dict[str, Any]:
    base = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    return {**base, "modules_to_not_convert": None, **more}


def write_gptq(folder: Path, version: int = 1, *, g_idx: bool = True, **options: Any) -> Model:
    form = {1: "gptq", 2: "gptq_v2"}[version]
    said = {**gptq_config(checkpoint_format=form), **options.pop("config", {})}
    return write(folder, said, lambda _, layer: layer.gptq(version, g_idx=g_idx), **options)


def write_awq(folder: Path, **options: Any) -> Model:
    said = awq_config(**options.pop("config", {}))
    return write(folder, said, lambda _, layer: layer.awq(), **options)


def packed_config(**weights: Any) -> dict[str, Any]:
    args = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False, **weights}
    group = {"targets": ["Linear"], "weights": args}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }  # fmt: skip


def write_packed(folder: Path, *, g_idx: bool = False, **options: Any) -> Model:
    """``config`` is of the weights' arguments."""
    said = packed_config(**options.pop("config", {}))
    symmetric = said["config_groups"]["group_0"]["weights"]["symmetric"]
    return write(folder, said, lambda _, layer: layer.packed(symmetric=symmetric, g_idx=g_idx), **options)


def tensors_of(folder: Path) -> dict[str, Array]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def same(a: Array, b: Array) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def bf16(values: Array) -> Array:
    return values.astype(ml_dtypes.bfloat16)
