"""Casts between the plain floating types, in numpy, which has no bfloat16 of its own.

Source of the rule: IEEE 754 round to nearest, ties to even; infinities stay, NaN stays NaN and becomes a quiet one (but
bf16 → fp32 only appends zeros, so that it is undone bit by bit).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from dconv.sharding.dtypes import carrier

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: The bit that tells a quiet NaN from a signalling one.
_QUIET: Final = {"f16": 1 << 9, "f32": 1 << 22, "f64": 1 << 51}


def cast(values: NDArray[np.generic], source: str, target: str) -> NDArray[np.generic]:
    """Cast an array held in ``carrier(source)`` to ``carrier(target)``; any shape, fp64 → bf16 rounds once."""
    if source == target:
        return values
    if target == "bf16":
        return _to_bf16(values.astype(np.float64) if source == "f64" else values.astype(np.float32))
    if source == "bf16":
        wide = _from_bf16(values)
        return wide if target == "f32" else _narrow(wide, target)
    return _narrow(values, target)


def _narrow(values: NDArray[np.generic], target: str) -> NDArray[np.generic]:
    with np.errstate(over="ignore", invalid="ignore"):  # past the range becomes infinity, as IEEE says
        found = values.astype(carrier(target), order="C")
    if (nan := np.isnan(found)).any():  # numpy quiets them or not, by how it was built
        bits = found.reshape(-1).view(f"<u{found.itemsize}")
        bits[nan.reshape(-1)] |= bits.dtype.type(_QUIET[target])
    return found


def _from_bf16(bits: NDArray[np.generic]) -> NDArray[np.generic]:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _to_bf16(values: NDArray[np.generic]) -> NDArray[np.generic]:
    if values.dtype == np.float64:
        values = _round_to_odd_f32(values)
    values = np.asarray(values, order="C")
    bits = values.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def _round_to_odd_f32(values: NDArray[np.generic]) -> NDArray[np.generic]:
    """fp64 → fp32 rounded to odd, so that the next rounding to 8 bits equals one rounding from fp64.

    Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to
    odd", IEEE Trans. Computers 57(4), 2008.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        near = values.astype(np.float32)
    back = near.astype(np.float64)
    bits = near.view(np.uint32).copy()
    inexact = (back != values) & np.isfinite(values)
    away = inexact & (np.abs(back) > np.abs(values))
    bits[away] -= np.uint32(1)  # towards zero: one step down in magnitude, infinity to the largest finite
    bits[inexact] |= np.uint32(1)
    return bits.view(np.float32)
