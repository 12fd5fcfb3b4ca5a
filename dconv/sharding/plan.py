"""From *what is where* and *what shall be where* to a list of copies, proved to cover before a byte is written.

A plan is a pure function of the described source and the described target. Every rank derives the same one.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import Final

import xxhash

from dconv.errors import Damaged, Refused, counted, group_names
from dconv.sharding.dtypes import ITEMSIZE
from dconv.sharding.ops import Derive, Op, op_between
from dconv.sharding.region import Index, Region, first_overlap
from dconv.sharding.tensor import Logical, Piece, Slot, TensorSpec

#: Bytes of a tensor that one task writes and one digest covers. Part of the digest's definition: changing it changes
#: every receipt. Small enough to balance few tensors over ranks, large enough that 10^5 tasks cover a terabyte.
LEAF_BYTES: Final = 32 << 20


@dataclass(frozen=True, slots=True)
class TargetTensor:
    """A tensor to be written at a known place.

    Attributes:
        key: its name in the receipt, unique in the output.
        spec: name in its file, stored shape and dtype.
        slots: where its elements come from; elements in no slot are zero and must number ``padding``.
        padding: elements of padding (vocabulary rows past the true vocabulary).
    """

    key: str
    file: str
    offset: int
    spec: TensorSpec
    slots: tuple[Slot, ...]
    padding: int = 0


@dataclass(frozen=True, slots=True)
class TargetFile:
    """A file of the output, sized beforehand.

    Attributes:
        literals: (byte offset, bytes) that frame the tensors: headers, zip records.
        owner: the parallel rank whose shard it holds, -1 when the target has no shards.
    """

    path: str
    size: int
    literals: tuple[tuple[int, bytes], ...]
    owner: int = -1


@dataclass(frozen=True, slots=True)
class Target:
    """A checkpoint to be written.

    Attributes:
        world: number of parallel ranks that own shards (1 when the target has none).
        closing: makes the small files that are written at commit, as (path, bytes).
        seal: stands for what ``closing`` makes: another config or tokenizer, another seal.
        left_out: source tensors left out on purpose, with the reason.
    """

    files: tuple[TargetFile, ...]
    tensors: tuple[TargetTensor, ...]
    closing: Callable[[], Iterable[tuple[str, bytes]]]
    seal: str
    world: int = 1
    left_out: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Copy:
    """A box of a target tensor and the bytes that fill it.

    Attributes:
        region: the box, in the target tensor's coordinates.
        file, offset: where its first element lies in the source.
        strides: source bytes from one index to the next, per target axis.
        dtype: of the source.
        op: from source value to target value.
        twins: the same box where other shards of the source have it: read and compared, never written.
    """

    region: Region
    file: str
    offset: int
    strides: Index
    dtype: str
    op: Op
    twins: tuple[Copy, ...] = ()

    @property
    def nbytes(self) -> int:
        """Source bytes to read."""
        bits = self.op.how.bits if isinstance(self.op, Derive) else 8 * ITEMSIZE[self.dtype]
        return ceil(self.region.volume * bits / 8) * (1 + len(self.twins))

    def clip(self, region: Region) -> Copy | None:
        """The part of this copy inside ``region``."""
        box = self.region.intersect(region)
        if box is None:
            return None
        if box == self.region:
            return self
        shift = sum((b - a) * s for a, b, s in zip(self.region.start, box.start, self.strides, strict=True))
        twins = tuple(c for twin in self.twins if (c := twin.clip(region)) is not None)
        return Copy(box, self.file, self.offset + shift, self.strides, self.dtype, self.op, twins)


@dataclass(frozen=True, slots=True)
class Task:
    """One unbroken stretch of one file: a leaf of a tensor, or (``tensor`` = -1) the literals of a file.

    Attributes:
        index: position in the plan.
        tensor: index into the target's tensors.
        region: the leaf, in the target tensor's coordinates.
        offset, nbytes: the stretch in the file.
    """

    index: int
    file: int
    tensor: int
    region: Region
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """Everything a run does. ``copies[i]`` fills ``target.tensors[i]``."""

    source: Logical
    target: Target
    copies: tuple[tuple[Copy, ...], ...]

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """All tasks, ordered by file and offset."""
        file_index = {file.path: i for i, file in enumerate(self.target.files)}
        by_file: list[list[int]] = [[] for _ in self.target.files]
        for i, tensor in enumerate(self.target.tensors):
            by_file[file_index[tensor.file]].append(i)
        tasks: list[Task] = []
        nothing = Region((0,), (0,))
        for f, file in enumerate(self.target.files):
            literal_bytes = sum(len(data) for _, data in file.literals)
            tasks.append(Task(len(tasks), f, -1, nothing, 0, literal_bytes))
            for i in sorted(by_file[f], key=lambda i: self.target.tensors[i].offset):
                tensor = self.target.tensors[i]
                itemsize = ITEMSIZE[tensor.spec.dtype]
                offset = tensor.offset
                for band in Region.whole(tensor.spec.shape).bands(LEAF_BYTES // itemsize):
                    nbytes = band.volume * itemsize
                    tasks.append(Task(len(tasks), f, i, band, offset, nbytes))
                    offset += nbytes
        return tuple(tasks)

    @cached_property
    def id(self) -> str:
        """Hash of the whole plan, of where the source is and its files' sizes and times: same id, same output bytes.

        The place counts since archives and object stores give every file one time.
        """
        place = os.fsencode(os.path.realpath(self.source.root)) + self.source.made.encode()
        digest = xxhash.xxh3_128(b"dconv plan 2\n" + place + f"\n{self.target.seal}\n".encode())
        for path, stamp in sorted(self.source.files.items()):
            digest.update(f"{path} {stamp.size} {stamp.mtime_ns}\n".encode())
        for file in self.target.files:
            digest.update(f"{file.path} {file.size} {file.owner}\n".encode())
            for offset, data in file.literals:
                digest.update(offset.to_bytes(8, "little") + xxhash.xxh3_128(data).digest())
        for tensor, copies in zip(self.target.tensors, self.copies, strict=True):
            digest.update(f"{tensor.key} {tensor.file} {tensor.offset} {tensor.spec}\n".encode())
            for c in copies:
                place = (c.region.start, c.region.shape, c.file, c.offset, c.strides, c.dtype, c.op)
                digest.update(repr((*place, c.twins) if c.twins else place).encode())
        for name, derived in sorted(self.source.derived.items()):
            digest.update(f"{name} {derived}\n".encode())
        return digest.hexdigest()[:12]

    @cached_property
    def bytes_written(self) -> int:
        """Bytes of all tasks: what the output has, closing files aside."""
        return sum(task.nbytes for task in self.tasks)

    @cached_property
    def bytes_read(self) -> int:
        """Source bytes that the copies need, those that are only compared included."""
        return sum(c.nbytes for copies in self.copies for c in copies)

    def share(self, rank: int, world: int) -> tuple[Task, ...]:
        """The tasks of one rank.

        When ``world`` is the number of the target's own ranks, a rank writes its own shard. In any other world the
        tasks, in file order, are cut into ``world`` stretches of equal bytes, so that nearly every file has one writer.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is outside world {world}")
        files = self.target.files
        if world == self.target.world and all(file.owner >= 0 for file in files):
            return tuple(task for task in self.tasks if files[task.file].owner == rank)
        edges = self._edges
        total = edges[-1] if edges else 0
        low, high = rank * total / world, (rank + 1) * total / world
        first = bisect_right(edges, low)
        last = len(edges) if rank == world - 1 else bisect_right(edges, high)
        return self.tasks[first:last]

    def shares(self, world: int) -> list[tuple[Task, ...]]:
        """The tasks of each rank; see `share`."""
        files = self.target.files
        if world != self.target.world or any(file.owner < 0 for file in files):
            return [self.share(rank, world) for rank in range(world)]
        found: list[list[Task]] = [[] for _ in range(world)]
        for task in self.tasks:
            found[files[task.file].owner].append(task)
        return list(map(tuple, found))

    @cached_property
    def _edges(self) -> list[float]:
        # A task belongs to the stretch that its middle lies in; one byte more gives empty tasks a place, too.
        edges: list[float] = []
        at = 0.0
        for task in self.tasks:
            edges.append(at + (task.nbytes + 1) / 2)
            at += task.nbytes + 1
        return edges


