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
        return True


@dataclass(frozen=True, slots=True)
class Cast:
    """Another floating dtype, round to nearest even."""

    source: str
    target: str

    @property
    def exact(self) -> bool:
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
        return False


Op = Move | Cast | Scale

#: Applies a numeric op to an array held as `dconv.sharding.dtypes.carrier` of the source dtype; gives the target's.
Kernel = Callable[[Op, "NDArray[np.generic]"], "NDArray[np.generic]"]

_FLOATS: Final = ("f64", "f32", "bf16", "f16")
_WIDENING: Final = {("bf16", "f32"), ("f16", "f32"), ("f32", "f64"), ("bf16", "f64"), ("f16", "f64")}

MOVE: Final = Move()


def op_between(source: str, target: str, factor: float = 1.0) -> Op:
    """The op from one dtype to another, scaled where ``factor`` is not 1.

    Raises:
        Refused: no such conversion (a bare cast of a quantised type would silently ruin the model).
    """
    if source == target and factor == 1.0:
        return MOVE
    if source in _FLOATS and target in _FLOATS:
        return Cast(source, target) if factor == 1.0 else Scale(source, target, factor)
    raise Refused(
        f"{source} cannot become {target} by a cast or be scaled, nothing was written"
        if source == target
        else f"{source} cannot become {target} by a cast, nothing was written",
        expected="a floating dtype on both sides: " + ", ".join(_FLOATS),
    )
