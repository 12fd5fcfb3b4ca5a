"""Scales that are powers of two, one byte each: 2^(byte - 127), and 255 for NaN.

Source: OCP "Microscaling formats (MX)" 1.0, E8M0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

BIAS: Final = 127
NAN: Final = 255


def from_bytes(scale: NDArray[np.uint8]) -> NDArray[np.float64]:
    """[…] The numbers, exactly; 0 is 2^-127, which fp32 holds as a subnormal."""
    powers = np.ldexp(1.0, np.arange(256) - BIAS)
    powers[NAN] = np.nan
    return powers[scale]


def to_bytes(scale: NDArray[np.generic]) -> NDArray[np.uint8]:
    """[…] The bytes of powers of two from 2^-127 to 2^127, and of NaN.

    Raises:
        ValueError: another number is among them.
    """
    wide = np.asarray(scale, np.float64)
    nan = np.isnan(wide)
    part, exponent = np.frexp(np.where(nan, 1.0, wide))
    biased = exponent - 1 + BIAS
    if not ((part == 0.5) & (biased >= 0) & (biased < NAN)).all():
        raise ValueError("a scale is no power of two from 2^-127 to 2^127")
    return np.where(nan, NAN, biased).astype(np.uint8)