def build_plan(source: Logical, target: Target) -> Plan:
    """Match every slot of the target with pieces of the source, and prove the cover.

    Raises:
        Refused: a slot asks for what the source lacks, or source tensors are neither written nor named as left out.
    """
    missing: list[str] = []
    used: set[str] = set()
    copies: list[tuple[Copy, ...]] = []
    compared: set[tuple[str, Region]] = set()
    for tensor in target.tensors:
        mine: list[Copy] = []
        for slot in tensor.slots:
            pieces = source.pieces.get(slot.tensor)
            if pieces is None:
                missing.append(slot.tensor)
                continue
            used.add(slot.tensor)
            for box, copy in _copies(tensor, slot, pieces, source):
                replicas = source.replicas.get(slot.tensor)
                if replicas and (slot.tensor, box) not in compared:  # once in the whole plan is enough
                    compared.add((slot.tensor, box))
                    copy = replace(copy, twins=tuple(c for b, c in _copies(tensor, slot, replicas, source) if b == box))
                mine.append(copy)
        mine.sort(key=lambda c: c.region.start)
        copies.append(tuple(mine))
    if missing:
        raise Refused(
            f"{len(set(missing))} tensors that the target needs are not in the source, nothing was written",
            where=group_names(dict.fromkeys(missing)),
            expected="every tensor of the architecture",
            do="dconv inspect on the source shows what is there",
        )
    left_out = target.left_out or {}
    unused = [name for name in source.specs if name not in used and name not in left_out]
    if unused:
        raise Refused(
            f"{len(unused)} of {len(source.specs)} source tensors would not be written, nothing was written",
            where=group_names(unused),
            expected="every source tensor written, or named in --drop",
        )
    named = {copy.file for mine in copies for copy in mine}
    lost = sorted(named - source.files.keys() - source.derived.keys() - source.held)
    if lost and source.files:  # a config alone has none
        raise ValueError(f"a source describes pieces in files that it does not have: {lost[:3]}")
    plan = Plan(source, target, tuple(copies))
    _prove(plan)
    return plan


