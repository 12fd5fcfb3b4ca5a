"""Weights → GGUF's block types that need no search: bit for bit what llama.cpp's and gguf-py's quantisers make.

That fixes each fp32 operation and its order. Only what they leave undefined is defined here: weights that are not
finite, or too large for a block's fp16 scale, are refused; a block too small for its scale's inverse is zeros; an
exponent of MXFP4 below the lowest, which wraps around there, is the lowest.
Source: ``gguf.quants`` of gguf-py 0.19.0 (``quantize_row_*_ref`` of ggml-quants.c).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dconv.codec.gguf import BLOCKS, half_e8m0, in_blocks
from dconv.errors import Refused

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Blocks = NDArray[np.uint8]
    Values = NDArray[np.float32]

#: Weights taken at a time: they and their temporaries stay in a processor's caches, and a call of numpy is short
#: against its work.
_AT_ONCE: Final = 1 << 18
#: Weights turned at a time.
_TURNED: Final = 1 << 13
#: The least number that rounds to an infinity of fp16.
_PAST_F16: Final = 65520.0
#: What is added before digits are cut off, to round halves away from zero: one half itself would carry its predecessor
#: over 1.
_HALF: Final = np.nextafter(np.float32(0.5), np.float32(0)).view(np.uint32)
_SIGN: Final = np.uint32(1 << 31)
#: What numpy moves sixteen bytes at a time as: four weights.
_SIXTEEN: Final = np.complex128
_ONES: Final = np.uint32(0x01010101)
#: Halfway between neighbouring magnitudes of E2M1, doubled; a weight in the middle goes to the smaller.
_E2M1_BETWEEN: Final = tuple(np.array([0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0], np.float32))
#: Five digits of base 3 as a fraction of 256, rounded up.
_OF_256: Final = ((np.arange(243) * 256 + 242) // 243).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class _Tile:
    """Blocks that are encoded together.

    Attributes:
        weights: [blocks, weights of one].
        values, bits: scratch of the same shape.
    """

    weights: Values
    values: Values
    bits: NDArray[np.uint32]


def encode(weights: NDArray[np.generic], kind: str) -> NDArray[np.uint8]:
    """fp32 weights [..., in] → bytes [..., in / block × bytes], one of `KINDS`.

    Raises:
        Refused: a row that is not whole blocks; NaN, infinity or weights past the range of fp16 scales.
    """
    size, stored = BLOCKS[kind]
    if kind not in KINDS:
        raise ValueError(kind)
    blocks = in_blocks(weights, kind)
    found = np.empty((len(blocks), stored), np.uint8)
    step = min(_AT_ONCE // size, len(blocks))
    values, bits = np.empty((step, size), np.float32), np.empty((step, size), np.uint32)
    with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
        for start in range(0, len(blocks), step or 1):
            part = blocks[start : start + step]
            tile = _Tile(part, values[: len(part)], bits[: len(part)])
            _ENCODE[kind](tile, found[start : start + step])
    return found.reshape(*weights.shape[:-1], weights.shape[-1] // size * stored)


def _beside(tile: _Tile) -> Values:
    """Blocks side by side, in the scratch for bits: [runs of blocks, weights of one / 4, blocks of a run × 4].

    What is taken of all weights of a block then runs along memory, which is faster by far; a run stays in the first
    cache while it is turned.
    """
    count, size = tile.weights.shape
    run = _TURNED // size
    run = count if count % run else run
    shape = (count // max(run, 1), size // 4, run)
    found = tile.bits.reshape(-1).view(_SIXTEEN).reshape(shape)
    np.copyto(found, tile.weights.view(_SIXTEEN).reshape(shape[0], run, size // 4).transpose(0, 2, 1))
    return found.view(np.float32)


def _of_blocks(choose: np.ufunc, beside: Values) -> Values:
    """[blocks]."""
    a, b, c, d = choose.reduce(beside, axis=1).reshape(-1, 4).T
    return choose(choose(a, b), choose(c, d))


def _largest(tile: _Tile) -> Values:
    """The magnitude of the largest weight of each block."""
    beside = _beside(tile)
    return _of_blocks(np.maximum, np.abs(beside, out=beside))


def _put(tile: _Tile, out: Blocks, *parts: Blocks | Values) -> None:
    """Fields one behind the other; numbers are scales, stored in fp16.

    Raises:
        Refused: one that fp16 has not.
    """
    at = 0
    for part in parts:
        if part.dtype == np.float32:
            if not (most := np.abs(part).max(initial=0)) < _PAST_F16:
                _check_finite(tile)
                raise Refused("weights are too large for the fp16 scale of their block", found=f"scale {most:g}")
            out[:, at : at + 2].view(np.float16)[:, 0] = part
            at += 2
        else:
            out[:, at : at + part.shape[1]] = part
            at += part.shape[1]


def _check_finite(tile: _Tile) -> None:
    if not np.isfinite(tile.weights).all():
        raise Refused("NaN or infinity has no form in these blocks")


def _inverse(scale: Values) -> Values:
    found = np.divide(1, scale, dtype=np.float32)
    found[~np.isfinite(found)] = 0
    return found


def _each(numbers: Values, beside: Values) -> Values:
    """[blocks] → for each weight of blocks side by side."""
    return np.repeat(numbers, 4).reshape(len(beside), 1, -1)


def _halves(codes: Blocks, out: Blocks) -> None:
    """Two codes of 4 bits a byte: the first half of the block of 32 below, the second above.

    Args:
        codes: of blocks side by side.
        out: [blocks, 16].
    """
    words = codes.view(np.uint32)
    packed = words[:, 4:] << np.uint32(4)
    packed |= words[:, :4]
    places = out.view(np.uint32).reshape(len(codes), -1, 4)
    for four in range(4):  # so that numpy's inner loop runs over blocks
        places[:, :, four] = packed[:, four]


def _halves_and_fifths(codes: Blocks, out: Blocks) -> None:
    """The fifth bits of all, then as `_halves`."""
    words = codes.view(np.uint32).transpose(0, 2, 1).copy()
    words >>= np.uint32(4)
    fifths = words.view(np.uint8).reshape(-1, 32)
    fifths &= np.uint8(1)
    out[:, :4] = np.packbits(fifths, axis=1, bitorder="little")
    codes &= np.uint8(15)
    _halves(codes, out[:, 4:])


def _scaled(tile: _Tile, scale: Values) -> Values:
    """Weights over the scale of their block, in scratch."""
    return np.multiply(tile.weights, _inverse(scale)[:, None], out=tile.values)


def _cut(tile: _Tile, beside: Values) -> Blocks:
    """Whole parts of values, none of which is negative, in the scratch for values."""
    codes = tile.values.reshape(-1).view(np.uint8)[: beside.size].reshape(beside.shape)
    np.copyto(codes, beside, casting="unsafe")
    return codes


def _signed(tile: _Tile, bits: int) -> tuple[Values, Blocks]:
    """The weight of the largest magnitude, the first of several, becomes the lowest code.

    Returns:
        Scales; codes of blocks side by side.
    """
    middle = 1 << (bits - 1)
    beside = _beside(tile)
    high, low = _of_blocks(np.maximum, beside), _of_blocks(np.minimum, beside)
    balance = high + low
    largest: Values = np.copysign(np.maximum(high, -low), balance)
    if len(both := np.flatnonzero(balance == 0)):
        part = tile.weights[both]
        largest[both] = np.take_along_axis(part, np.abs(part).argmax(axis=1, keepdims=True), axis=1)[:, 0]
    scale = np.divide(largest, -middle, dtype=np.float32)
    beside *= _each(_inverse(scale), beside)
    beside += np.float32(middle + 0.5)
    codes = _cut(tile, beside)
    words = codes.view(np.uint32)
    words -= words >> np.uint32(bits) & _ONES  # one past the last code is the last
    return scale, codes


def _from_minimum(tile: _Tile, bits: int) -> tuple[Values, Values, Blocks]:
    """Codes of so many bits above the least weight of each block.

    Returns:
        Scales; the least weights; codes of blocks side by side.
    """
    top = (1 << bits) - 1
    beside = _beside(tile)
    high, least = _of_blocks(np.maximum, beside), _of_blocks(np.minimum, beside)
    if len(zero := np.flatnonzero(least == 0)):  # which of two zeros is the least, its order of comparing decides
        part = tile.weights[zero]
        high[zero], least[zero] = part.max(axis=1), part.min(axis=1)
    scale = (high - least) / np.float32(top)
    beside -= _each(least, beside)
    beside *= _each(_inverse(scale), beside)
    beside += np.float32(0.5)
    return scale, least, _cut(tile, beside)


def _rounded(tile: _Tile, scale: Values) -> Values:
    """Weights over their scale to nearest, halves away from zero, with digits that are still to be cut off."""
    values = _scaled(tile, scale)
    halves = np.bitwise_and(values.view(np.uint32), _SIGN, out=tile.bits)
    halves |= _HALF
    values += halves.view(np.float32)
    return values


def _q4_0(tile: _Tile, out: Blocks) -> None:
    scale, codes = _signed(tile, 4)
    _put(tile, out, scale)
    _halves(codes, out[:, 2:])


def _q4_1(tile: _Tile, out: Blocks) -> None:
    scale, least, codes = _from_minimum(tile, 4)
    _put(tile, out, scale, least)
    _halves(codes, out[:, 4:])


def _q5_0(tile: _Tile, out: Blocks) -> None:
    scale, codes = _signed(tile, 5)
    _put(tile, out, scale)
    _halves_and_fifths(codes, out[:, 2:])


def _q5_1(tile: _Tile, out: Blocks) -> None:
    scale, least, codes = _from_minimum(tile, 5)
    _put(tile, out, scale, least)
    _halves_and_fifths(codes, out[:, 4:])


def _q8_0(tile: _Tile, out: Blocks) -> None:
    scale = _largest(tile) / np.float32(127)
    _put(tile, out, scale)
    np.copyto(out[:, 2:].view(np.int8), _rounded(tile, scale), casting="unsafe")


def _ternary(tile: _Tile) -> tuple[Values, Blocks]:
    scale = _largest(tile)
    codes = _rounded(tile, scale).astype(np.int8)
    codes += np.int8(1)
    return scale, codes.view(np.uint8)


def _tq1_0(tile: _Tile, out: Blocks) -> None:
    """Five digits of base 3 a byte; the last bytes have four, and a zero below."""
    scale, codes = _ternary(tile)
    parts: list[Blocks] = []
    for first, last, run in ((0, 160, 32), (160, 240, 16), (240, 256, 4)):
        digits = codes[:, first:last].reshape(len(codes), -1, run)
        number = digits[:, 0].copy()
        for at in range(1, 5):
            number *= np.uint8(3)
            if at < digits.shape[1]:
                number += digits[:, at]
        parts.append(_OF_256[number])
    _put(tile, out, *parts, scale)


def _tq2_0(tile: _Tile, out: Blocks) -> None:
    scale, codes = _ternary(tile)
    fields = codes.reshape(len(codes), 2, 4, 32)
    found = fields[:, :, 3].copy()
    for at in (2, 1, 0):
        found <<= np.uint8(2)
        found |= fields[:, :, at]
    _put(tile, out, found.reshape(len(codes), 64), scale)


def _mxfp4(tile: _Tile, out: Blocks) -> None:
    """The floor rule, by a base-2 logarithm in fp32, as the sources have it: just below a power of two it rounds up."""
    beside = _beside(tile)
    largest = np.maximum(_of_blocks(np.maximum, beside), -_of_blocks(np.minimum, beside))
    if not np.isfinite(largest).all():
        _check_finite(tile)
    power = np.floor(np.log2(largest.astype(np.float64)).astype(np.float32))
    exponent = np.where(largest > 0, np.maximum(power + 125, 0), 0).astype(np.uint8)
    doubled = np.abs(beside, out=tile.values.reshape(beside.shape))
    doubled /= _each(half_e8m0(exponent), beside)  # a power of two: exact, but where the code is 0 anyway
    codes = np.zeros(beside.shape, np.uint8)
    for between in _E2M1_BETWEEN:
        codes += (doubled > between).view(np.uint8)
    minus = ((beside < 0) & (codes > 0)).view(np.uint8)
    minus <<= np.uint8(3)
    codes |= minus
    out[:, 0] = exponent
    _halves(codes, out[:, 1:])


_ENCODE: Final[dict[str, Callable[[Any, Any], None]]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "TQ1_0": _tq1_0, "TQ2_0": _tq2_0, "MXFP4": _mxfp4,
}  # fmt: skip
KINDS: Final = tuple(_ENCODE)
