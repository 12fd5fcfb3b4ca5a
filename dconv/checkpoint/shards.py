"""Laying a family's table over Megatron's shards, whichever container they came in.

A stored tensor is known by its canonical name (`dconv.checkpoint.names`) and by which part of the fused tensor it
holds: that of one rank (legacy), or the whole in global coordinates (torch_dist).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from dconv.arch.family import Entry, Family
from dconv.arch.layouts import Facts, size
from dconv.checkpoint import names
from dconv.checkpoint.source import Located, shape_error
from dconv.errors import Damaged, Refused
from dconv.sharding.coords import Parallel
from dconv.sharding.dtypes import ITEMSIZE
from dconv.sharding.layout import Fused, Stretch, pieces
from dconv.sharding.region import Region
from dconv.sharding.tensor import Extent, Piece, Stored, TensorSpec


@dataclass(frozen=True, slots=True)
class Holder:
    """The rank whose file a tensor was in: its place in tensor and expert parallelism, and their sizes.

    Attributes:
        etp: its place in expert tensor parallelism, -1 where a file's name does not say.
    """

    tp: int
    tps: int
    ep: int = 0
    eps: int = 1
    etp: int = -1


@dataclass(frozen=True, slots=True)
class Shard:
    """A stored tensor.

    Attributes:
        holder: whose shard of the fused tensor it is; None for all of it, in global coordinates.
        part: the only part of the fused tensor that it is; -1 for all parts.
    """

    stored: Stored
    holder: Holder | None = None
    part: int = -1


Shards = dict[str, list[Shard]]
#: (tensor-, pipeline-, expert-parallel rank) of a file.
Place = tuple[int, int, int]

#: All experts of a rank in one matrix: the grouped experts of Megatron-Core until 2025.
_ONE_MATRIX: Final = re.compile(r"(.+\.experts\.)weight([12])")


def locate(shards: Shards, family: Family, facts: Facts) -> Located:
    """Pieces of the logical tensors from Megatron's shards."""
    shards = _global_experts(shards, size(facts, "experts"))
    located = Located({}, {}, {})
    used: set[str] = set()
    for entry in family.entries(facts):
        name = entry.fused.name
        held = list(names.spellings(name))
        if facts["tied"] and entry.is_embedding:
            held.append(names.head_beside(name))
        for shard in (shard for spelling in held for shard in shards.get(spelling, ())):
            for piece in _pieces(entry, shard):
                located.pieces.setdefault(piece.tensor, []).append(piece)
            if (length := _length(entry, shard)) > entry.fused.length:
                rows = f"{name}, rows {entry.fused.length} to {length - 1}"
                located.left_out[rows] = "padding of the vocabulary"
        used.update(held)
    for name, held in shards.items():
        if name not in used:
            located.unknown[name] = held[0].stored.extents[0].file if held[0].stored.extents else "?"
    return located


def staged(parallel: Parallel, chunks: Mapping[Place, Sequence[Mapping[str, Any]]]) -> Parallel:
    """The pipeline layout, counted from the layers that are there: right for every way of dividing them.

    Raises:
        Damaged: ranks of one stage disagree on its chunks or layers.
    """
    vpp = {len(held) for held in chunks.values()}
    if len(vpp) != 1:
        raise Damaged("ranks disagree on the number of virtual pipeline chunks", found=str(sorted(vpp)))
    stages: list[tuple[int, ...]] = []
    for stage in range(parallel.pp):
        counts = {
            tuple(names.local_layers(chunk) for chunk in held) for (_, p, _), held in chunks.items() if p == stage
        }
        if len(counts) != 1:
            raise Damaged(
                "tensor-parallel ranks of one stage hold different layers",
                where=f"pipeline stage {stage}",
                found=str(sorted(counts)),
            )
        stages.append(counts.pop())
    return replace(parallel, vpp=vpp.pop(), stages=tuple(stages))


def _global_experts(shards: Shards, experts: int) -> Shards:
    """Experts under canonical names, whatever module held them."""
    found: Shards = {}
    for name, held in shards.items():
        for shard in held:
            for canonical, one in _experts_of(name, shard, experts):
                found.setdefault(canonical, []).append(one)
    return found


def _experts_of(name: str, shard: Shard, experts: int) -> Iterator[tuple[str, Shard]]:
    if shard.holder is None:
        yield name, shard
    elif parsed := names.parse_expert(name):
        prefix, local, rest = parsed
        first, count = _held(name, shard.holder, experts)
        if local >= count:
            raise Damaged("an expert's number is outside its rank", where=name, expected=f"below {count}")
        yield names.expert(prefix, first + local, rest), shard
    elif matrix := _ONE_MATRIX.fullmatch(name):
        first, count = _held(name, shard.holder, experts)
        for local, stored in enumerate(_unstack(shard.stored, count, columns=matrix[2] == "1")):
            canonical = names.expert(matrix[1], first + local, f"linear_fc{matrix[2]}.weight")
            yield canonical, replace(shard, stored=stored)
    else:
        yield name, shard


