"""Values times one number: muP scalars folded into the weights (`dconv.sharding.ops.Scale` states the error)."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np

from dconv.codec.cast import cast
from dconv.sharding.dtypes import ITEMSIZE, carrier

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Elements taken at a time: their fp64 copies and the temporaries of rounding stay in the processor's caches, and
#: within the buffers that a rank may take.
_AT_ONCE: Final = 1 << 13


def scale(values: NDArray[np.generic], source: str, target: str, factor: float) -> NDArray[np.generic]:
    """An array held in ``carrier(source)`` times ``factor``, in ``carrier(target)``; any shape, rounded once."""
    if ITEMSIZE[source] == 2:
        return np.take(_products(source, target, factor), values.view("<u2"))
    return _multiplied(values, source, target, factor)


@lru_cache(maxsize=8)
def _products(source: str, target: str, factor: float) -> NDArray[np.generic]:
    """Of every 16-bit pattern: looking a product up is many times as fast as computing it."""
    return _multiplied(np.arange(1 << 16, dtype=np.uint16).view(carrier(source)), source, target, factor)


def _multiplied(values: NDArray[np.generic], source: str, target: str, factor: float) -> NDArray[np.generic]:
    out = np.empty(values.shape, carrier(target))
    given, found = values.reshape(-1), out.reshape(-1)
    for start in range(0, given.size, _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # infinity and NaN as IEEE says
            product = np.multiply(cast(given[part], source, "f64"), factor, dtype=np.float64)
        found[part] = cast(product, "f64", target)
    return out
