"""Block FP8 as released models store it: which scale belongs to which weight. Values are not looked at here.

A weight ``X`` in FP8 (e4m3) has its scales under ``X_scale_inv``, one for each block, edges included. Source:
``FP8Linear`` in transformers' ``integrations/finegrained_fp8.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from dconv.checkpoint.source import shape_error
from dconv.errors import Damaged, Refused, group_names
from dconv.sharding.tensor import Stored, TensorSpec

_SUFFIX: Final = "_scale_inv"
FP8: Final = "f8_e4m3"
_BLOCK: Final = (128, 128)


def block_of(config: Mapping[str, object] | None) -> tuple[int, int]:
    """Rows and columns that share a scale.

    Raises:
        Damaged: ``weight_block_size`` is no pair of positive whole numbers.
    """
    said = config.get("quantization_config") if config else None
    size = said.get("weight_block_size") if isinstance(said, Mapping) else None
    if size is None:
        return _BLOCK
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise Damaged(
            "weight_block_size is no pair of positive whole numbers",
            where="config.json: quantization_config.weight_block_size",
            found=f"{size!r:.80}",
        )
    return size[0], size[1]


def is_block_fp8(config: Mapping[str, object]) -> bool:
    """Whether config.json says that the weights are in block FP8."""
    said = config.get("quantization_config")
    return isinstance(said, Mapping) and said.get("quant_method") == "fp8"


def pair(tensors: Mapping[str, Stored], block: tuple[int, int]) -> set[str]:
    """Names of the scales, each proved to belong to a weight in FP8, and every such weight to have one.

    Raises:
        Damaged: a weight without its scale, a scale without its weight, or one of another shape than the blocks make.
    """
    weights = {name for name, stored in tensors.items() if stored.spec.dtype == FP8}
    scales = {name for name in tensors if name.endswith(_SUFFIX)}
    alone = sorted(name for name in weights if name + _SUFFIX not in scales)
    if alone:
        raise Damaged(
            f"{len(alone)} of {len(weights)} FP8 weights have no scale, without which their codes mean nothing",
            where=group_names(alone),
            expected=f"{alone[0]}{_SUFFIX} beside it",
            do="fetch the files again; a model that was cast to FP8 without scales cannot be restored",
        )
    idle = sorted(name for name in scales if name.removesuffix(_SUFFIX) not in weights)
    if idle:
        raise Damaged(
            f"{len(idle)} scales belong to no FP8 weight",
            where=group_names(idle),
            expected=f"{idle[0].removesuffix(_SUFFIX)} in {FP8}",
        )
    for name in weights:
        scale, shape = tensors[name + _SUFFIX], tensors[name].spec.shape
        expected = tuple(-(-n // step) for n, step in zip(shape, block, strict=False))
        if len(shape) != len(block) or scale.spec.shape != expected:
            raise shape_error(name + _SUFFIX, scale.extents[0].file, expected, scale.spec.shape)
    return scales


def refuse_quantized(config: Mapping[str, object], where: Path) -> None:
    """A quantised source needs its decoder; moving its codes as plain numbers would ruin it.

    Block FP8 is described (each weight with its scales) and refused when it is to be converted.
    """
    if config.get("quantization_config") and not is_block_fp8(config):
        raise Refused(
            "the source is quantised, which this version does not decode, nothing was written",
            where=f"quantization_config in {where / 'config.json'}",
            expected="bf16, f16 or f32 weights",
        )


def refuse_fp8(specs: Iterable[TensorSpec], where: Path) -> None:
    """Refuse to convert weights whose values are codes times"""
    codes = [spec.name for spec in specs if spec.dtype == FP8]
    if codes:
        raise Refused(
            f"{len(codes)} tensors are in FP8, which this version does not decode, nothing was written",
            where=f"{group_names(codes)}\nin {where}",
            expected="bf16, f16 or f32 weights",
            do="dconv inspect pairs them with their scales",
        )
