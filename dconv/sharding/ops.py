"""What may happen to a value on its way: a closed set, each either exact or numeric.

An exact op keeps every value; a numeric op is computed in fp32 or wider and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dconv.errors import Refused

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Move:
    """The same bytes."""

    @property
    def exact(self) -> bool:
        """Always: no bit changes."""
        return True


@dataclass(frozen=True, slots=True)
class Cast:
    """Another floating dtype, round to nearest even."""

    source: str
    target: str

    @property
    def exact(self) -> bool:
        """Where the target holds every number of the source."""
        return (self.source, self.target) in _WIDENING


@dataclass(frozen=True, slots=True)
class Scale:
    """Times a number above 0 (muP folding), then one rounding to the target, to nearest even.

    The product is taken in fp64 by a factor that is itself within 2 ** -52 of the real one, so a result lies within the
    target's unit roundoff of the real product, or within half the smallest step below the normal range; and 2 ** -51 of
    the product more in either case.
    """

    source: str
    target: str
    factor: float

    @property
    def exact(self) -> bool:
        """Never: a factor of 1 is no `Scale`."""
        return False


@dataclass(frozen=True, slots=True)
class How:
    """How a derived tensor (`dconv.sharding.derived`) is computed.

    Attributes:
        words: for a person, such as ``e4m3 code x its 128x128 block's scale``.
        exact: whether it changes no weight: codes packed anew, or scales, which are no weights.
        bits: read from files for each element, on average.
        floats: whether it is made in any floating dtype, rounded once; else in its own only.
    """

    words: str
    exact: bool
    bits: float
    floats: bool = False


@dataclass(frozen=True, slots=True)
class Derive:
    """Computed by the reader of the source, times a factor, and rounded once where it is floating."""

    how: How
    target: str
    factor: float = 1.0

    @property
    def exact(self) -> bool:
        """Where computing is exact, and nothing is multiplied."""
        return self.how.exact and self.factor == 1.0


Op = Move | Cast | Scale | Derive

#: Applies a numeric op to an array held as `dconv.sharding.dtypes.carrier` of the source dtype; gives the target's.
Kernel = Callable[[Op, "NDArray[np.generic]"], "NDArray[np.generic]"]

FLOATS: Final = ("f64", "f32", "bf16", "f16")
_WIDENING: Final = {("bf16", "f32"), ("f16", "f32"), ("f32", "f64"), ("bf16", "f64"), ("f16", "f64")}

MOVE: Final = Move()


def op_between(source: str, target: str, factor: float = 1.0, how: How | None = None) -> Op:
    """The op from one dtype to another, scaled where ``factor`` is not 1; ``how`` where the source is derived.

    Raises:
        Refused: no such conversion (a bare cast of a quantised type would silently ruin the model).
    """
    if how is not None and (target in FLOATS if how.floats else (source, factor) == (target, 1.0)):
        return Derive(how, target, factor)
    if source == target and factor == 1.0:
        return MOVE
    if source in FLOATS and target in FLOATS:
        return Cast(source, target) if factor == 1.0 else Scale(source, target, factor)
    raise Refused(
        f"{source} cannot become {target} by a cast or be scaled, nothing was written"
        if source == target
        else f"{source} cannot become {target} by a cast, nothing was written",
        expected="a floating dtype on both sides: " + ", ".join(FLOATS),
    )
