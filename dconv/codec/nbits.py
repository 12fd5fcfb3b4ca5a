"""Whole numbers of 4 or 8 bits as onnxruntime's MatMulNBits has them: w = scale × (code - half), for each block.

Source: onnxruntime 1.31.1, ``MlasQuantizeBlockwise`` as ``quantize_matmul_4bits`` and ``quantize_matmul_8bits`` call it
with symmetric blocks, whose numbers these are (`tests/codec/test_nbits.py`). The weight farthest from zero becomes
code 0, so the scale has the other sign of it: -extreme / half, in fp32, rounded to the dtype that it is stored in.

Error of `encode`: half a step, where the step is the largest magnitude of the block divided by half (8 or 128); of a
weight that is as far from zero on the other side a whole step, since there the codes end one earlier; and the scale's
own rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from dconv.codec.cast import cast
from dconv.errors import Damaged

if TYPE_CHECKING:
    from numpy.typing import NDArray

BITS: Final = (4, 8)


def scales(weights: NDArray[np.float32], bits: int, block: int, dtype: str) -> NDArray[np.generic]:
    """Scales [..., blocks] in ``carrier(dtype)`` of weights [..., blocks × ``block``].

    Raises:
        Damaged: a weight is not finite, for which there is no code.
    """
    parts = _blocks(weights, block)
    low: NDArray[np.float32] = parts.min(-1)
    high: NDArray[np.float32] = parts.max(-1)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise Damaged(
            "a weight that is to be stored in codes is not a finite number",
            expected="numbers: NaN and infinity have no code",
            do="without --quant the weights are written as they are",
        )
    farther: NDArray[np.bool] = np.abs(high) > np.abs(low)
    farthest: NDArray[np.float32] = np.where(farther, high, low)
    return cast((farthest / np.float32(-_half(bits))).astype(np.float32), "f32", dtype)


def encode(weights: NDArray[np.float32], bits: int, block: int, dtype: str) -> NDArray[np.uint8]:
    """Codes u1 [..., blocks × ``block``] by the scales that `scales` gives.

    Raises:
        Damaged: see `scales`.
    """
    scale = cast(scales(weights, bits, block, dtype), dtype, "f32").view(np.float32)
    some = scale != 0
    with np.errstate(over="ignore"):
        inverse = np.where(some, np.float32(1) / np.where(some, scale, np.float32(1)), np.float32(0))
    found = _blocks(weights, block) * inverse[..., None].astype(np.float32) + np.float32(_half(bits))
    found = np.floor(np.abs(found) + np.float32(0.5)) * np.sign(found)  # half away from zero, as roundf
    return np.clip(found, 0, 2 * _half(bits) - 1).astype(np.uint8).reshape(weights.shape)


def decode(codes: NDArray[np.uint8], scale: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """Weights [..., columns] of codes [..., columns] and scales [..., blocks] in fp32."""
    parts = codes.reshape(*scale.shape, -1).astype(np.float32) - np.float32(_half(bits))
    return (parts * scale[..., None]).reshape(codes.shape)


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Bytes [..., columns × bits / 8]; of two codes in a byte the first is the low half."""
    return codes if bits == 8 else np.bitwise_or(codes[..., 0::2], np.left_shift(codes[..., 1::2], 4), dtype=np.uint8)


def unpack(data: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes u1 [..., columns] of bytes that `pack` made."""
    if bits == 8:
        return data
    return np.stack([data & 15, data >> 4], -1).reshape(*data.shape[:-1], -1).astype(np.uint8)


def _half(bits: int) -> int:
    return 1 << (bits - 1)


def _blocks(weights: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    return weights.reshape(*weights.shape[:-1], weights.shape[-1] // block, block)
