"""Codes of a few bits each, kept in 32-bit words: the layouts that integer checkpoints use, packed along the last axis.

All are little-endian: the first code is in a word's lowest bits. They differ only where a code would straddle two
words, so codes of 1, 2, 4 and 8 bits have one layout:

* ``stream``: no bit is left out and codes straddle; 32 codes take ``bits`` words. GPTQ (its 3-bit form too), AWQ of
  GPTQModel, compressed-tensors from 0.18 on.
* ``padded``: ``32 // bits`` codes in a word, the highest bits unused. compressed-tensors before that.
* ``planar``: 32 codes take ``bits`` words too, but as bit planes of 4, 2 and 1 bits, the lowest first. GPTQModel's
  ``gptq_p``.

Packing and unpacking are exact and inverses of each other, but that unused bits are written as zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, TypeVar

import numpy as np

from dconv.errors import Damaged, Refused

if TYPE_CHECKING:
    from numpy.typing import NDArray

Layout = Literal["stream", "padded", "planar"]
_Word = TypeVar("_Word", np.uint32, np.uint64)

BITS: Final = range(1, 9)
#: Width of each bit plane, the lowest first. Source: GPTQModel 7.7.0, ``utils/planar_packing.py``.
_PLANES: Final = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


def period(bits: int, layout: Layout = "stream") -> tuple[int, int]:
    """The smallest piece that can be unpacked by itself: its codes and its words."""
    _check_bits(bits)
    return (32 // bits, 1) if 32 % bits == 0 or layout == "padded" else (32, bits)


def words_for(count: int, bits: int, layout: Layout = "stream") -> int:
    """How many words ``count`` codes take."""
    codes, words = period(bits, layout)
    if layout == "stream":
        return -(-count * bits // 32)
    return -(-count // codes) * words


def layout_of(count: int, words: int, bits: int) -> Layout:
    """``stream`` or ``padded``, told apart by the number of words that hold ``count`` codes (the whole axis, no part).

    Raises:
        Damaged: neither has that many words.
        Refused: both have, and they differ (some axes of up to 150 codes, none of whole 32).
    """
    stream, padded = words_for(count, bits), words_for(count, bits, "padded")
    if words not in (stream, padded):
        raise Damaged(
            f"packed {bits}-bit codes have the wrong size",
            expected=f"{count} codes in " + " or ".join(map(str, sorted({stream, padded}))) + " words",
            found=f"{words} words",
        )
    if stream == padded and 32 % bits and count > 32 // bits:
        raise Refused(
            f"{count} codes of {bits} bits take {words} words in both layouts that compressed-tensors has used",
            do="convert them with the version that wrote them",
        )
    return "stream" if words == stream else "padded"


def unpack(words: NDArray[np.generic], bits: int, count: int, layout: Layout = "stream") -> NDArray[np.uint8]:
    """Words [..., `words_for` (count)] of 4 bytes each → codes u1 [..., count].

    Raises:
        Damaged: the last axis has another number of words.
    """
    _check_bits(bits)
    if words.itemsize != 4:
        raise ValueError(f"words of {words.itemsize} bytes")
    if words.shape[-1] != (expected := words_for(count, bits, layout)):
        raise Damaged(
            f"packed {bits}-bit codes have the wrong size",
            expected=f"{expected} words for {count} codes",
            found=f"{words.shape[-1]} words",
        )
    words = np.ascontiguousarray(words).view(np.uint32)
    if 32 % bits == 0:
        found = _unpack_whole(words, bits)
    elif layout == "padded":
        found = _unpack_padded(words, bits)
    elif layout == "planar":
        found = _unpack_planes(words, bits)
    else:
        found = _unpack_stream(words, bits)
    return found[..., :count]


def pack(codes: NDArray[np.uint8], bits: int, layout: Layout = "stream") -> NDArray[np.uint32]:
    """Codes u1 [..., count] below ``2**bits`` → words <u4 [..., `words_for` (count)]; unused bits are 0."""
    _check_bits(bits)
    if codes.dtype != np.uint8 or (bits < 8 and codes.size and int(codes.max()) >> bits):
        raise ValueError(f"not codes of {bits} bits")
    count = codes.shape[-1]
    per = 32 // bits if layout == "padded" else 32
    if count % per:
        wide = np.zeros((*codes.shape[:-1], -(-count // per) * per), np.uint8)
        wide[..., :count] = codes
        codes = wide
    if 32 % bits == 0:
        found = _pack_whole(codes, bits)
    elif layout == "padded":
        found = _pack_padded(codes, bits)
    elif layout == "planar":
        found = _pack_planes(codes, bits)
    else:
        found = _pack_stream(codes, bits)
    return np.ascontiguousarray(found[..., : words_for(count, bits, layout)])


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"codes of {bits} bits")


def _unpack_whole(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    octets = words.view(np.uint8)
    if bits == 8:
        return octets
    per, mask = 8 // bits, np.uint8((1 << bits) - 1)
    out = np.empty((*octets.shape, per), np.uint8)
    for j in range(per):
        np.right_shift(octets, np.uint8(bits * j), out=out[..., j])
    out &= mask
    return out.reshape(*octets.shape[:-1], octets.shape[-1] * per)


def _pack_whole(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    per = 8 // bits
    octets = np.array(codes[..., ::per], order="C")
    for j in range(1, per):
        octets |= codes[..., j::per] << np.uint8(bits * j)
    return octets.view(np.uint32)


def _unpack_stream(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """Eight codes are ``bits`` whole bytes, which one 64-bit number holds."""
    octets = words.view(np.uint8)
    lead, size = octets.shape[:-1], octets.shape[-1]
    eights = -(-size // bits)
    if size % bits:
        wide = np.zeros((*lead, eights * bits), np.uint8)
        wide[..., :size] = octets
        octets = wide
    numbers = np.zeros((*lead, eights, 8), np.uint8)
    numbers[..., :bits] = octets.reshape(*lead, eights, bits)
    return _fields(numbers.view(np.uint64)[..., 0], bits, 8)


def _pack_stream(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    numbers = _joined(codes, bits, 8, np.uint64)
    octets = numbers[..., None].view(np.uint8)[..., :bits]
    return octets.reshape(*numbers.shape[:-1], numbers.shape[-1] * bits).view(np.uint32)


def _unpack_padded(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    return _fields(words, bits, 32 // bits)


def _pack_padded(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    return _joined(codes, bits, 32 // bits, np.uint32)


def _unpack_planes(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    blocks = words.reshape(*words.shape[:-1], words.shape[-1] // bits, bits)
    out = np.zeros((*blocks.shape[:-1], 32), np.uint8)
    low = 0
    for width in _PLANES[bits]:
        out |= _unpack_whole(np.ascontiguousarray(blocks[..., low : low + width]), width) << np.uint8(low)
        low += width
    return out.reshape(*words.shape[:-1], blocks.shape[-2] * 32)


def _pack_planes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    blocks = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 32, 32)
    planes: list[NDArray[np.uint32]] = []
    low = 0
    for width in _PLANES[bits]:
        planes.append(_pack_whole((blocks >> np.uint8(low)) & np.uint8((1 << width) - 1), width))
        low += width
    return np.concatenate(planes, axis=-1).reshape(*codes.shape[:-1], blocks.shape[-2] * bits)


def _fields(numbers: NDArray[np.generic], bits: int, per: int) -> NDArray[np.uint8]:
    out = np.empty((*numbers.shape, per), np.uint8)
    for j in range(per):
        np.right_shift(numbers, numbers.dtype.type(bits * j), out=out[..., j], casting="unsafe")
    out &= np.uint8((1 << bits) - 1)
    return out.reshape(*numbers.shape[:-1], numbers.shape[-1] * per)


def _joined(codes: NDArray[np.uint8], bits: int, per: int, word: type[_Word]) -> NDArray[_Word]:
    numbers = codes[..., ::per].astype(word, order="C")
    for j in range(1, per):
        numbers |= codes[..., j::per].astype(word) << word(bits * j)
    return numbers
