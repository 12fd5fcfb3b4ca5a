"""How logical tensors make up one tensor of a parallel checkpoint, and how that tensor is cut over ranks.

Everything is a stretch of rows (or columns): a *part* is a row of *runs*, each taken from one logical tensor. Tensor
parallelism cuts every part into equal stretches; a rank holds its stretch of each part, one behind the other. From
this one declaration come both directions: where to read and where to write.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dconv.errors import Refused
from dconv.sharding.region import Index, Region
from dconv.sharding.tensor import Extent, Piece, Slot, TensorSpec


@dataclass(frozen=True, slots=True)
class Run:
    """``length`` indices of a logical tensor, from ``start``, along the fused axis.

    Attributes:
        at: (axis, index) of logical axes that the fused tensor lacks: one expert of a tensor that holds all.
    """

    tensor: str
    start: int
    length: int
    at: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """Runs in order. Tensor parallelism cuts each part by itself (gate and up are two parts, QKV is one)."""

    runs: tuple[Run, ...]

    @property
    def length(self) -> int:
        """Indices along the fused axis."""
        return sum(run.length for run in self.runs)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Indices ``start <= i < stop`` of part number ``part``; past the part's length lies padding."""

    part: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Fused:
    """One tensor of a parallel checkpoint, whole: its name there and what it is made of.

    Attributes:
        name: global Megatron name, layer and expert numbers filled in.
        axis: the axis that parts lie along and that tensor parallelism cuts, in the fused tensor.
        parallel: whether tensor parallelism (of experts: expert tensor parallelism) cuts it; otherwise every rank
            holds it whole.
        parts: what lies along ``axis``.
        specs: the logical tensors in it; all agree on the other axes.
        order: the logical axis behind each fused axis (a transposed matrix has (1, 0)); -1 where there is none.
        padded: whether vocabulary padding may follow the (single) part.
        either: some writers cut it, others leave it whole: its shape says which.
    """

    name: str
    axis: int
    parallel: bool
    parts: tuple[Part, ...]
    specs: tuple[TensorSpec, ...]
    order: Index
    padded: bool = False
    either: bool = False

    @property
    def length(self) -> int:
        """Indices along ``axis``, padding aside."""
        return sum(part.length for part in self.parts)

    def shape(self, length: int | None = None) -> Index:
        """Shape with ``length`` (default: all, unpadded) indices along the fused axis."""
        shape = [self.specs[0].shape[axis] if axis >= 0 else 1 for axis in self.order]
        if shape:
            shape[self.axis] = self.length if length is None else length
        return tuple(shape)

    def whole(self, padded_length: int | None = None) -> tuple[Stretch, ...]:
        """All of it: each part whole, the last one with padding up to ``padded_length`` in total."""
        stretches = [Stretch(i, 0, part.length) for i, part in enumerate(self.parts)]
        if padded_length is not None and self.padded:
            last = stretches[-1]
            stretches[-1] = Stretch(last.part, 0, last.stop + padded_length - self.length)
        return tuple(stretches)

    def shard(self, index: int, count: int, padded_length: int | None = None) -> tuple[Stretch, ...]:
        """What tensor-parallel rank ``index`` of ``count`` holds.

        Raises:
            Refused: a part does not divide by ``count``.
        """
        whole = self.whole(padded_length)
        if not self.parallel or count == 1:
            return whole
        cut: list[Stretch] = []
        for stretch in whole:
            n = stretch.stop
            if n % count:
                raise Refused(
                    f"{self.name} does not divide over tensor parallel {count}, nothing was written",
                    where=", ".join(dict.fromkeys(run.tensor for run in self.parts[stretch.part].runs)),
                    expected=f"{n} divisible by {count}",
                    do="choose another --tp",
                )
            cut.append(Stretch(stretch.part, index * n // count, (index + 1) * n // count))
        return tuple(cut)

    def slots(self, stretches: Sequence[Stretch], lead: Index = ()) -> tuple[Slot, ...]:
        """Slots of a stored tensor that holds ``stretches`` one behind the other, at ``lead`` of the stacking axes."""
        specs = {spec.name: spec for spec in self.specs}
        axes = (-1,) * len(lead) + self.order
        slots: list[Slot] = []
        behind = 0
        for stretch in stretches:
            at = 0
            for run in self.parts[stretch.part].runs:
                low, high = max(stretch.start, at), min(stretch.stop, at + run.length)
                if low < high:
                    shape = specs[run.tensor].shape
                    place = behind + low - stretch.start
                    slots.append(self._slot(run, run.start + low - at, high - low, place, shape, axes, lead))
                at += run.length
            behind += stretch.stop - stretch.start
        return tuple(slots)

    def _slot(self, run: Run, start: int, length: int, place: int, shape: Index, axes: Index, lead: Index) -> Slot:
        if not shape:
            return Slot(run.tensor, Region((), ()), lead, axes)
        logical = self.order[self.axis]
        low, size = [0] * len(shape), list(shape)
        low[logical], size[logical] = start, length
        for axis, index in run.at:
            low[axis], size[axis] = index, 1
        at = [0] * len(self.order)
        at[self.axis] = place
        return Slot(run.tensor, Region(tuple(low), tuple(size)), (*lead, *at), axes)


def pieces(slots: Iterable[Slot], extents: Sequence[Extent], dtype: str) -> Iterable[Piece]:
    """Where the logical boxes of ``slots`` lie, given the extents of the stored tensor that the slots divide."""
    for slot in slots:
        place = slot.stored
        for extent in extents:
            box = place.intersect(extent.region)
            if box is None:
                continue
            offset = extent.offset + sum(
                (b - a) * s for a, b, s in zip(extent.region.start, box.start, extent.strides, strict=True)
            )
            start, shape = list(slot.region.start), list(slot.region.shape)
            strides = [0] * len(shape)
            for i, axis in enumerate(slot.axes):
                if axis >= 0:
                    start[axis] += box.start[i] - place.start[i]
                    shape[axis] = box.shape[i]
                    strides[axis] = extent.strides[i]
            yield Piece(slot.tensor, Region(tuple(start), tuple(shape)), extent.file, offset, tuple(strides), dtype)
