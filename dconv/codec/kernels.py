"""The kernels behind the numeric ops: one function for the engine to call."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dconv.codec.cast import cast
from dconv.sharding.ops import Cast, Op


def apply(op: Op, values: NDArray[np.generic]) -> NDArray[np.generic]:
    """`dconv.sharding.ops.Kernel`: same shape, the op's target dtype."""
    match op:
        case Cast(source, target):
            return cast(values, source, target)
        case _:
            return values
