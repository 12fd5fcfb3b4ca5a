"""AWS Neuron's FP8: e4m3 as IEEE 754 has it. Its last exponent is infinity and NaN, so that it ends at 240, not 448.

Below that the two formats have the same bytes. A block FP8 checkpoint is recoded by dividing its codes and multiplying
its scales; by 2 nearly all codes keep their value, by 448/240 (the ratio of the ranges, which the vendor's own scripts
take) nearly all are rounded a second time. ADR 10 has the numbers, and why a scale multiplies.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING, Final

import numpy as np

from dconv.codec import fp8
from dconv.codec.minifloat import E4M3, E4M3_IEEE, nearest, values

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: A power of two: only subnormals that are not even lose a bit.
HALVED: Final = Fraction(2)
#: 28/15: the largest of one format becomes the largest of the other.
FITTED: Final = Fraction(448, 240)


@cache
def table(by: Fraction) -> NDArray[np.uint8]:
    """[256] Neuron's byte for every e4m3fn byte divided by ``by``, to nearest, ties to even; at most 240 in magnitude.

    NaN (0x7F, 0xFF) stays the same byte, which is NaN in both formats. Not to be written to.
    """
    if by < FITTED:
        raise ValueError(f"448 / {by} is beyond {E4M3_IEEE.largest:g}")
    numbers = values(E4M3)
    # A quotient that is no tie between two codes is too far from one for fp32 to move it there.
    divided = nearest(E4M3_IEEE, (numbers * by.denominator / by.numerator).astype(np.float32))
    found = np.where(np.isnan(numbers), np.arange(256), divided).astype(np.uint8)
    found.flags.writeable = False
    return found


def recode(codes: NDArray[np.uint8], by: Fraction = HALVED) -> NDArray[np.uint8]:
    """Neuron's codes of e4m3fn codes, any shape; their scales go through `rescale` by the same number."""
    return np.take(table(by), codes)


def rescale(scale: NDArray[np.float32], by: Fraction = HALVED, *, reciprocal: bool = False) -> NDArray[np.float32]:
    """``scale`` × ``by`` in fp32, or with ``reciprocal`` 1 / (``scale`` × ``by``); rounded once, any shape.

    Exact for a power of two, and for the rest within 2^-24 of the product. A scale past fp32's range becomes infinity.
    """
    product = scale.astype(np.float64) * by.numerator / by.denominator
    with np.errstate(over="ignore", divide="ignore"):
        return (1 / product if reciprocal else product).astype(np.float32)


def errors(by: Fraction) -> NDArray[np.float64]:
    """[256] How far each code's value moves, in units of the source's scale: |recoded × by - code|; 0 for NaN.

    ``errors(HALVED)`` is at most 2^-9, whatever the weight; ``errors(FITTED)`` 12.8, and 1/20 of any code from 2^-5 up.
    """
    after = np.take(values(E4M3_IEEE), table(by)) * by.numerator
    moved = np.abs(after - values(E4M3) * by.denominator) / by.denominator
    return np.where(np.isnan(moved), 0, moved)


def row_scales(largest: NDArray[np.float32], *, reciprocal: bool = False) -> NDArray[np.float32]:
    """[out, 1] The scales of rows with these largest finite magnitudes: absmax / 240, 1 where a row is zero.

    See `dconv.codec.fp8.scales`. With ``reciprocal`` they are written so that they divide.
    """
    _, stored = fp8.scales(largest, E4M3_IEEE)
    return rescale(stored, Fraction(1), reciprocal=True) if reciprocal else stored


def encode_rows(x: NDArray[np.float32], *, largest: NDArray[np.float32] | None = None) -> NDArray[np.uint8]:
    """Neuron's codes of a matrix with one scale a row (`row_scales`); see `dconv.codec.fp8.encode`.

    Args:
        x: [out, in].
        largest: [out, 1], the largest finite magnitude of the whole row, where ``x`` is only some of its columns.
    """
    codes, _ = fp8.encode(x, (1, max(x.shape[1], 1)), E4M3_IEEE, largest=largest)
    return codes


def decode(
    codes: NDArray[np.uint8],
    scale: NDArray[np.float32],
    block: tuple[int, int],
    target: str,
    *,
    row0: int = 0,
    col0: int = 0,
    reciprocal: bool = False,
) -> NDArray[np.generic]:
    """Code × scale in ``carrier(target)``, rounded once; arguments as `dconv.codec.fp8.decode`'s."""
    return fp8.decode(codes, scale, block, target, fmt=E4M3_IEEE, row0=row0, col0=col0, reciprocal=reciprocal)
