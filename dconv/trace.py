"""The way of single tensors through a plan: where each lies in the source, what happens to it, where it is written.

Nothing is decided here: a plan has all of it but the names that the source's own files use, which `dconv.own_names`
looks up by file and offset.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Final

from dconv.errors import UsageError, group_names
from dconv.own_names import Box, OwnNames, Place
from dconv.sharding.coords import Parallel
from dconv.sharding.ops import Op
from dconv.sharding.plan import Plan, TargetTensor
from dconv.sharding.precision import words
from dconv.sharding.region import Index, Region, row_major
from dconv.sharding.tensor import Piece, Slot

#: Near misses that an error names.
_CLOSE: Final = 3
#: Layer and expert numbers, alone or folded to a range.
_NUMBERS: Final = re.compile(r"\{[^}]*\}|\d+")


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


def rank_names(parallel: Parallel) -> list[str]:
    """Each rank of a layout as a person is told of it: ``tp1 pp0``."""
    return [f"tp{c.tp} pp{c.pp}" + f" ep{c.ep}" * (parallel.ep > 1) for c in parallel.coords()]


class _Ways:
    def __init__(self, plan: Plan, parallel: Parallel) -> None:
        self._plan = plan
        self._own = OwnNames(plan.source)
        self._ranks = rank_names(parallel)
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
