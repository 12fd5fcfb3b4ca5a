"""Numbers that are made up from an element's place: the weights of a model that nobody has trained.

A value is a pure function of the tensor's name and the element's index, in whole-number arithmetic up to the last
step, so that every rank, thread and processor makes the same bytes of any slice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import xxhash

from dconv.codec.cast import cast
from dconv.sharding.dtypes import carrier

if TYPE_CHECKING:
    from numpy.typing import NDArray

KINDS: Final = ("zeros", "constant", "normal", "position")
#: Bits of exponent and mantissa. Formats: IEEE 754, bfloat16.
_FORMAT: Final = {"f64": (11, 52), "f32": (8, 23), "f16": (5, 10), "bf16": (8, 7)}
#: 16-bit parts of two 64-bit numbers; their sum has this variance, in units of (2^16)^2, but for 2^-32 of it.
_PARTS: Final = 8
_VARIANCE: Final = _PARTS / 12


@dataclass(frozen=True, slots=True)
class Fill:
    """What a tensor is filled with.

    Attributes:
        kind: ``zeros``; ``constant`` (``value``); ``normal`` (``std``, ``seed``): the sum of eight uniform numbers,
            which is bell-shaped within 4.9 ``std``; ``position``: sign, mantissa and a quarter to two in magnitude,
            all hashed from name and index, so that a misplaced slice shows.
    """

    kind: str = "zeros"
    value: float = 0.0
    std: float = 0.02
    seed: int = 0

    @property
    def is_zero(self) -> bool:
        """All bytes are zero: files may have holes there."""
        return self.kind == "zeros" or (self.kind == "constant" and str(float(self.value)) == "0.0")


def filled(fill: Fill, tensor: str, index: NDArray[np.uint64], dtype: str) -> NDArray[np.generic]:
    """The elements of ``tensor`` at these row-major indices, in ``carrier(dtype)``; rounded once."""
    if fill.is_zero:
        return np.zeros(index.shape, carrier(dtype))
    if fill.kind == "constant":
        return np.broadcast_to(cast(np.full(1, fill.value), "f64", dtype)[0], index.shape)
    if fill.kind == "normal":
        return cast(_bell(_key(tensor, fill.seed), index) * fill.std, "f64", dtype)
    return _positions(_hashed(index + _key(tensor, 0)), dtype)


def _key(tensor: str, seed: int) -> np.uint64:
    return np.uint64(xxhash.xxh64_intdigest(tensor.encode(), seed & 0xFFFF_FFFF))


def _hashed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64. Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014."""
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def _bell(key: np.uint64, index: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Mean 0, variance 1: the Irwin-Hall distribution of eight numbers."""
    total = np.zeros(index.shape, np.int64)
    for half in range(2):
        bits = _hashed(index * np.uint64(2) + np.uint64(half) + key)
        for _ in range(_PARTS // 2):
            total += (bits & np.uint64(0xFFFF)).astype(np.int64)
            bits >>= np.uint64(16)
    centred = total * 2 - _PARTS * 0xFFFF
    return centred / (2 * 65536 * math.sqrt(_VARIANCE))


def _positions(bits: NDArray[np.uint64], dtype: str) -> NDArray[np.generic]:
    exponent, mantissa = _FORMAT[dtype]
    bias = (1 << (exponent - 1)) - 1
    fraction = bits & np.uint64((1 << mantissa) - 1)
    power = ((bits >> np.uint64(52)) & np.uint64(3)) % np.uint64(3) + np.uint64(bias - 2)
    sign = bits >> np.uint64(63)
    coded = (sign << np.uint64(exponent + mantissa)) | (power << np.uint64(mantissa)) | fraction
    width = (1 + exponent + mantissa) // 8
    return coded.astype(f"<u{width}").view(carrier(dtype))
