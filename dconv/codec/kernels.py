"""The kernels behind the numeric ops: one function for the engine to call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dconv.codec.cast import cast
from dconv.codec.scale import scale
from dconv.sharding.ops import Cast, Op, Scale

if TYPE_CHECKING:
    from numpy.typing import NDArray


def apply(op: Op, values: NDArray[np.generic]) -> NDArray[np.generic]:
    """`dconv.sharding.ops.Kernel`: same shape, the op's target dtype."""
    match op:
        case Cast(source, target):
            return cast(values, source, target)
        case Scale(source, target, factor):
            return scale(values, source, target, factor)
        case _:
            return values
