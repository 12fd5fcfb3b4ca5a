"""Codes of 4 and 6 bits side by side in bytes: a little-endian stream of bits along the last axis.

Two of 4 bits: the low nibble is the even element. Sources: gpt-oss (gpt_oss/torch/weights.py), compressed-tensors
0.20.0 (``pack_fp4_to_uint8``) and torchao 0.18.0 (``pack_uint4``).

Four of 6 bits in three bytes: c0 | c1 << 6 | c2 << 12 | c3 << 18, lowest byte first. Sources: amd-quark 0.13
(``Pack_fp6`` of quark/torch/utils/pack.py, by which weights of its dtypes ``fp6_e2m3`` and ``fp6_e3m2`` are exported)
and compressed-tensors 0.20.0 (``pack_fp6_to_uint8``, E2M3 only). amd-quark's dtype ``mx`` (``Pack_mxfp6``) is another
layout: scale and elements in one tensor, and the upper two bits of four codes gathered in a byte.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy import uint32 as _u4

if TYPE_CHECKING:
    from numpy.typing import NDArray


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """[…, n] codes, one a byte -> […, n · bits / 8]; 8 bits are left as they are.

    Raises:
        ValueError: the codes do not fill whole bytes.
    """
    if bits == 8:
        return codes
    if bits == 4:
        pairs = _grouped(codes, 2).view("<u2")[..., 0]
        return (pairs | pairs >> np.uint16(4)).astype(np.uint8)
    wide = _grouped(codes, 4).view("<u4")[..., 0]
    word = wide & _u4(0x3F)
    for place in (1, 2, 3):  # each comes from 8 bits on to 6 bits on
        word |= wide >> _u4(2 * place) & _u4(0x3F << 6 * place)
    out = np.empty((word.size, 3), np.uint8)
    _copy(word.reshape(-1, 1).view(np.uint8), out)
    return out.reshape(*codes.shape[:-1], codes.shape[-1] // 4 * 3)


def unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The inverse of `pack`.

    Raises:
        ValueError: the bytes do not hold whole groups of codes.
    """
    if bits == 8:
        return packed
    count = packed.shape[-1] * 8 // bits
    if bits == 4:
        out = np.empty((*packed.shape, 2), np.uint8)
        out[..., 0], out[..., 1] = packed & np.uint8(15), packed >> np.uint8(4)
        return out.reshape(*packed.shape[:-1], count)
    threes = _grouped(packed, 3).reshape(-1, 3)
    word = np.zeros((len(threes), 1), "<u4")
    _copy(threes, word.view(np.uint8))
    wide = word & _u4(0x3F)
    for place in (1, 2, 3):
        wide |= (word & _u4(0x3F << 6 * place)) << _u4(2 * place)
    return wide.view(np.uint8).reshape(*packed.shape[:-1], count)


def _grouped(array: NDArray[np.uint8], by: int) -> NDArray[np.uint8]:
    if not array.ndim or array.shape[-1] % by:
        raise ValueError(f"an array of shape {array.shape} in groups of {by}")
    return np.ascontiguousarray(array).reshape(*array.shape[:-1], array.shape[-1] // by, by)


def _copy(threes: NDArray[np.uint8], to: NDArray[np.uint8]) -> None:
    for i in range(3):  # by columns, rows of three bytes being slow to loop over
        to[:, i] = threes[:, i]
