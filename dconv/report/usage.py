"""Which codes a class of modules uses, and how far what was encoded may have lain from what they decode to.

Nothing tells what the weights were before; but a code stands for all numbers up to half a step away, so that the steps
bound what was lost where nothing was cut off.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from math import sqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from dconv.codec.minifloat import Minifloat, values

if TYPE_CHECKING:
    from numpy.typing import NDArray


@cache
def half_steps(fmt: Minifloat) -> NDArray[np.float64]:
    """[2^bits]: for each code half the distance to the next larger magnitude, as if there were one; NaN has none."""
    exponent = (np.arange(1 << fmt.bits) & (fmt.sign - 1)) >> fmt.mantissa
    found = np.ldexp(0.5, np.maximum(exponent, 1) - fmt.bias - fmt.mantissa)
    found[~np.isfinite(values(fmt))] = np.nan
    return found


@dataclass
class Usage:
    """The codes of some weights, counted.

    Attributes:
        tensors: in the class; ``looked_at`` of them in the sample.
        codes: [2^bits], how often each occurs.
        of_largest: the largest half step in a block, by the largest weight there.
        squares, halves: sums of squares of weights and of their half steps.
    """

    kind: str
    fmt: Minifloat
    tensors: int = 0
    looked_at: set[str] = field(default_factory=set[str])
    of_largest: float = 0.0
    squares: float = 0.0
    halves: float = 0.0

    def __post_init__(self) -> None:
        self.codes = np.zeros(1 << self.fmt.bits, np.int64)

    def take(
        self, name: str, codes: NDArray[np.uint8], scales: NDArray[np.float64], largest: NDArray[np.float32]
    ) -> None:
        """Count these, too.

        Args:
            name: the weight's.
            codes: [rows, columns] of a box.
            scales: what multiplies each of them, of the same shape.
            largest: of each block that they touch, the largest magnitude of a code's value.
        """
        self.looked_at.add(name)
        self.codes += np.bincount(codes.reshape(-1), minlength=self.codes.size)
        worth, half = values(self.fmt)[codes] * scales, half_steps(self.fmt)[codes] * scales
        good = np.isfinite(worth)
        self.squares += float(np.square(worth[good]).sum())
        self.halves += float(np.square(half[good]).sum())
        known = np.unique(largest[largest > 0])
        if known.size:
            at = np.searchsorted(values(self.fmt)[: self.fmt.largest_code + 1], known)
            self.of_largest = max(self.of_largest, float((half_steps(self.fmt)[at] / known).max()))

    def add(self, other: Usage) -> None:
        """Count what another of the same format has counted."""
        self.tensors += other.tensors
        self.looked_at |= other.looked_at
        self.codes += other.codes
        self.squares += other.squares
        self.halves += other.halves
        self.of_largest = max(self.of_largest, other.of_largest)

    @property
    def count(self) -> int:
        """Codes in the sample."""
        return int(self.codes.sum())

    @property
    def of_weight(self) -> float:
        """The largest half step by the weight itself, over the normal numbers among the codes."""
        used = self.codes[: self.fmt.sign] + self.codes[self.fmt.sign :]
        worth = values(self.fmt)[: self.fmt.sign]
        at = np.flatnonzero((used > 0) & np.isfinite(worth) & (np.arange(used.size) >> self.fmt.mantissa > 0))
        return float((half_steps(self.fmt)[at] / worth[at]).max(initial=0))

    @property
    def bound(self) -> float:
        """The Frobenius norm of the half steps by that of the weights: the whole error is at most that."""
        return sqrt(self.halves / self.squares) if self.squares else 0.0

    @property
    def expected(self) -> float:
        """The same for errors spread evenly over the steps, as rounding spreads them: bound / sqrt(3)."""
        return self.bound / sqrt(3)

    def shares(self) -> dict[str, float]:
        """Parts of all codes: zeros, subnormals, those at the largest value, and those that are no numbers."""
        fmt, worth = self.fmt, np.abs(values(self.fmt))
        magnitude = np.arange(worth.size) & (fmt.sign - 1)
        kinds = {
            "zero": worth == 0,
            "subnormal": (worth > 0) & (magnitude < 1 << fmt.mantissa),
            "largest": worth == fmt.largest,
            "no number": ~np.isfinite(worth),
        }
        return {key: float(self.codes[which].sum() / max(self.count, 1)) for key, which in kinds.items()}

    def exponents(self) -> dict[int, float]:
        """Parts of all codes by floor(log2(magnitude)), normal numbers only, the largest first."""
        fmt = self.fmt
        exponent = (np.arange(self.codes.size) & (fmt.sign - 1)) >> fmt.mantissa
        normal = np.isfinite(values(fmt)) & (exponent > 0)
        found = np.bincount(exponent[normal], self.codes[normal], 1 << fmt.exponent)
        last = int(exponent[normal].max())
        return {e - fmt.bias: float(found[e] / max(self.count, 1)) for e in range(last, 0, -1)}

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "class": self.kind,
            "format": self.fmt.name,
            "tensors": self.tensors,
            "looked_at": len(self.looked_at),
            "codes": self.count,
            "bound_of_weight": self.of_weight,
            "bound_of_largest": self.of_largest,
            "bound": self.bound,
            "expected": self.expected,
            "shares": self.shares(),
            "exponents": {str(exponent): share for exponent, share in self.exponents().items()},
        }
