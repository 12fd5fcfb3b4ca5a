"""Under which names, and where, a source's own files have what a plan reads: looked up by file and offset."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace

from dconv.sharding.derived import steps
from dconv.sharding.dtypes import ITEMSIZE
from dconv.sharding.region import Index, Region
from dconv.sharding.tensor import Extent, Logical, Piece, Stored


@dataclass(frozen=True, slots=True)
class Box:
    """A box of a logical tensor (``start``, ``shape``) and where it begins in a stored one (``at``)."""

    start: Index
    shape: Index
    at: Index

    @property
    def region(self) -> Region:
        """The box, in the tensor."""
        return Region(self.start, self.shape)


@dataclass(frozen=True, slots=True)
class Place:
    """A stored tensor that holds a part of a logical one.

    Attributes:
        file: from the directory that holds the weights (of Megatron's the iteration), or from OUT; empty where there
            is none, as of made-up weights.
        name: its own in that file; behind that of its virtual chunk (``model1.``) where the file has several.
        key: its name in the receipt, in an output.
        shape: as the file gives it, with the axes that stack layers or experts.
        whole: False where the file has chunks of a tensor of that shape, which goes on in other files.
        rank: of the parallel layout, in an output that has ranks (``tp1 pp0``).
        also: other names of the same bytes in the file.
        ops: what happens to the values on their way here, in words; empty in a source.
        exact: every value is kept.
        padding: elements that come from no logical tensor.
        inputs: what it is computed from, where no file has it (weights in codes); theirs have no boxes.
    """

    file: str
    name: str
    shape: Index
    dtype: str
    boxes: tuple[Box, ...]
    key: str = ""
    rank: str = ""
    also: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    exact: bool = True
    padding: int = 0
    whole: bool = True
    inputs: tuple[Place, ...] = ()

    @property
    def stored(self) -> tuple[Place, ...]:
        """Itself, or those in files that it is computed from."""
        return tuple(dict.fromkeys(it for one in self.inputs for it in one.stored)) if self.inputs else (self,)


class OwnNames:
    """Stored tensors of a source by the bytes that they have, for the name that a piece has in its file."""

    def __init__(self, source: Logical) -> None:
        self._derived = source.derived
        held: dict[str, list[tuple[int, int, Stored, Extent]]] = {}
        for stored in source.stored():
            itemsize = ITEMSIZE[stored.spec.dtype]
            for extent in stored.extents:
                last = sum((n - 1) * step for n, step in zip(extent.region.shape, extent.strides, strict=True))
                end = extent.offset + max(last + itemsize, 1)
                held.setdefault(extent.file, []).append((extent.offset, end, stored, extent))
        self._real = source.files if held else {}
        self._held = {file: sorted(extents, key=lambda one: one[:2]) for file, extents in held.items()}
        self._starts = {file: [one[0] for one in extents] for file, extents in self._held.items()}
        self._reach = {
            file: list(itertools.accumulate((one[1] for one in extents), max)) for file, extents in self._held.items()
        }

    def names(self, piece: Piece) -> set[str]:
        """The names of what a piece lies in, or of all that it is computed from."""
        derived = self._derived.get(piece.file)
        if derived is None:
            return set(self.of(piece))
        return {name for array in derived.inputs for one in (*array.pieces, *array.twins) for name in self.names(one)}

    def of(self, piece: Piece) -> dict[str, tuple[Stored, Index]]:
        """The stored tensors that a piece lies in, by name, and where in them it begins."""
        found: dict[str, tuple[Stored, Index]] = {}
        i = bisect_right(self._starts.get(piece.file, ()), piece.offset) - 1
        while i >= 0 and self._reach[piece.file][i] > piece.offset:
            _, _, stored, extent = self._held[piece.file][i]
            at = _at(extent, piece)
            if stored.spec.dtype == piece.dtype and at is not None:
                found[stored.spec.name] = stored, at
            i -= 1
        return dict(sorted(found.items()))

    def places(self, pieces: Iterable[Piece]) -> tuple[Place, ...]:
        """Stored tensors, each with the boxes that pieces have of it."""
        boxes: dict[tuple[str, str], list[Box]] = {}
        first: dict[tuple[str, str], tuple[Piece, Stored | None, tuple[str, ...]]] = {}
        for piece in pieces:
            named = self.of(piece)
            name, *also = named or [piece.tensor]
            stored, at = named[name] if named else (None, self._computed_at(piece))
            boxes.setdefault((piece.file, name), []).append(Box(piece.region.start, piece.region.shape, at))
            first.setdefault((piece.file, name), (piece, stored, tuple(also)))
        return tuple(
            Place(
                file if file in self._real else "",
                name,
                stored.spec.file_shape if stored else self._shape(piece),
                piece.dtype,
                tuple(boxes[file, name]),
                also=also,
                whole=stored is None or len({extent.file for extent in stored.extents}) == 1,
                inputs=self._inputs(piece),
            )
            for (file, name), (piece, stored, also) in first.items()
        )

    def _shape(self, piece: Piece) -> Index:
        derived = self._derived.get(piece.file)
        return derived.shape if derived else piece.region.shape

    def _computed_at(self, piece: Piece) -> Index:
        derived = self._derived.get(piece.file)
        if derived is None:
            return piece.region.start
        return _at(Extent(Region.whole(derived.shape), piece.file, 0, steps(derived.shape)), piece) or ()

    def _inputs(self, piece: Piece) -> tuple[Place, ...]:
        derived = self._derived.get(piece.file)
        arrays = derived.inputs if derived else ()
        return tuple(
            replace(place, boxes=()) for array in arrays for place in self.places((*array.pieces, *array.twins))
        )


def _at(extent: Extent, piece: Piece) -> Index | None:
    """The index of a stored tensor's element at the piece's first byte; None where it has none there."""
    rest = piece.offset - extent.offset
    shape, at = extent.region.shape, [0] * len(extent.region.shape)
    if bool(math.prod(shape)) != bool(piece.region.volume):
        return None
    for axis in sorted((i for i, n in enumerate(shape) if n > 1), key=lambda i: -extent.strides[i]):
        at[axis] = min(rest // extent.strides[axis], shape[axis] - 1)
        rest -= at[axis] * extent.strides[axis]
    return tuple(a + b for a, b in zip(extent.region.start, at, strict=True)) if rest == 0 else None
