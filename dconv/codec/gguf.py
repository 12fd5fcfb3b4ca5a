"""GGUF's block types → weights. A row is whole blocks, a block some bytes of scales and packed codes.

The value of a code is fp32 arithmetic that the format's own code fixes; here it is equal to that bit for bit, and
another target is that value cast. Against the exact scale × code (- or + minimum) it is one fp32 rounding: products of
the fp16 scales and whole numbers are exact. Source: ggml's ``ggml-quants.c`` by way of gguf-py's ``gguf.quants``, which
also decodes the types with codebooks (IQ) here: their tables are best kept in one place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dconv.codec.cast import cast
from dconv.errors import Damaged, Refused, ToolMissing
from dconv.sharding.dtypes import carrier

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Blocks = NDArray[np.uint8]
    Values = NDArray[np.float32]

#: Type -> weights and bytes in a block.
BLOCKS: Final[dict[str, tuple[int, int]]] = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2),
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "TQ1_0": (256, 54), "TQ2_0": (256, 66), "MXFP4": (32, 17), "NVFP4": (64, 36),
    "IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74), "IQ2_S": (256, 82),
    "IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
}  # fmt: skip
#: Types whose elements are stored as they are -> dconv's name.
PLAIN: Final = {"F32": "f32", "F16": "f16", "BF16": "bf16"}

#: Weights taken at a time: their temporaries stay in the processor's caches.
_AT_ONCE: Final = 1 << 15

#: E2M1, doubled, so that they are whole. Source: OCP Microscaling Formats 1.0, table 5.
E2M1_DOUBLED: Final = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


def decode(blocks: NDArray[np.uint8], kind: str, target: str) -> NDArray[np.generic]:
    """Bytes [..., whole blocks] → weights [..., in], in ``carrier(target)`` (f32, bf16, f16 or f64).

    Raises:
        Refused: a type that is not in `BLOCKS`.
        Damaged: a last axis that is not whole blocks.
        ToolMissing: an IQ type without the package gguf.
    """
    if kind not in BLOCKS:
        raise Refused(f"GGUF's type {kind} cannot be decoded", expected=", ".join(BLOCKS), found=kind)
    weights, size = BLOCKS[kind]
    if blocks.shape[-1] % size:
        raise Damaged(
            f"a row of {kind} is not whole blocks", expected=f"a multiple of {size} bytes", found=str(blocks.shape[-1])
        )
    count = blocks.shape[-1] // size
    flat = np.ascontiguousarray(blocks).reshape(-1, size)
    if plain := PLAIN.get(kind):
        found = cast(flat.view(carrier(plain)), plain, target)
        return found.reshape(*blocks.shape[:-1], count * weights)
    out = np.empty((len(flat), weights), carrier(target))
    step = _AT_ONCE // weights
    for start in range(0, len(flat), step):
        part = flat[start : start + step]
        values = _DECODE[kind](part) if kind in _DECODE else _by_gguf(part, kind)
        out[start : start + step] = cast(values.reshape(-1, weights), "f32", target)
    return out.reshape(*blocks.shape[:-1], count * weights)


def in_blocks(weights: NDArray[np.generic], kind: str) -> NDArray[np.float32]:
    """fp32 weights [..., in] → [blocks, weights of one], for an encoder.

    Raises:
        Refused: a row that is not whole blocks.
    """
    size, _ = BLOCKS[kind]
    if weights.dtype != np.float32:
        raise ValueError(f"{weights.dtype} to {kind}")
    if weights.shape[-1] % size:
        raise Refused(
            f"a row is not whole blocks of {kind}", expected=f"a multiple of {size}", found=str(weights.shape[-1])
        )
    return np.ascontiguousarray(weights, np.float32).reshape(-1, size)


def _by_gguf(blocks: Blocks, kind: str) -> Values:
    try:
        import gguf
    except ImportError as e:
        raise ToolMissing(
            f"GGUF's type {kind} is decoded by the package gguf", found=str(e), do="pip install gguf"
        ) from None
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(blocks.reshape(1, -1), gguf.GGMLQuantizationType[kind])


def _f16(blocks: Blocks, at: int) -> Values:
    """The fp16 number at byte ``at`` of each block, [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _fields(octets: Blocks, run: int, bits: int) -> Blocks:
    """Codes of ``bits`` from bytes in runs: the lowest fields of a run come first, then its next ones.

    [blocks, runs × ``run``] → [blocks, runs × 8 / bits × run].
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    found = octets.reshape(len(octets), octets.shape[1] // run, 1, run) >> shifts
    found &= np.uint8((1 << bits) - 1)
    return found.reshape(len(octets), octets.shape[1] * (8 // bits))


def _times(scale: NDArray[Any], codes: NDArray[Any]) -> Values:
    """Scales [blocks, groups], codes [blocks, weights] → fp32 [blocks, groups, weights / groups]."""
    groups = scale.shape[1]
    values = codes.astype(np.float32).reshape(len(codes), groups, codes.shape[1] // groups)
    with np.errstate(all="ignore"):
        values *= scale[:, :, None]
    return values


def _plus(values: Values, minimum: Values) -> Values:
    with np.errstate(all="ignore"):
        values += minimum[:, :, None]
    return values


def _fifth_bit(blocks: Blocks, at: int) -> Blocks:
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << np.uint8(4)


def _q4_0(blocks: Blocks) -> Values:
    return _times(_f16(blocks, 0), _fields(blocks[:, 2:], 16, 4).view(np.int8) - np.int8(8))


def _q4_1(blocks: Blocks) -> Values:
    return _plus(_times(_f16(blocks, 0), _fields(blocks[:, 4:], 16, 4)), _f16(blocks, 2))


def _q5_0(blocks: Blocks) -> Values:
    codes = _fields(blocks[:, 6:], 16, 4) | _fifth_bit(blocks, 2)
    return _times(_f16(blocks, 0), codes.view(np.int8) - np.int8(16))


def _q5_1(blocks: Blocks) -> Values:
    codes = _fields(blocks[:, 8:], 16, 4) | _fifth_bit(blocks, 4)
    return _plus(_times(_f16(blocks, 0), codes), _f16(blocks, 2))


def _q8_0(blocks: Blocks) -> Values:
    return _times(_f16(blocks, 0), blocks[:, 2:].view(np.int8))


def _scaled(blocks: Blocks, at: int, scales: NDArray[Any]) -> Values:
    """The block's scale times those of its groups; exact."""
    with np.errstate(all="ignore"):
        return _f16(blocks, at) * scales.astype(np.float32)


def _q2_k(blocks: Blocks) -> Values:
    scales = blocks[:, :16]
    values = _times(_scaled(blocks, 80, scales & np.uint8(15)), _fields(blocks[:, 16:80], 32, 2))
    return _plus(values, -_scaled(blocks, 82, scales >> np.uint8(4)))


def _q3_k(blocks: Blocks) -> Values:
    scales = _fields(blocks[:, 96:104], 8, 4) | _fields(blocks[:, 104:108], 4, 2) << np.uint8(4)
    high = _fields(blocks[:, :32], 32, 1) << np.uint8(2)  # set where nothing is to be taken off
    codes = (_fields(blocks[:, 32:96], 32, 2) | high).view(np.int8) - np.int8(4)
    return _times(_scaled(blocks, 108, scales.view(np.int8) - np.int8(32)), codes)


def _six_bits(blocks: Blocks) -> tuple[Blocks, Blocks]:
    """Eight scales and eight minima of 6 bits each, from bytes 4 to 16."""
    scale, minimum, both = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    low, top = np.uint8(0x3F), np.uint8(0x30)
    return (
        np.concatenate([scale & low, both & np.uint8(15) | scale >> np.uint8(2) & top], axis=1),
        np.concatenate([minimum & low, both >> np.uint8(4) | minimum >> np.uint8(2) & top], axis=1),
    )


def _q4_k(blocks: Blocks) -> Values:
    scales, minima = _six_bits(blocks)
    values = _times(_scaled(blocks, 0, scales), _fields(blocks[:, 16:], 32, 4))
    return _plus(values, -_scaled(blocks, 2, minima))


def _q5_k(blocks: Blocks) -> Values:
    scales, minima = _six_bits(blocks)
    codes = _fields(blocks[:, 48:], 32, 4) | _fields(blocks[:, 16:48], 32, 1) << np.uint8(4)
    return _plus(_times(_scaled(blocks, 0, scales), codes), -_scaled(blocks, 2, minima))


def _q6_k(blocks: Blocks) -> Values:
    codes = _fields(blocks[:, :128], 64, 4) | _fields(blocks[:, 128:192], 32, 2) << np.uint8(4)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    return _times(_scaled(blocks, 208, scales), codes.view(np.int8) - np.int8(32))


def _trits(octets: Blocks, count: int) -> Blocks:
    """``count`` digits of base 3 from each byte of a run, the most significant first: [blocks, count × run].

    A byte is a fraction of 256; times 3, its whole part is the next digit.
    """
    powers = np.array([1, 3, 9, 27, 81][:count], np.uint8)[:, None]
    shifted = (octets[:, None, :] * powers).astype(np.uint16)
    return ((shifted * np.uint16(3)) >> np.uint16(8)).astype(np.uint8).reshape(len(octets), octets.shape[1] * count)


def _tq1_0(blocks: Blocks) -> Values:
    digits = [_trits(blocks[:, :32], 5), _trits(blocks[:, 32:48], 5), _trits(blocks[:, 48:52], 4)]
    return _times(_f16(blocks, 52), np.concatenate(digits, axis=1).view(np.int8) - np.int8(1))


def _tq2_0(blocks: Blocks) -> Values:
    return _times(_f16(blocks, 64), _fields(blocks[:, :64], 32, 2).view(np.int8) - np.int8(1))


def half_e8m0(exponents: Blocks) -> Values:
    """Half of 2^(x - 127), for codes that are doubled; 255, which the format calls NaN, is 2^127 here too."""
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - 128)


def _mxfp4(blocks: Blocks) -> Values:
    return _times(half_e8m0(blocks[:, :1]), E2M1_DOUBLED[_fields(blocks[:, 1:], 16, 4)])


def _half_e4m3() -> Values:
    """Half of each scale of NVFP4: E4M3 without a sign, and 0x7F, its NaN, read as zero."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    value = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(1 + mantissa / 8, exponent - 7))
    return np.where(codes == 0x7F, 0, value / 2).astype(np.float32)


def _nvfp4(blocks: Blocks) -> Values:
    return _times(_half_e4m3()[blocks[:, :4]], E2M1_DOUBLED[_fields(blocks[:, 4:], 8, 4)])


_DECODE: Final[dict[str, Callable[[Any], Any]]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
    "TQ1_0": _tq1_0, "TQ2_0": _tq2_0, "MXFP4": _mxfp4, "NVFP4": _nvfp4,
}  # fmt: skip
