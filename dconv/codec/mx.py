"""Microscaling formats: 32 elements along the last axis share a scale that is a power of two.

Source: OCP "Microscaling formats (MX)" 1.0: MXFP8 (E4M3, E5M2), MXFP6 (E2M3, E3M2) and MXFP4 (E2M1), scales in E8M0.
How codes of 4 and 6 bits lie in bytes: `dconv.codec.pack`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from dconv.codec import e8m0, groups
from dconv.codec.minifloat import Minifloat, nearest
from dconv.codec.pack import pack
from dconv.sharding.dtypes import carrier

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK: Final = 32
Rule = Literal["floor", "ceil", "even"]
#: fp32's bits of mantissa, and the exponent of its infinity and NaN.
_MANTISSA: Final = 23
_BEYOND: Final = 255


def encode(
    x: NDArray[np.float32], fmt: Minifloat, rule: Rule, *, positive_zeros: bool = False
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Packed codes and E8M0 scales; `dconv.codec.minifloat.error_bound` of both bounds the error.

    The scale's exponent, amax being the block's largest magnitude, before it is held to -127 … 127:

    - ``floor``: floor(log2(amax)) - floor(log2(largest)), the specification's; amax may be cut to ``largest``.
    - ``ceil``: ceil(log2(amax / largest)), the quotient being rounded to fp32; exact, as the GPU instruction that
      torchao's RCEIL stands for (its fallback for processors takes the logarithm in fp32, too). Nothing is cut, but for
      the quotient's rounding.
    - ``even``: as ``floor``, after half a step of the format was added to amax: what compressed-tensors 0.20.0 writes,
      its step being E2M1's for MXFP8 too, and torchao's EVEN for formats of 4 and 6 bits.

    A block of zeros has scale 2^-127. One with a NaN has scale NaN, as the specification has it; so has one with an
    infinity, which most elements cannot hold, and of which torchao makes a finite number.

    Args:
        x: […, n].
        fmt: the format of the codes.
        rule: how a block's scale is found, see above.
        positive_zeros: -0.0 and what scaling makes it become 0.0, as compressed-tensors has it; else they stay.

    Returns:
        packed […, n · bits / 8]; scale […, n / 32].

    Raises:
        ValueError: n is not a multiple of 32.
    """
    blocks = groups.grouped(x, BLOCK)
    packed, scale = np.empty((len(blocks), BLOCK * fmt.bits // 8), np.uint8), np.empty(len(blocks), np.uint8)
    step, plus = groups.AT_ONCE // BLOCK, np.float32(0.0 if positive_zeros else -0.0)
    for start in range(0, len(blocks), step):
        run = slice(start, start + step)
        part = blocks[run]
        scale[run] = _scales(groups.amax(part), fmt, rule)
        with np.errstate(invalid="ignore", under="ignore"):
            packed[run] = pack(nearest(fmt, part * _reciprocals()[scale[run]][:, None] + plus), fmt.bits)
    lead = x.shape[:-1]
    return packed.reshape(*lead, x.shape[-1] * fmt.bits // 8), scale.reshape(*lead, x.shape[-1] // BLOCK)


def scales(x: NDArray[np.float32], fmt: Minifloat, rule: Rule) -> NDArray[np.uint8]:
    """[…, n / 32] The scales of `encode` alone, many times as fast."""
    blocks = groups.grouped(x, BLOCK)
    found, step = np.empty(len(blocks), np.uint8), groups.AT_ONCE // BLOCK
    for start in range(0, len(blocks), step):
        found[start : start + step] = _scales(groups.amax(blocks[start : start + step]), fmt, rule)
    return found.reshape(*x.shape[:-1], x.shape[-1] // BLOCK)


def decode(
    packed: NDArray[np.uint8], scale: NDArray[np.uint8], fmt: Minifloat, target: str, *, factor: float = 1.0
) -> NDArray[np.generic]:
    """[…, n] code × scale × factor in ``carrier(target)``: multiplied in fp64, rounded once.

    Args:
        packed: […, n · bits / 8]; gpt-oss's ``blocks`` [..., groups, 16] with the last two axes taken together.
        scale: […, n / 32].
        fmt: the format of the codes.
        target: f64, f32, f16 or bf16.
        factor: multiplies every weight.

    Raises:
        ValueError: there is not one scale for each 32 elements.
    """
    return groups.looked_up(packed, scale, fmt, BLOCK, _table(fmt, target, factor), carrier(target))


@lru_cache(maxsize=8)
def _table(fmt: Minifloat, target: str, factor: float) -> NDArray[np.generic]:
    return groups.pairs(fmt, e8m0.from_bytes(np.arange(256, dtype=np.uint8)) * factor, target)


@lru_cache(maxsize=1)
def _reciprocals() -> NDArray[np.float32]:
    """[256] What elements are multiplied by for each scale; zero for NaN."""
    found = np.ldexp(1.0, e8m0.BIAS - np.arange(256))
    found[e8m0.NAN] = 0
    return found.astype(np.float32)


def _scales(amax: NDArray[np.float32], fmt: Minifloat, rule: Rule) -> NDArray[np.uint8]:
    """fp32's exponent is biased as E8M0's is, so that a byte is the exponent's bits and what is added to them."""
    bits = amax.view(np.uint32)
    lost = bits >> np.uint32(_MANTISSA) == _BEYOND
    if rule == "ceil":
        bits = (amax / np.float32(fmt.largest)).view(np.uint32)
        # rounded up: subnormals have 2^-127 as the only power of two among them that E8M0 has
        exponent = (bits >> np.uint32(_MANTISSA)) + (bits & np.uint32(0x7FFFFF) > 0)
        exponent[bits <= 1 << (_MANTISSA - 1)] = 0
        found = exponent.astype(np.int32)
    else:
        kept = 1 if fmt.bits == 8 else fmt.mantissa
        half_step = np.uint32(1 << (_MANTISSA - kept - 1) if rule == "even" else 0)
        found = ((bits + half_step) >> np.uint32(_MANTISSA)).astype(np.int32) - fmt.largest_exponent
    return np.where(lost, e8m0.NAN, np.clip(found, 0, e8m0.NAN - 1)).astype(np.uint8)
