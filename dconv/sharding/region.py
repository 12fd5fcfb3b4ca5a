"""Boxes on index space: the only geometry there is.

A region is a start and a shape. Resharding is intersecting regions; a plan is right when its regions are in bounds,
disjoint, and their volumes add up to the whole (which together mean: every element exactly once).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Index = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Region:
    """The box ``start[i] <= index[i] < start[i] + shape[i]``. A 0-d region holds one element."""

    start: Index
    shape: Index

    @staticmethod
    def whole(shape: Sequence[int]) -> Region:
        """The box of all indices of a tensor of this shape."""
        return Region((0,) * len(shape), tuple(shape))

    @property
    def stop(self) -> Index:
        """The first index behind the box, on each axis."""
        return tuple(a + n for a, n in zip(self.start, self.shape, strict=True))

    @property
    def volume(self) -> int:
        """How many elements it holds: 1 without axes, 0 where an axis is empty."""
        return math.prod(self.shape)

    def intersect(self, other: Region) -> Region | None:
        """The common box, or None when there is none."""
        start: list[int] = []
        shape: list[int] = []
        for a, n, b, m in zip(self.start, self.shape, other.start, other.shape, strict=True):
            low = a if a > b else b
            high = min(a + n, b + m)
            if high <= low:
                return None
            start.append(low)
            shape.append(high - low)
        return Region(tuple(start), tuple(shape))

    def contains(self, other: Region) -> bool:
        """Whether ``other`` lies within, by its bounds; so may an empty one."""
        return all(
            a <= b and b + m <= a + n
            for a, n, b, m in zip(self.start, self.shape, other.start, other.shape, strict=True)
        )

    def bands(self, limit: int) -> Iterator[Region]:
        """Cut into row-major contiguous boxes of at most ``limit`` elements (one element at least), in order.

        The cut depends on shape and limit alone. Every band is one unbroken stretch of the box's elements in
        row-major order.
        """
        if self.volume <= max(limit, 1):
            if self.volume:
                yield self
            return
        axis = next(i for i, n in enumerate(self.shape) if n > 1)
        per_step = self.volume // self.shape[axis]
        step = max(1, limit // per_step)
        for at in range(0, self.shape[axis], step):
            start, shape = list(self.start), list(self.shape)
            start[axis] += at
            shape[axis] = min(step, self.shape[axis] - at)
            band = Region(tuple(start), tuple(shape))
            if per_step > limit:
                yield from band.bands(limit)
            else:
                yield band


def row_major(shape: Sequence[int], itemsize: int) -> Index:
    """Byte strides of a dense row-major array."""
    strides: list[int] = []
    step = itemsize
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def first_overlap(regions: Sequence[Region]) -> tuple[int, int] | None:
    """Positions of two regions that share an element, or None. Empty regions share nothing.

    A sweep along the axis on which most of them begin apart: near-linear for the bands that layouts are made of.
    """
    if len(regions) < 2:
        return None
    if not regions[0].shape:
        return (0, 1)
    axis = max(range(len(regions[0].shape)), key=lambda axis: len({region.start[axis] for region in regions}))
    order = sorted((i for i, r in enumerate(regions) if r.volume), key=lambda i: regions[i].start[axis])
    active: list[int] = []
    for i in order:
        low = regions[i].start[axis]
        active = [j for j in active if regions[j].start[axis] + regions[j].shape[axis] > low]
        for j in active:
            if regions[i].intersect(regions[j]) is not None:
                return (j, i)
        active.append(i)
    return None
