"""The way of single tensors through a plan: where each lies in the source, what happens to it, where it is written.

Nothing is decided here: a plan has all of it but the names that the source's own files use, which are looked up by
file and offset.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Final

from dconv.errors import UsageError, group_names
from dconv.sharding.coords import Parallel
from dconv.sharding.derived import steps
from dconv.sharding.dtypes import ITEMSIZE
from dconv.sharding.ops import Op
from dconv.sharding.plan import Plan, TargetTensor
from dconv.sharding.precision import words
from dconv.sharding.region import Index, Region, row_major
from dconv.sharding.tensor import Extent, Logical, Piece, Slot, Stored

#: Near misses that an error names.
_CLOSE: Final = 3
#: Layer and expert numbers, alone or folded to a range.
_NUMBERS: Final = re.compile(r"\{[^}]*\}|\d+")


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


@dataclass(frozen=True)
class Trace:
    """A logical tensor's way from source to target.

    Attributes:
        name: HuggingFace's.
        shape: of the logical tensor, which all boxes are of.
        published: the shape that HuggingFace's files give, where it joins axes that ``shape`` has apart.
        dtype: of the source.
        source: what it is read from.
        replicas: what else the source has of it, only compared.
        target: what is written of it; replicated and tied tensors are there several times.
        relayout: how its index space changes, in words.
        left_out: why it is not written; such a tensor has a name alone.
    """

    name: str
    shape: Index = ()
    published: Index = ()
    dtype: str = ""
    source: tuple[Place, ...] = ()
    replicas: tuple[Place, ...] = ()
    target: tuple[Place, ...] = ()
    relayout: tuple[str, ...] = ()
    left_out: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def trace(plan: Plan, parallel: Parallel, patterns: str | Sequence[str]) -> tuple[Trace, ...]:
    """The tensors that match any pattern, in the model's order.

    Args:
        plan: of the conversion.
        parallel: the target's layout.
        patterns: as `fnmatch.fnmatchcase` takes them; of HuggingFace's name, or that of a file of either side.

    Raises:
        UsageError: a pattern matches nothing.
    """
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if not patterns:
        return ()
    ways = _Ways(plan, parallel)
    wanted = {name for pattern in patterns for name in ways.matching(pattern)}
    found = [ways.of(name) for name in plan.source.specs if name in wanted]
    out = plan.target.left_out or {}
    return (*found, *(Trace(name, left_out=reason) for name, reason in out.items() if name in wanted))


class _Ways:
    def __init__(self, plan: Plan, parallel: Parallel) -> None:
        self._plan = plan
        self._own = _OwnNames(plan.source)
        self._ranks = [f"tp{c.tp} pp{c.pp}" + f" ep{c.ep}" * (parallel.ep > 1) for c in parallel.coords()]
        self._owners = {file.path: file.owner for file in plan.target.files}
        self._targets: dict[str, dict[int, list[Slot]]] = {}
        for i, tensor in enumerate(plan.target.tensors):
            for slot in tensor.slots:
                self._targets.setdefault(slot.tensor, {}).setdefault(i, []).append(slot)

    @cached_property
    def _names(self) -> dict[str, set[str]]:
        """Every name of either side, with the logical tensors behind it."""
        names: dict[str, set[str]] = {}
        source, tensors = self._plan.source, self._plan.target.tensors
        for name in source.specs:
            pieces = (*source.pieces.get(name, ()), *source.replicas.get(name, ()))
            theirs = {own for piece in pieces for own in self._own.names(piece)}
            ours = {spelled for i in self._targets.get(name, ()) for spelled in _spellings(tensors[i])}
            for one in {name} | theirs | ours:
                names.setdefault(one, set()).add(name)
        for name in self._plan.target.left_out or {}:
            names.setdefault(name, set()).add(name)
        return names

    def matching(self, pattern: str) -> set[str]:
        """The logical tensors that a pattern means.

        Raises:
            UsageError: none.
        """
        found = [logical for name, logical in self._names.items() if fnmatchcase(name, pattern)]
        if found:
            return set[str]().union(*found)
        raise UsageError(
            "no tensor of either side has such a name",
            where=f"--trace {pattern!r:.200}",
            expected="a pattern of HuggingFace's names, or of those in a file of the source or the target",
            do=_suggestion(pattern, self._names),
        )

    def of(self, name: str) -> Trace:
        source = self._plan.source
        spec = source.specs[name]
        places = tuple(self._place(i, slots) for i, slots in self._targets.get(name, {}).items())
        pieces = source.pieces.get(name, ())
        read = self._own.places(pieces)
        return Trace(
            name,
            spec.shape,
            spec.published or (),
            pieces[0].dtype if pieces else spec.dtype,
            read,
            self._own.places(source.replicas.get(name, ())),
            places,
            self._relayout(name, read, places),
        )

    def _place(self, index: int, slots: Sequence[Slot]) -> Place:
        """What a target tensor has of a logical one."""
        tensor = self._plan.target.tensors[index]
        spec = tensor.spec
        owner = self._owners[tensor.file]
        ops = self._ops(index, slots)
        return Place(
            tensor.file,
            next((full for full in _spellings(tensor) if full.endswith(f".{spec.name}")), spec.name),
            spec.file_shape,
            spec.dtype,
            tuple(Box(s.region.start, s.region.shape, _published(s.start, spec.shape, spec.file_shape)) for s in slots),
            key=tensor.key,
            rank=self._ranks[owner] if 0 <= owner < len(self._ranks) else "",
            ops=tuple(map(words, ops)),
            exact=all(op.exact for op in ops),
            padding=tensor.padding,
        )

    def _ops(self, index: int, slots: Sequence[Slot]) -> list[Op]:
        copies = self._plan.copies[index]
        found = dict.fromkeys(copy.op for copy in copies)
        if len(found) > 1:  # q, k and v in one tensor may differ in their ops
            mine = [slot.stored for slot in slots]
            found = dict.fromkeys(c.op for c in copies if any(c.region.intersect(box) is not None for box in mine))
        return list(found)

    def _relayout(self, name: str, source: Sequence[Place], target: Sequence[Place]) -> tuple[str, ...]:
        """What happens to a tensor's index space."""
        said: list[str] = []
        for axis in range(len(self._plan.source.specs[name].shape)):
            before, after = _stretches(source, axis), _stretches(target, axis)
            if before != after:
                parts = f"joined from {before}" if after == 1 else f"cut into {after}"
                said.append(f"axis {axis} {parts}" if 1 in (before, after) else f"axis {axis} from {before} to {after}")
        targets = self._targets.get(name, {})
        runs = {_walk(slot.region.shape, slot.axes) for slots in targets.values() for slot in slots}
        for piece in self._plan.source.pieces.get(name, ()):
            theirs = _walk(piece.region.shape, sorted(range(len(piece.strides)), key=lambda i: -piece.strides[i]))
            if any([i for i in theirs if i in ours] != [i for i in ours if i in theirs] for ours in runs):
                said.append("transposed")
                break
        if any(itertools.starmap(_alternate, itertools.pairwise(self._plan.source.pieces.get(name, ())))):
            said.append("rows that alternate taken apart")
        beside = {slot.tensor for i in targets for slot in self._plan.target.tensors[i].slots} - {name}
        if beside:
            said.append("in one tensor with " + ", ".join(group_names(sorted(beside)).splitlines()))
        return tuple(said)


