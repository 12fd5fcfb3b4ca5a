"""Weights → GGUF's block types that need no search: bit for bit what llama.cpp's and gguf-py's quantisers make.

That fixes each fp32 operation and its order. Only what they leave undefined is defined here: weights that are not
finite, or too large for a block's fp16 scale, are refused; a block too small for its scale's inverse is zeros; an
exponent of MXFP4 below the lowest, which wraps around there, is the lowest.
Source: ``gguf.quants`` of gguf-py 0.19.0 (``quantize_row_*_ref`` of ggml-quants.c).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dconv.codec.gguf import BLOCKS, half_e8m0
from dconv.errors import Refused

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Blocks = NDArray[np.uint8]
    Values = NDArray[np.float32]

#: Weights taken at a time: their temporaries stay in the processor's caches.
_AT_ONCE: Final = 1 << 16
#: What is added before digits are cut off, to round halves away from zero: one half itself would carry its predecessor
#: over 1.
_HALF: Final = np.nextafter(np.float32(0.5), np.float32(0)).view(np.uint32)
_SIGN: Final = np.uint32(1 << 31)
_NIBBLES: Final = np.uint64(0x0F0F0F0F0F0F0F0F)
#: Halfway between neighbouring magnitudes of E2M1, doubled; a weight in the middle goes to the smaller.
_E2M1_BETWEEN: Final = (0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0)


def encode(weights: NDArray[np.generic], kind: str) -> NDArray[np.uint8]:
    """fp32 weights [..., in] → bytes [..., in / block × bytes], one of `KINDS`.

    Raises:
        Refused: a row that is not whole blocks; NaN, infinity or weights past the range of fp16 scales.
    """
    size, stored = BLOCKS[kind]
    if weights.dtype != np.float32 or kind not in KINDS:
        raise ValueError(f"{weights.dtype} to {kind}")
    if weights.shape[-1] % size:
        raise Refused(
            f"a row is not whole blocks of {kind}", expected=f"a multiple of {size}", found=str(weights.shape[-1])
        )
    blocks = np.ascontiguousarray(weights, np.float32).reshape(-1, size)
    found = np.empty((len(blocks), stored), np.uint8)
    step = _AT_ONCE // size
    with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
        for start in range(0, len(blocks), step):
            part = blocks[start : start + step]
            if not (np.isfinite(part.max()) and np.isfinite(part.min())):
                raise Refused(f"NaN or infinity has no form in {kind}")
            _ENCODE[kind](part, found[start : start + step])
    return found.reshape(*weights.shape[:-1], weights.shape[-1] // size * stored)


def _put(*parts: Blocks) -> Callable[[Blocks], None]:
    """Writes fields one behind the other."""

    def write(out: Blocks) -> None:
        at = 0
        for part in parts:
            out[:, at : at + part.shape[1]] = part
            at += part.shape[1]

    return write


def _inverse(scale: Values) -> Values:
    found = np.float32(1) / scale
    return np.where(np.isfinite(found), found, np.float32(0))


def _f16(scale: Values) -> Blocks:
    found = scale.astype(np.float16)
    if not np.isfinite(found).all():
        raise Refused("weights are too large for the fp16 scale of their block", found=f"scale {np.abs(scale).max():g}")
    return found.view(np.uint8)


def _halves(codes: Blocks) -> Blocks:
    """Two codes a byte: the first half of the block of 32 below, the second above."""
    low, high = (np.ascontiguousarray(codes.view(np.complex128)[:, half]).view(np.uint64) for half in (0, 1))
    low &= _NIBBLES
    high &= _NIBBLES
    high <<= np.uint64(4)
    low |= high
    return low.view(np.uint8).reshape(len(codes), 16)


def _fifth_bits(codes: Blocks) -> Blocks:
    return np.packbits(codes >> np.uint8(4), axis=1, bitorder="little")


def _across(blocks: Values) -> Values:
    """[weights, blocks]: what is taken of all weights of a block then runs along memory, which is faster by far."""
    return np.ascontiguousarray(blocks.T)


def _scaled(blocks: Values, scale: Values) -> Values:
    """Weights over the scale of their block."""
    factors = np.repeat(_inverse(scale).ravel(), blocks.shape[1]).reshape(blocks.shape)
    factors *= blocks
    return factors


def _largest(blocks: Values) -> Values:
    """The magnitude of the largest, [blocks, 1]."""
    return _across(np.abs(blocks)).max(axis=0)[:, None]


def _signed(blocks: Values, bits: int) -> tuple[Values, Blocks]:
    """The weight of the largest magnitude, the first of several, becomes the lowest code."""
    middle = 1 << (bits - 1)
    across = _across(blocks)
    high, low = across.max(axis=0), across.min(axis=0)
    largest = np.where(high > -low, high, low)
    if len(both := np.flatnonzero(high == -low)):
        part = blocks[both]
        largest[both] = np.take_along_axis(part, np.abs(part).argmax(axis=1, keepdims=True), axis=1)[:, 0]
    scale = largest[:, None] / np.float32(-middle)
    values = _scaled(blocks, scale)
    values += np.float32(middle + 0.5)
    codes = values.astype(np.uint8)
    return scale, np.minimum(codes, np.uint8(2 * middle - 1), out=codes)


def _from_minimum(blocks: Values, bits: int) -> tuple[Values, Values, Blocks]:
    top = (1 << bits) - 1
    least = blocks.min(axis=1, keepdims=True)
    scale = (blocks.max(axis=1, keepdims=True) - least) / np.float32(top)
    values = _scaled(blocks - least, scale)
    values += np.float32(0.5)
    codes = values.astype(np.uint8)
    return scale, least, np.minimum(codes, np.uint8(top), out=codes)


def _rounded(values: Values) -> Values:
    """To nearest, halves away from zero, with digits that are still to be cut off. In place."""
    halves = values.view(np.uint32) & _SIGN
    halves |= _HALF
    values += halves.view(np.float32)
    return values


def _q4_0(blocks: Values, out: Blocks) -> None:
    scale, codes = _signed(blocks, 4)
    _put(_f16(scale), _halves(codes))(out)


def _q4_1(blocks: Values, out: Blocks) -> None:
    scale, least, codes = _from_minimum(blocks, 4)
    _put(_f16(scale), _f16(least), _halves(codes))(out)


def _q5_0(blocks: Values, out: Blocks) -> None:
    scale, codes = _signed(blocks, 5)
    _put(_f16(scale), _fifth_bits(codes), _halves(codes))(out)


def _q5_1(blocks: Values, out: Blocks) -> None:
    scale, least, codes = _from_minimum(blocks, 5)
    _put(_f16(scale), _f16(least), _fifth_bits(codes), _halves(codes))(out)


def _q8_0(blocks: Values, out: Blocks) -> None:
    scale = _largest(blocks) / np.float32(127)
    out[:, :2] = _f16(scale)
    np.copyto(out[:, 2:].view(np.int8), _rounded(_scaled(blocks, scale)), casting="unsafe")


def _ternary(blocks: Values) -> tuple[Values, Blocks]:
    scale = _largest(blocks)
    return scale, (_rounded(_scaled(blocks, scale)).astype(np.int8) + np.int8(1)).view(np.uint8)


def _tq1_0(blocks: Values, out: Blocks) -> None:
    """Five digits of base 3 a byte, as a fraction of 256 rounded up; the last bytes have four, and a zero below."""
    scale, codes = _ternary(blocks)
    parts = []
    for first, last, run in ((0, 160, 32), (160, 240, 16), (240, 256, 4)):
        count = (last - first) // run
        powers = np.array([81, 27, 9, 3, 1][:count], np.uint16)
        digits = codes[:, first:last].reshape(len(codes), count, run)
        number = (digits * powers[:, None]).sum(axis=1, dtype=np.uint16)
        parts.append(((number * np.uint16(256) + np.uint16(242)) // np.uint16(243)).astype(np.uint8))
    _put(*parts, _f16(scale))(out)


def _tq2_0(blocks: Values, out: Blocks) -> None:
    scale, codes = _ternary(blocks)
    fields = codes.reshape(len(codes), 2, 4, 32) << np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    _put(np.bitwise_or.reduce(fields, axis=2).reshape(len(codes), 64), _f16(scale))(out)


def _mxfp4(blocks: Values, out: Blocks) -> None:
    """The floor rule, by a base-2 logarithm in fp32, as the sources have it: just below a power of two it rounds up."""
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    power = np.floor(np.log2(largest.astype(np.float64)).astype(np.float32))
    exponent = np.where(largest > 0, np.maximum(power + 125, 0), 0).astype(np.uint8)
    doubled = np.abs(blocks) / half_e8m0(exponent).astype(np.float64)
    codes = np.zeros(blocks.shape, np.uint8)
    for between in _E2M1_BETWEEN:
        codes += doubled > between
    codes[(blocks < 0) & (codes > 0)] |= np.uint8(8)
    _put(exponent, _halves(codes))(out)


_ENCODE: Final[dict[str, Callable[[Any, Any], None]]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "TQ1_0": _tq1_0, "TQ2_0": _tq2_0, "MXFP4": _mxfp4,
}  # fmt: skip
KINDS: Final = tuple(_ENCODE)
