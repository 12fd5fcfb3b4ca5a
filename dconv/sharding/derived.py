"""Tensors that no file holds as they are: computed, box by box, from others that files hold.

A weight decoded from codes and scales, codes encoded from a weight, integers packed anew: to the engine each is one
more file, whose elements lie in row-major order, one step apart. So they are cut, renamed, fused and spread over ranks
as all tensors are, and what they are made of may be such tensors, too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Final, Protocol

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from dconv.sharding.dtypes import carrier
from dconv.sharding.ops import MOVE, Derive, How, Kernel, op_between
from dconv.sharding.plan import Copy
from dconv.sharding.reader import BoxReader, Reader, ReadLog
from dconv.sharding.region import Index, Region, row_major
from dconv.sharding.replicas import disagreement, equal
from dconv.sharding.staging import Stage
from dconv.sharding.tensor import Logical, Piece

#: Elements that a recipe is asked for at once, at most: its temporaries stay in the processor's caches.
_AT_ONCE: Final = 1 << 18
#: What remembering a row takes beside its elements, about.
_ROW_BYTES: Final = 256

#: Reads an input: its number, a box in its coordinates, and a floating dtype or "" for its own.
Read = Callable[[int, Region, str], NDArray[Any]]


class Recipe(Protocol):
    """Computes a box. A frozen dataclass: its ``repr`` is a part of the plan's identity."""

    def __call__(self, box: Region, dtype: str, factor: float, read: Read) -> NDArray[np.generic]:
        """The box's values in ``carrier(dtype)``, times ``factor`` where the values are floating."""
        ...


@dataclass(frozen=True, slots=True)
class Array:
    """What a tensor is made of: boxes that cover it; ``twins`` are those that several shards hold, to be equal."""

    shape: Index
    dtype: str
    pieces: tuple[Piece, ...]
    twins: tuple[Piece, ...] = ()

    def in_order(self, axes: Index) -> Array:
        """With its axes in another order, for each the one that it was: what lies in files is the same."""

        def turned(sizes: Index) -> Index:
            return tuple(sizes[axis] for axis in axes)

        def turn(piece: Piece) -> Piece:
            region = Region(turned(piece.region.start), turned(piece.region.shape))
            return replace(piece, region=region, strides=turned(piece.strides))

        pieces, twins = (tuple(map(turn, each)) for each in (self.pieces, self.twins))
        return Array(turned(self.shape), self.dtype, pieces, twins)


@dataclass(frozen=True, slots=True)
class Derived:
    """A tensor that is computed.

    Attributes:
        how: what a person should know of it.
        cost: elements of the inputs that one of its own takes.
        remembered: whether rows are kept after they were computed, since others are computed from them again.
        across: how many of the last axes belong to one row; many rows of few columns are then computed at once, which
            is what can be read of inputs whose files have the columns one after the other. 0 computes whole rows.
    """

    shape: Index
    inputs: tuple[Array, ...]
    recipe: Recipe
    how: How
    cost: int = 1
    remembered: bool = False
    across: int = 0

    def piece(self, tensor: str, file: str, dtype: str) -> Piece:
        """All of it, as a box of a logical tensor."""
        return Piece(tensor, Region.whole(self.shape), file, 0, steps(self.shape), dtype)


def steps(shape: Index) -> Index:
    """The strides of a derived tensor: it counts in elements, since its dtype is the reader's choice."""
    return row_major(shape, 1)


def real_files(files: Iterable[str], derived: Mapping[str, Derived]) -> set[str]:
    """The files that can be opened behind ``files``: those that derived tensors are computed from, to the last."""
    found: set[str] = set()
    seen: set[str] = set()
    waiting = list(files)
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        if made := derived.get(file):
            waiting += (piece.file for array in made.inputs for piece in (*array.pieces, *array.twins))
        else:
            found.add(file)
    return found


def open_reader(
    logical: Logical,
    scratch_bytes: int,
    kernel: Kernel,
    log: ReadLog | None = None,
    over: Callable[[BoxReader], BoxReader] = lambda reader: reader,
    stage: Stage | None = None,
) -> BoxReader:
    """What reads the boxes of a checkpoint, computed ones included.

    Args:
        logical: the checkpoint.
        scratch_bytes: size of the reader's scratch buffer.
        kernel: applies the ops of what derived tensors are made of.
        log: is told of every read.
        over: puts what reads `Logical.held` over what reads the files.
        stage: has copies of the files on this machine.
    """
    reader = logical.reader(scratch_bytes) if logical.reader else None
    reader = over(reader or Reader(logical.root, logical.files, scratch_bytes, log, stage))
    return DerivedReader(reader, logical.derived, kernel, scratch_bytes) if logical.derived else reader


