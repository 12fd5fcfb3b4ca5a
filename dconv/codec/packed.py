"""compressed-tensors' integer tensors ↔ codes and zeros: ``pack-quantized``, ``int-quantized``, ``naive-quantized``.

Its values are signed; they and their zero points are raised by half the range here, which leaves the difference, and so
the weight, as it is. A symmetric weight has `middle` as its zero. Which of two word layouts a ``pack-quantized``
checkpoint has, `dconv.codec.bitpack.layout_of` tells from the shapes. Source: compressed-tensors 0.20.0 (``stream``)
and 0.12.2 (``padded``), ``pack_to_int32``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dconv.codec import bitpack

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dconv.codec.bitpack import Layout

_SIGN = np.uint8(128)


def middle(bits: int) -> int:
    """The zero of a symmetric weight: half the range."""
    return 1 << (bits - 1)


def unpack_weight(
    weight_packed: NDArray[np.generic], bits: int, columns: int, layout: Layout = "stream"
) -> NDArray[np.uint8]:
    """``weight_packed`` [out, words of the input] → codes u1 [out, in]; ``columns`` is in, or a part from a word on.

    Raises:
        Damaged: another number of words than ``columns`` codes take.
    """
    return bitpack.unpack(weight_packed, bits, columns, layout)


def pack_weight(codes: NDArray[np.uint8], bits: int, layout: Layout = "stream") -> NDArray[np.uint32]:
    """Codes u1 [out, in] → ``weight_packed`` [out, words of the input]."""
    return bitpack.pack(codes, bits, layout)


def unpack_zeros(
    weight_zero_point: NDArray[np.generic], bits: int, rows: int, layout: Layout = "stream"
) -> NDArray[np.uint8]:
    """``weight_zero_point`` [words of the output, groups] → zeros u1 [out, groups]; ``rows`` is out, or such a part.

    Raises:
        Damaged: another number of words than ``rows`` codes take.
    """
    return np.ascontiguousarray(bitpack.unpack(weight_zero_point.T, bits, rows, layout).T)


def pack_zeros(zeros: NDArray[np.uint8], bits: int, layout: Layout = "stream") -> NDArray[np.uint32]:
    """Zeros u1 [out, groups] → ``weight_zero_point`` [words of the output, groups]."""
    return np.ascontiguousarray(bitpack.pack(np.ascontiguousarray(zeros.T), bits, layout).T)


def from_int8(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Signed bytes (``weight`` and ``weight_zero_point`` of int-quantized), any shape → codes of 8 bits.

    Widths below 8 are also kept in whole bytes there; they are read as 8 bits, whose `middle` is their zero.
    """
    return np.bitwise_xor(values.view(np.uint8), _SIGN)
