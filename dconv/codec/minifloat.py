"""Floating formats of at most 8 bits: what each code is worth, and the code nearest to an fp32 number.

Sources: OCP "8-bit floating point specification (OFP8)" 1.0 for E4M3 and E5M2; OCP "Microscaling formats (MX)" 1.0 for
the 4- and 6-bit ones; AWS Neuron's E4M3 is laid out as IEEE 754 does it: its largest exponent is infinity and NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


#: The upper half of fp32's infinity; those of NaN follow.
_INFINITY: Final = 0x7F80
#: Elements coded at a time: the temporaries stay in the processor's caches and are not mapped anew at each call.
_AT_ONCE: Final = 1 << 14


@dataclass(frozen=True, slots=True)
class Minifloat:
    """A sign bit, ``exponent`` bits, ``mantissa`` bits; subnormals below the first exponent, as in IEEE 754.

    Attributes:
        bias: value = (1 + m / 2^mantissa) · 2^(e - bias).
        largest: the largest finite magnitude.
        infinite: the code after ``largest``'s is infinity.
        nan: the code that NaN is written as, sign bit clear, or None; all codes from the first after ``largest`` (and
            infinity) up to it are NaN when read.
    """

    name: str
    exponent: int
    mantissa: int
    bias: int
    largest: float
    infinite: bool = False
    nan: int | None = None

    @property
    def bits(self) -> int:
        """Bits of a code, its sign among them."""
        return 1 + self.exponent + self.mantissa

    @property
    def sign(self) -> int:
        """The bit that negates."""
        return 1 << (self.bits - 1)

    @property
    def largest_code(self) -> int:
        """The positive code of ``largest``."""
        return self.sign - 1 if self.nan is None else int(np.flatnonzero(values(self) == self.largest)[0])

    @property
    def largest_exponent(self) -> int:
        """floor(log2(largest)), ``emax`` in the MX specification."""
        return int(np.frexp(self.largest)[1]) - 1

    @property
    def tiniest(self) -> float:
        """The smallest positive value, a subnormal: the step between neighbours near zero."""
        return 2.0 ** (1 - self.bias - self.mantissa)


E4M3: Final = Minifloat("e4m3", 4, 3, 7, 448.0, nan=0x7F)
E5M2: Final = Minifloat("e5m2", 5, 2, 15, 57344.0, infinite=True, nan=0x7F)
E4M3_IEEE: Final = Minifloat("e4m3_ieee", 4, 3, 7, 240.0, infinite=True, nan=0x7F)
E2M1: Final = Minifloat("e2m1", 2, 1, 1, 6.0)
E2M3: Final = Minifloat("e2m3", 2, 3, 1, 7.5)
E3M2: Final = Minifloat("e3m2", 3, 2, 3, 28.0)

FORMATS: Final = (E4M3, E5M2, E4M3_IEEE, E2M1, E2M3, E3M2)


@cache
def values(fmt: Minifloat) -> NDArray[np.float64]:
    """[2^bits]: the value of every code, exactly; NaN and ±inf where the format has them. Not to be written to."""
    code = np.arange(fmt.sign)
    exponent, fraction = code >> fmt.mantissa, (code & ((1 << fmt.mantissa) - 1)) / (1 << fmt.mantissa)
    scaled = np.where(exponent == 0, fraction, 1 + fraction)
    magnitude = np.ldexp(scaled, np.maximum(exponent, 1) - fmt.bias)
    beyond = magnitude > fmt.largest
    magnitude[beyond] = np.nan
    if fmt.infinite:
        magnitude[np.argmax(beyond)] = np.inf
    found = np.concatenate([magnitude, -magnitude])
    found.flags.writeable = False
    return found


def nearest(fmt: Minifloat, x: NDArray[np.float32], *, saturate: bool = True) -> NDArray[np.uint8]:
    """The codes of fp32 numbers: rounded to nearest, ties to even; any shape, one code a byte.

    Beyond ``largest`` the code is ``largest``'s; -0.0 and what rounds to it keep their sign. NaN keeps its sign and
    becomes ``nan``; in a format that has none it becomes zero, for the caller to mark elsewhere.

    Args:
        fmt: the format of the codes, of 8 bits or fewer.
        x: numbers of any shape.
        saturate: infinity becomes ``largest`` too; else the format's infinity, or NaN, where it has one.

    An fp32 number is first cut to its upper 16 bits *rounded to odd*, which no later rounding to 6 bits or fewer can
    tell from the whole (Boldo and Melquiond, see `dconv.codec.cast`), and then looked up.
    """
    bits = np.asarray(x, np.float32, order="C").reshape(-1).view(np.uint32)
    table = _codes(fmt, saturate)
    codes, index = np.empty(bits.size, np.uint8), np.empty(min(bits.size, _AT_ONCE), np.intp)
    for start in range(0, bits.size, _AT_ONCE):
        part = bits[start : start + _AT_ONCE]
        odd = part & np.uint32(0xFFFF)
        odd += np.uint32(0xFFFF)  # carries into the upper half's last bit unless the lower half is zero
        odd |= part
        np.right_shift(odd, np.uint32(16), out=index[: part.size])
        np.take(table, index[: part.size], out=codes[start : start + _AT_ONCE], mode="clip")
    return codes.reshape(x.shape)


def error_bound(fmt: Minifloat, w: NDArray[np.generic], scale: NDArray[np.generic] | float) -> NDArray[np.float64]:
    """[…] How far ``nearest(w / scale) × scale`` may lie from ``w``: half a step, or what saturation cuts off.

    The last part in 2^20 is for scaling in fp32, by a scale that was itself rounded to fp32.
    """
    size, unit = np.abs(np.asarray(w, np.float64)), np.asarray(scale, np.float64)
    half_step = np.maximum(size * 2.0 ** -(fmt.mantissa + 1), unit * (fmt.tiniest / 2))
    return np.maximum(half_step, size - unit * fmt.largest) + size * 2.0**-20


@cache
def _codes(fmt: Minifloat, saturate: bool) -> NDArray[np.uint8]:
    """[65536] The code for every upper half of an fp32 number."""
    half = np.arange(_INFINITY + 1, dtype=np.uint32) << np.uint32(16)
    size = np.minimum(half.view(np.float32).astype(np.float64), fmt.largest)
    finite = values(fmt)[: fmt.largest_code + 1]
    above = np.searchsorted(finite, size)
    below = np.maximum(above - 1, 0)
    down, up = size - finite[below], finite[above] - size
    code = np.empty(1 << 15, np.uint8)
    code[: half.size] = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    code[half.size :] = fmt.nan or 0
    if not saturate:
        code[_INFINITY] = fmt.largest_code + 1 if fmt.infinite else fmt.nan or fmt.largest_code
    negative = code | np.uint8(fmt.sign)
    if fmt.nan is None:
        negative[half.size :] = 0
    return np.concatenate([code, negative])