def _alternate(one: Piece, other: Piece) -> bool:
    """Whether the rows of two boxes lie between each other in their file.

    Those of a head that are rotated together do, where neighbours are.
    """
    if not one.strides or (one.file, one.region.start[1:]) != (other.file, other.region.start[1:]):
        return False
    return one.offset < other.offset < one.offset + (one.region.shape[0] - 1) * one.strides[0]


def _stretches(places: Iterable[Place], axis: int) -> int:
    """Into how many different stretches an axis is cut."""
    boxes = (box for place in places for box in merged(place.boxes))
    return len({(box.start[axis], box.shape[axis]) for box in boxes})


def _walk(shape: Index, axes: Sequence[int]) -> Index:
    """Of a box's axes, slowest first, those on which it has a length."""
    return tuple(axis for axis in axes if axis >= 0 and shape[axis] > 1)


def _spellings(tensor: TargetTensor) -> set[str]:
    """A target tensor's name, and those that its key has: of its layer in a stack, of its virtual chunk."""
    return {tensor.spec.name, tensor.key.partition("@")[0].rpartition(":")[2]}


def merged(boxes: Iterable[Box]) -> tuple[Region, ...]:
    """The boxes of a place, those that lie one behind the other as one."""
    regions: list[Region] = []
    for box in sorted((box.region for box in boxes), key=lambda region: region.start):
        last = regions[-1] if regions else None
        apart = [i for i, (a, b) in enumerate(zip(last.start, box.start, strict=True)) if a != b] if last else []
        if last and len(apart) == 1:
            (axis,) = apart
            others = [shape[:axis] + shape[axis + 1 :] for shape in (last.shape, box.shape)]
            if others[0] == others[1] and last.stop[axis] == box.start[axis]:
                shape = list(last.shape)
                shape[axis] += box.shape[axis]
                regions[-1] = Region(last.start, tuple(shape))
                continue
        regions.append(box)
    return tuple(regions)


def _published(start: Index, shape: Index, file_shape: Index) -> Index:
    """An index in a tensor's shape, in the shape that its file gives."""
    if shape == file_shape:
        return start
    flat = sum(i * step for i, step in zip(start, row_major(shape, 1), strict=True))
    return tuple(flat // step % n for n, step in zip(file_shape, row_major(file_shape, 1), strict=True))


class _OwnNames:
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


def _suggestion(pattern: str, names: Mapping[str, object]) -> str:
    """What to write instead: the pattern with a ``*`` around it, where that matches, or names that are close."""
    around = f"*{pattern.strip('*')}*"
    inside = [name for name in names if pattern.strip("*") and fnmatchcase(name, around)]
    if inside:
        return f"--trace '{around}'  matches {', '.join(group_names(inside, _CLOSE).splitlines())}"
    folded = {_NUMBERS.sub("*", line): line for line in group_names(names, len(names)).splitlines()}
    close = difflib.get_close_matches(_NUMBERS.sub("*", pattern), folded, _CLOSE, cutoff=0.4)
    if close:
        return "did you mean " + "\n".join(folded[one] for one in close) + "?"
    return "dconv inspect shows the source's names"
