"""Values times one number: muP scalars folded into the weights (`dconv.sharding.ops.Scale` states the error)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from dconv.codec.cast import cast
from dconv.sharding.dtypes import carrier

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Elements taken at a time: their fp64 copies and the temporaries of rounding stay in the processor's caches, and
#: within the buffers that a rank may take.
_AT_ONCE: Final = 1 << 13


def scale(values: NDArray[np.generic], source: str, target: str, factor: float) -> NDArray[np.generic]:
    """An array held in ``carrier(source)`` times ``factor``, in ``carrier(target)``; any shape, rounded once."""
    out = np.empty(values.shape, carrier(target))
    given, found = values.reshape(-1), out.reshape(-1)
    for start in range(0, given.size, _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # infinity and NaN as IEEE says
            product = np.multiply(cast(given[part], source, "f64"), factor, dtype=np.float64)
        found[part] = cast(product, "f64", target)
    return out
