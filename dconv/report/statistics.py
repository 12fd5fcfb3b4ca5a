"""Scales of quantised weights, counted: read a tensor at a time, so that memory does not grow with the model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dconv.checkpoint.source import Source
from dconv.sharding.dtypes import ITEMSIZE
from dconv.sharding.ops import MOVE
from dconv.sharding.plan import Copy
from dconv.sharding.reader import Reader
from dconv.sharding.region import Region, row_major
from dconv.sharding.tensor import Stored

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Bins of the histogram for each doubling: fine enough for the spread of one model's scales, about 40 bins.
PER_OCTAVE: Final = 4
#: Values read at a time.
_VALUES: Final = 1 << 18

_Bits = Callable[["NDArray[Any]"], "NDArray[np.float64]"]


def _exponents(bits: NDArray[Any]) -> NDArray[np.float64]:
    """E8M0: 2^(bits - 127), 255 is NaN. Source: OCP Microscaling Formats, 5.4.1."""
    return np.where(bits == 255, np.nan, np.exp2(bits.astype(np.float64) - 127))


#: How a scale's bits are read, by dtype.
_READ: Final[dict[str, tuple[str, _Bits]]] = {
    "f64": ("<f8", lambda bits: bits),
    "f32": ("<f4", lambda bits: bits.astype(np.float64)),
    "f16": ("<f2", lambda bits: bits.astype(np.float64)),
    "bf16": ("<u2", lambda bits: (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)),
    "u8": ("u1", _exponents),
    "f8_e8m0": ("u1", _exponents),
}
READABLE: Final = frozenset(_READ)


@dataclass
class Statistics:
    """What some scales are.

    Attributes:
        count: of values; ``zeros``, ``negative`` and ``broken`` (infinite or no number) of them.
        low, high: the smallest and largest value above 0; None where there is none.
        bins: number of values above 0 by floor(`PER_OCTAVE` * log2(value)).
    """

    count: int = 0
    zeros: int = 0
    negative: int = 0
    broken: int = 0
    low: float | None = None
    high: float | None = None
    bins: Counter[int] = field(default_factory=Counter[int])

    @property
    def bad(self) -> int:
        """Scales that no scale can be: negative, infinite or no number."""
        return self.negative + self.broken

    def take(self, values: NDArray[np.float64]) -> None:
        """Count these values too."""
        finite = values[np.isfinite(values)]
        good = finite[finite > 0]
        self.count += values.size
        self.broken += values.size - finite.size
        self.zeros += int((finite == 0).sum())
        self.negative += int((finite < 0).sum())
        if good.size:
            low, high = float(good.min()), float(good.max())
            self.low = low if self.low is None else min(low, self.low)
            self.high = high if self.high is None else max(high, self.high)
            bins, counts = np.unique(np.floor(np.log2(good) * PER_OCTAVE).astype(np.int64), return_counts=True)
            self.bins.update(dict(zip(bins.tolist(), counts.tolist(), strict=True)))

    def add(self, other: Statistics) -> None:
        """Count what another has counted."""
        for name in ("count", "zeros", "negative", "broken"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        lows = [low for low in (self.low, other.low) if low is not None]
        highs = [high for high in (self.high, other.high) if high is not None]
        self.low, self.high = min(lows, default=None), max(highs, default=None)
        self.bins.update(other.bins)

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``: numbers, and the histogram as [lowest value of the bin, count]."""
        numbers = {name: getattr(self, name) for name in ("count", "zeros", "negative", "broken", "low", "high")}
        return {**numbers, "bins": [[2 ** (bin / PER_OCTAVE), n] for bin, n in sorted(self.bins.items())]}


def read(source: Source, scales: Mapping[str, Stored]) -> Iterable[tuple[str, Statistics]]:
    """The statistics of each of these tensors of a source, in the order in which they lie on disk.

    Raises:
        Damaged, StorageFault: a file changed since its header was read, or cannot be read.
    """
    reader = Reader(source.root, source.files, _VALUES * 8)
    try:
        for name in sorted(scales, key=lambda name: (scales[name].extents[0].file, scales[name].extents[0].offset)):
            found = Statistics()
            for values in _values(reader, scales[name]):
                found.take(values)
            yield name, found
    finally:
        reader.close()


def _values(reader: Reader, stored: Stored) -> Iterable[NDArray[np.float64]]:
    """All values, some rows at a time; of what lies without gaps, some values at a time."""
    carrier, decoded = _READ[stored.spec.dtype]
    extent, shape, itemsize = stored.extents[0], stored.spec.shape, ITEMSIZE[stored.spec.dtype]
    strides = extent.strides
    if strides == row_major(shape, itemsize):
        shape, strides = (math.prod(shape),), (itemsize,)
    step = max(_VALUES // max(math.prod(shape[1:]), 1), 1)
    for at in range(0, shape[0] if math.prod(shape) else 0, step):
        part = Region.whole((min(step, shape[0] - at), *shape[1:]))
        out = np.empty(part.shape, carrier)
        offset = extent.offset + at * strides[0]
        reader.read_box(Copy(part, extent.file, offset, strides, stored.spec.dtype, MOVE), out)
        yield decoded(out)
