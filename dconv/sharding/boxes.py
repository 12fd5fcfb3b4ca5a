"""Boxes of single tensors, stored or computed, in any dtype: for whoever looks at values without a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dconv.sharding.derived import Array, Derived, Read, open_reader, steps
from dconv.sharding.dtypes import carrier
from dconv.sharding.ops import MOVE, How, Kernel
from dconv.sharding.plan import Copy
from dconv.sharding.reader import ReadLog
from dconv.sharding.region import Region
from dconv.sharding.tensor import Logical

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SCRATCH: Final = 1 << 20
_FILE: Final = "looked at//"
HOW: Final = How("looked at", exact=False, bits=8, floats=True)


@dataclass(frozen=True, slots=True)
class Plain:
    """The only input, in the dtype that is asked for."""

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """The box itself; what is looked at is never scaled."""
        del factor
        return read(0, box, dtype)


class Boxes:
    """Reads and computes; to be closed.

    Args:
        kernel: applies the ops of what boxes are made of.
    """

    def __init__(self, logical: Logical, kernel: Kernel, log: ReadLog | None = None) -> None:
        self._derived: dict[str, Derived] = dict(logical.derived)
        view = Logical(logical.root, {}, {}, logical.files, reader=logical.reader, derived=self._derived)
        self._derived[_FILE] = Derived((), (), Plain(), HOW)  # which box it is changes from read to read
        self._reader = open_reader(view, _SCRATCH, kernel, log)

    def close(self) -> None:
        """Close the files behind it."""
        self._reader.close()

    def array(self, array: Array, region: Region, dtype: str) -> NDArray[Any]:
        """A box of what lies in files or is computed, in ``carrier(dtype)``."""
        return self.made(Derived(array.shape, (array,), Plain(), HOW), region, dtype)

    def made(self, derived: Derived, region: Region, dtype: str) -> NDArray[Any]:
        """A box of a derived tensor, in ``carrier(dtype)``."""
        self._derived[_FILE] = derived
        out = np.empty(region.shape, carrier(dtype))
        along = steps(derived.shape)
        offset = sum(a * s for a, s in zip(region.start, along, strict=True))
        self._reader.read_box(Copy(region, _FILE, offset, along, dtype, MOVE), out)
        return out