class DerivedReader:
    """Computes boxes of derived tensors and reads those of all others (`dconv.sharding.reader.BoxReader`).

    Args:
        kernel: applies the ops of the inputs.
        scratch_bytes: bounds what is computed at once, and what is remembered.
    """

    def __init__(self, reader: BoxReader, derived: Mapping[str, Derived], kernel: Kernel, scratch_bytes: int) -> None:
        self._reader, self._derived, self._kernel = reader, derived, kernel
        self._at_once = min(_AT_ONCE, max(scratch_bytes // 4, 1))
        self._room = scratch_bytes
        self._rows: OrderedDict[tuple[str, Index], NDArray[np.generic]] = OrderedDict()
        self._held = 0

    def close(self) -> None:
        """Drop the rows that are held, and close the reader of the files."""
        self._rows.clear()
        self._held = 0
        self._reader.close()

    def has(self, file: str) -> bool:
        """Whether every file is there that the tensor is computed from."""
        return all(map(self._reader.has, real_files([file], self._derived)))

    def is_sparse(self, file: str) -> bool:
        """Never of what is computed: nobody knows where it is zero."""
        return file not in self._derived and self._reader.is_sparse(file)

    def is_hole(self, copy: Copy) -> bool:
        """Never of what is computed."""
        return copy.file not in self._derived and self._reader.is_hole(copy)

    def read_box(self, copy: Copy, out: NDArray[np.generic]) -> None:
        """Compute the smallest box that holds the copy, and take its elements; read what lies in files."""
        derived = self._derived.get(copy.file)
        if derived is None:
            self._reader.read_box(copy, out)
            return
        factor = copy.op.factor if isinstance(copy.op, Derive) else 1.0
        box, along = _box(copy, derived.shape)
        if along is None:
            self._compute(copy.file, derived, box, copy.dtype, factor, out)
            return
        values = np.empty(box.shape, carrier(copy.dtype))
        self._compute(copy.file, derived, box, copy.dtype, factor, values)
        strides = [step * values.strides[axis] for axis, step in along]
        out[...] = as_strided(values, copy.region.shape, strides).view(out.dtype)

    def _compute(
        self, file: str, derived: Derived, box: Region, dtype: str, factor: float, out: NDArray[np.generic]
    ) -> None:
        """Fill ``out`` (the box's shape, any type of the dtype's size)."""
        if derived.remembered:
            out[...] = self._recalled(file, derived, box, dtype).view(out.dtype)
            return
        for band in _bands(box, max(1, self._at_once // derived.cost), derived.across):
            out[_place(box, band)] = self._made(derived, band, dtype, factor).view(out.dtype)

    def _made(self, derived: Derived, box: Region, dtype: str, factor: float) -> NDArray[np.generic]:
        def read(number: int, region: Region, wanted: str) -> NDArray[np.generic]:
            array = derived.inputs[number]
            return self._array(array, region, wanted or array.dtype)

        return derived.recipe(box, dtype, factor, read)

    def _array(self, array: Array, region: Region, dtype: str) -> NDArray[np.generic]:
        out = np.empty(region.shape, carrier(dtype))
        for piece in array.pieces:
            box = region.intersect(piece.region)
            if box is None:
                continue
            copy = self._copy(piece, box, dtype)
            place = out[_place(region, box)]
            plain = copy.op is MOVE or isinstance(copy.op, Derive)
            raw = place if plain else np.empty(box.shape, carrier(copy.dtype))
            self.read_box(copy, raw)
            for twin in array.twins:
                if twin.region == piece.region and not equal(self, raw, other := self._copy(twin, box, dtype)):
                    raise disagreement(piece.tensor, copy, other)
            if not plain:
                place[...] = self._kernel(copy.op, raw)
        return out

    def _copy(self, piece: Piece, box: Region, dtype: str) -> Copy:
        made = self._derived.get(piece.file)
        op = op_between(piece.dtype, dtype, piece.factor, made.how if made else None)
        shift = sum((b - a) * s for a, b, s in zip(piece.region.start, box.start, piece.strides, strict=True))
        read_as = dtype if isinstance(op, Derive) else piece.dtype
        return Copy(box, piece.file, piece.offset + shift, piece.strides, read_as, op)

    def _recalled(self, file: str, derived: Derived, box: Region, dtype: str) -> NDArray[np.generic]:
        """A box out of whole rows, which are computed once as long as there is room for them."""
        *lead, rows, columns = box.shape
        out = np.empty(box.shape, carrier(dtype))
        cut = slice(box.start[-1], box.start[-1] + columns)
        for at in np.ndindex(*lead):
            first = tuple(a + b for a, b in zip(box.start, at, strict=False))
            keys = [(file, (*first, box.start[-2] + row)) for row in range(rows)]
            found = [self._rows.get(key) for key in keys]
            missing = [row for row in range(rows) if found[row] is None]
            if missing:  # from the first to the last: what lies between them was there a moment ago, or never
                low, high = missing[0], missing[-1] + 1
                made = self._lines(derived, (*first, box.start[-2] + low), high - low, dtype)
                for row in range(low, high):
                    found[row] = made[row - low]
                    self._remember(keys[row], made[row - low])
            for row, line in enumerate(found):
                if line is not None:
                    out[(*at, row)] = line[cut]
        return out

    def _lines(self, derived: Derived, first: Index, count: int, dtype: str) -> NDArray[np.generic]:
        """So many whole rows from the one at ``first``."""
        width = derived.shape[-1]
        lines = Region((*first, 0), (*(1,) * (len(first) - 1), count, width))
        found = np.empty(lines.shape, carrier(dtype))
        for band in lines.bands(max(1, self._at_once // derived.cost)):
            found[_place(lines, band)] = self._made(derived, band, dtype, 1.0)
        return found.reshape(count, width)

    def _remember(self, key: tuple[str, Index], row: NDArray[np.generic]) -> None:
        if key not in self._rows:
            self._rows[key] = row.copy()
            self._held += row.nbytes + _ROW_BYTES
        while self._held > self._room and len(self._rows) > 1:
            self._held -= self._rows.popitem(last=False)[1].nbytes + _ROW_BYTES


def _bands(box: Region, limit: int, across: int) -> Iterator[Region]:
    """Cut a box, with its rows' columns (see `Derived.across`) before its rows."""
    if not across:
        yield from box.bands(limit)
        return
    rows = len(box.shape) - across - 1
    order = [*range(rows), rows + 1, rows, *range(rows + 2, len(box.shape))]
    swapped = Region(tuple(box.start[axis] for axis in order), tuple(box.shape[axis] for axis in order))
    for band in swapped.bands(limit):  # the order is its own inverse
        yield Region(tuple(band.start[axis] for axis in order), tuple(band.shape[axis] for axis in order))


def _place(outer: Region, inner: Region) -> tuple[Any, ...]:
    place = zip(outer.start, inner.start, inner.shape, strict=True)
    return (..., *(slice(b - a, b - a + n) for a, b, n in place))


def _box(copy: Copy, shape: Index) -> tuple[Region, list[tuple[int, int]] | None]:
    """The smallest box of a derived tensor that holds a copy's elements, and how the copy's axes run in it.

    Returns:
        The box; for each axis of the copy the box's axis and the step along it, None where the two are the same.

    Raises:
        ValueError: the copy's axes do not run along the tensor's.
    """
    strides = steps(shape)
    start: list[int] = []
    rest = copy.offset
    for n, stride in zip(shape, strides, strict=True):
        at = rest // stride if n > 1 else 0
        start.append(at)
        rest -= at * stride
    extent = [1] * len(shape)
    along: list[tuple[int, int]] = []
    for n, step in zip(copy.region.shape, copy.strides, strict=True):
        axis = next((a for a, s in enumerate(strides) if shape[a] > 1 and s and step >= s and step % s == 0), -1)
        if n == 1:
            along.append((0, 0))
        elif axis < 0:
            raise ValueError(f"strides {copy.strides} do not run along a derived tensor of {shape}")
        else:
            along.append((axis, step // strides[axis]))
            extent[axis] += (n - 1) * (step // strides[axis])
    if rest or any(a + n > m for a, n, m in zip(start, extent, shape, strict=True)):
        raise ValueError(f"a box at {copy.offset} with strides {copy.strides} leaves a derived tensor of {shape}")
    straight = [(axis, 1) for axis in range(len(shape))]
    same = len(along) == len(shape) and all(
        found == wanted or copy.region.shape[axis] == 1
        for axis, (found, wanted) in enumerate(zip(along, straight, strict=True))
    )
    box = Region(tuple(start), tuple(extent))
    return box, None if same and prod(box.shape) == copy.region.volume and box.shape == copy.region.shape else along
