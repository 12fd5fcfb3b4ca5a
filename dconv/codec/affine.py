"""MLX's affine codes: w = scale × code + bias, for each group of columns; encoded as MLX does, bit by bit.

Source: MLX 0.32.4 on a CPU (``mlx/backend/cpu/quantized.cpp``), whose numbers these are (`tests/codec/test_affine.py`).
The bias is the edge of the group that is farther from zero, and the scale is such that zero has a code of its own, or
nearly: the edge divided by a whole number. All in fp32, rounded to nearest even where a whole number is asked for.

Error of `encode`: at most one step, which is (largest - smallest) / (2^bits - 1), stretched by what makes the edge a
whole number of steps: 2 × that at most; and the rounding of scale and bias to the weight's dtype.
Error of `decode`: half a unit in the last place, since code × scale + bias is rounded once, from fp64, which holds the
product of 8 and 24 bits exactly and rounds the sum by 2^-53 of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from dconv.codec.cast import cast
from dconv.errors import Damaged

if TYPE_CHECKING:
    from numpy.typing import NDArray

BITS: Final = (2, 3, 4, 5, 6, 8)
GROUPS: Final = (32, 64, 128)
#: The smallest step, before it is made to fit the edge.
_LEAST: Final = np.float32(1e-7)


def steps(weights: NDArray[np.float32], bits: int, group: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scales and biases [..., groups] of weights [..., groups × ``group``].

    Raises:
        Damaged: a weight is not finite, or two of a group are so far apart that their distance is not: MLX has no
            codes for these.
    """
    parts = _parts(weights, group)
    low: NDArray[np.float32] = parts.min(-1)
    high: NDArray[np.float32] = parts.max(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        apart = high - low
    if not np.isfinite(apart).all():
        raise Damaged(
            "a weight that is to be stored in codes is not a finite number, or its distance to another",
            expected="numbers: NaN and infinity have no code",
            do="without --quant the weights are written as they are",
        )
    with np.errstate(over="ignore", invalid="ignore"):
        scale: NDArray[np.float32] = np.maximum(apart / np.float32((1 << bits) - 1), _LEAST)
        below: NDArray[np.bool] = np.abs(low) > np.abs(high)
        scale = np.where(below, scale, -scale)
        edge = np.where(below, low, high)
        whole: NDArray[np.float32] = np.rint(edge / scale)
        some: NDArray[np.bool] = whole != 0
        scale = np.where(some, edge / np.where(some, whole, np.float32(1)), scale)
    return scale.astype(np.float32), np.where(some, edge, np.float32(0)).astype(np.float32)


def encode(weights: NDArray[np.float32], bits: int, group: int) -> NDArray[np.uint8]:
    """Codes u1 of weights [..., groups × ``group``], by `steps` before these are rounded to the weights' dtype.

    Raises:
        Damaged: see `steps`.
    """
    scale, bias = steps(weights, bits, group)
    found = np.rint((_parts(weights, group) - bias[..., None]) / scale[..., None])
    return np.clip(found, 0, (1 << bits) - 1).astype(np.uint8).reshape(weights.shape)


def decode(
    codes: NDArray[np.uint8],
    scales: NDArray[np.generic],
    biases: NDArray[np.generic],
    *,
    source: str,
    target: str,
    factor: float = 1.0,
) -> NDArray[np.generic]:
    """Weights [..., columns] in ``carrier(target)``.

    Args:
        codes: u1 [..., columns].
        scales: [..., groups] in ``carrier(source)``; columns are whole groups.
        biases: [..., groups], as the scales; what code 0 stands for.
        source: the dtype of scales and biases.
        target: f64, f32, f16 or bf16.
        factor: multiplies every weight; it adds one rounding to fp64.
    """
    scale, bias = (cast(found, source, "f64").view("<f8")[..., None] for found in (scales, biases))
    with np.errstate(over="ignore", invalid="ignore"):
        found = codes.reshape(*scales.shape, -1) * scale + bias
        if factor != 1.0:
            found *= factor
    return cast(found.reshape(codes.shape), "f64", target)


def _parts(weights: NDArray[np.float32], group: int) -> NDArray[np.float32]:
    return weights.reshape(*weights.shape[:-1], weights.shape[-1] // group, group)