def _copies(
    tensor: TargetTensor, slot: Slot, pieces: Sequence[Piece], source: Logical
) -> Iterable[tuple[Region, Copy]]:
    """The boxes of a slot that pieces hold, in the logical tensor's coordinates, each with the copy that fills it."""
    for piece in pieces:
        box = slot.region.intersect(piece.region)
        if box is None:
            continue
        offset = piece.offset + sum(
            (b - a) * s for a, b, s in zip(piece.region.start, box.start, piece.strides, strict=True)
        )
        start = tuple(
            at if axis < 0 else at + box.start[axis] - slot.region.start[axis]
            for at, axis in zip(slot.start, slot.axes, strict=True)
        )
        shape = tuple(1 if axis < 0 else box.shape[axis] for axis in slot.axes)
        strides = tuple(0 if axis < 0 else piece.strides[axis] for axis in slot.axes)
        derived = source.derived.get(piece.file)
        op = op_between(piece.dtype, tensor.spec.dtype, piece.factor, derived.how if derived else None)
        dtype = op.target if isinstance(op, Derive) else piece.dtype
        yield box, Copy(Region(start, shape), piece.file, offset, strides, dtype, op)


def _prove(plan: Plan) -> None:
    """In bounds, disjoint, equal volume: every byte of every tensor exactly once; then the same for the files."""
    whole_files: dict[str, list[tuple[int, int, str]]] = {file.path: [] for file in plan.target.files}
    for file in plan.target.files:
        for offset, data in file.literals:
            whole_files[file.path].append((offset, len(data), "header"))
    for tensor, copies in zip(plan.target.tensors, plan.copies, strict=True):
        whole = Region.whole(tensor.spec.shape)
        regions = [copy.region for copy in copies]
        filled = sum(region.volume for region in regions) + tensor.padding
        inside = all(whole.contains(region) for region in regions)
        if not inside or filled != whole.volume or first_overlap(regions) is not None:
            raise Refused(
                "the plan does not cover a tensor exactly once, nothing was written",
                where=f"{tensor.key} in {tensor.file}",
                expected=f"{whole.volume} elements, each once",
                found=f"{filled} elements in {len(regions)} boxes" + ("" if inside else ", some out of bounds"),
                do="the source's shapes disagree with its config: dconv inspect shows both",
            )
        whole_files[tensor.file].append((tensor.offset, tensor.spec.nbytes, tensor.key))
    for file in plan.target.files:
        at, last = 0, "start of file"
        for offset, nbytes, name in sorted(whole_files[file.path]):
            if offset < at:
                raise Refused(f"{name} and {last} overlap in the plan of {file.path}, nothing was written")
            at, last = offset + nbytes, name
        if at > file.size:
            raise Refused(f"{last} reaches past the end of {file.path} in the plan, nothing was written")


def check_pieces(
    specs: dict[str, TensorSpec], pieces: dict[str, list[Piece]]
) -> tuple[dict[str, tuple[Piece, ...]], dict[str, tuple[Piece, ...]]]:
    """Set replicas (a box that an earlier shard has, too) apart and prove that the rest covers each tensor once.

    Returns:
        The pieces and, for tensors that have any, the replicas.

    Raises:
        Damaged: a gap, an overlap that is not a whole replica, or a box out of bounds, with the tensors named.
    """
    proved: dict[str, tuple[Piece, ...]] = {}
    replicas: dict[str, tuple[Piece, ...]] = {}
    gaps: list[str] = []
    for name, spec in specs.items():
        distinct: dict[tuple[Index, Index], Piece] = {}
        again: list[Piece] = []
        for piece in pieces.get(name, ()):
            if distinct.setdefault((piece.region.start, piece.region.shape), piece) is not piece:
                again.append(piece)
        kept = tuple(distinct.values())
        if again:
            replicas[name] = tuple(again)
        regions = [piece.region for piece in kept]
        whole = Region.whole(spec.shape)
        covered = sum(region.volume for region in regions) == whole.volume
        if not covered or not all(map(whole.contains, regions)) or first_overlap(regions) is not None:
            gaps.append(name)
        proved[name] = kept
    if gaps:
        name = gaps[0]
        have = sum(p.region.volume for p in proved[name])
        raise Damaged(
            f"{counted(len(gaps), 'tensor is', 'tensors are')} not whole in the source",
            where=group_names(gaps),
            expected=f"{name}: shape {specs[name].shape}, each element once",
            found=f"{have} elements in {len(proved[name])} pieces" if have else "nothing of it",
            do="a shard may be missing or from another checkpoint",
        )
    return proved, replicas