def _held(name: str, holder: Holder, experts: int) -> tuple[int, int]:
    """The first expert of a rank, and how many it has."""
    if experts % holder.eps:
        raise Damaged(
            "the experts do not divide over the expert-parallel ranks that are there",
            where=name,
            expected=f"{experts} experts, as the config says",
            found=f"expert parallel {holder.eps}",
        )
    count = experts // holder.eps
    return holder.ep * count, count


def _unstack(stored: Stored, experts: int, *, columns: bool) -> Iterator[Stored]:
    """One matrix [out, in] an expert from [in, experts x out] (``weight1``) or [experts x in, out] (``weight2``).

    Both are views of a row-major [experts, in, out]: see ``GroupedMLP.forward`` (``weight1.view(experts, …)``).

    Raises:
        Damaged: a matrix of no such shape.
    """
    shape, extent = stored.spec.shape, stored.extents[0]
    itemsize = ITEMSIZE[stored.spec.dtype]
    rows, width = shape if len(shape) == 2 else (0, 0)
    stacked = width if columns else rows
    if not stacked or not experts or stacked % experts or extent.strides != (width * itemsize, itemsize):
        raise Damaged(
            "the experts of a rank do not divide the matrix that holds them all",
            where=f"{stored.spec.name} in {extent.file}",
            expected=f"{experts} experts {'side by side' if columns else 'one below the other'}, row-major",
            found=f"{shape}, strides {extent.strides} in bytes",
        )
    into, out = (rows, width // experts) if columns else (rows // experts, width)
    for number in range(experts):
        start = extent.offset + number * into * out * itemsize
        one = Extent(Region.whole((out, into)), extent.file, start, (itemsize, out * itemsize))
        yield Stored(TensorSpec(stored.spec.name, (out, into), stored.spec.dtype), (one,))


def _pieces(entry: Entry, shard: Shard) -> Iterable[Piece]:
    fused, stored = entry.fused, shard.stored
    shape = stored.spec.shape
    index, count = _cut(entry, shard)
    length = _length(entry, shard)
    per_rank = fused.length // count if shard.part < 0 else fused.parts[shard.part].length
    if length < fused.length or (length > fused.length and not fused.padded):
        raise shape_error(fused.name, _where(stored), fused.shape(per_rank), shape)
    stretches = _stretches(fused, shard, index, count, length)
    expected = fused.shape(sum(s.stop - s.start for s in stretches))
    if expected != shape:
        raise shape_error(fused.name, _where(stored), expected, shape)
    return pieces(fused.slots(stretches), stored.extents, stored.spec.dtype)


def _stretches(fused: Fused, shard: Shard, index: int, count: int, length: int) -> tuple[Stretch, ...]:
    stretches = fused.shard(index, count, length)
    return stretches if shard.part < 0 else (stretches[shard.part],)


def _length(entry: Entry, shard: Shard) -> int:
    """Indices of the fused tensor along its axis, padding included, as a shard says; -1 for one of other axes."""
    shape = shard.stored.spec.shape
    if len(shape) != len(entry.fused.order):
        return -1
    if not shape:
        return entry.fused.length
    if shard.part >= 0:
        return entry.fused.length + shape[entry.fused.axis] - entry.fused.parts[shard.part].length
    return shape[entry.fused.axis] * _cut(entry, shard)[1]


def _cut(entry: Entry, shard: Shard) -> tuple[int, int]:
    """Which stretch of how many a shard is."""
    fused, holder, shape = entry.fused, shard.holder, shard.stored.spec.shape
    if holder is None or not fused.parallel or len(shape) != len(fused.order):
        return 0, 1
    if fused.either and shape[fused.axis] == fused.length:
        return 0, 1
    if entry.expert < 0:
        return holder.tp, holder.tps
    here = shape[fused.axis]
    count = fused.length // here if here and fused.length % here == 0 else 1
    return holder.etp if holder.etp >= 0 else _expert_tensor_rank(entry, holder, count, shard), count


def _expert_tensor_rank(entry: Entry, holder: Holder, etp: int, shard: Shard) -> int:
    """The expert-tensor-parallel rank of a file: its name does not say, Megatron's rank order does.

    Source: ``get_checkpoint_name`` in ``megatron/training/checkpointing.py``, rank order as in `dconv.sharding.coords`.
    """
    inner = max(holder.tps, holder.eps * etp)
    found = {i % etp for i in range(inner) if i % holder.tps == holder.tp and i // etp % holder.eps == holder.ep}
    if len(found) == 1:
        return found.pop()
    raise Refused(
        "the file's name does not say which part of its experts it holds, nothing was written",
        where=f"{entry.fused.name} in {_where(shard.stored)}",
        expected="one expert-tensor-parallel rank for each tensor- and expert-parallel rank",
        found=f"tensor parallel {holder.tps}, expert parallel {holder.eps}, expert tensor parallel {etp}",
        do="save the checkpoint as torch_dist: Megatron's legacy files of such ranks overwrite each other",
    )


def _where(stored: Stored) -> str:
    return stored.extents[0].file if stored.extents else "the checkpoint"
