"""Megatron's shards as they lie in the memory of a running job, described as if each were a file.

The virtual file of a shard has its tensors one behind the other, each with the strides that it has in memory. So the
table, the plan and the executor treat it as any other source; only `MemoryReader` knows that no file is there. What
ranks tell each other is names, shapes, dtypes and places: never a weight.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import xxhash

from dconv.checkpoint import megatron, names
from dconv.checkpoint.sharded import Box, boxes, is_sharded
from dconv.checkpoint.shards import Holder, Shard, Shards, locate, staged
from dconv.checkpoint.source import Located, Source
from dconv.checkpoint.stacked import apart
from dconv.errors import Damaged, Refused, group_names
from dconv.sharding.coords import Coord, Parallel
from dconv.sharding.dtypes import FROM_TORCH, ITEMSIZE, carrier
from dconv.sharding.ops import MOVE
from dconv.sharding.parsed import is_mapping
from dconv.sharding.plan import Copy
from dconv.sharding.region import Index, Region
from dconv.sharding.tensor import Extent, FileStamp, Piece, Stored, TensorSpec

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from dconv.arch.family import Family
    from dconv.arch.layouts import Facts

FORMAT: Final = "megatron in memory"
#: Stands for a directory, the same on every rank.
_ROOT: Final = Path("/memory")
_HASHED: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor of a shard: its shape, dtype, and place in the virtual file, strides in bytes.

    Attributes:
        box: what of which global tensor it is, where the rank's state dict is a sharded one.
    """

    shape: Index
    dtype: str
    offset: int
    strides: Index
    box: Box | None = None


#: Each virtual chunk's tensors, by Megatron's local names; of a sharded state dict all in one.
Chunks = tuple[dict[str, Held], ...]


def shard_name(coord: Coord) -> str:
    """The virtual file of a shard; data-parallel ranks hold the same one."""
    return f"tp{coord.tp}-pp{coord.pp}-ep{coord.ep}-etp{coord.etp}"


class Memory:
    """This rank's tensors.

    Args:
        states: a state dict for each virtual chunk, by Megatron's local names, or sharded ones. The tensors are looked
            at, not copied.

    Raises:
        Refused: something in them that is no plain tensor in memory.
    """

    def __init__(self, states: Sequence[Mapping[str, Any]]) -> None:
        self.tensors: list[torch.Tensor] = []
        self.starts: list[int] = []
        self.size = 0
        self.sharded = is_sharded(states)
        chunks, self._boxes = states, dict[str, Box]()
        if self.sharded:
            tensors, self._boxes = boxes(states)
            chunks = [tensors]
        self.chunks: Chunks = tuple(self._described(chunk) for chunk in chunks)

    def _described(self, chunk: Mapping[str, Any]) -> dict[str, Held]:
        held: dict[str, Held] = {}
        for name, value in chunk.items():
            if names.is_state(name) or value is None or isinstance(value, str | int | float):
                continue
            dtype = _dtype(name, value)
            itemsize = ITEMSIZE[dtype]
            shape = tuple(value.shape)
            strides = tuple(stride * itemsize for stride in value.stride())
            held[name] = Held(shape, dtype, self.size, strides, self._boxes.get(name))
            self.tensors.append(value.detach())
            self.starts.append(self.size)
            if value.numel():
                self.size += sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + itemsize
        return held

    @property
    def digest(self) -> str:
        """Stands for the description: ranks with equal ones hold tensors of the same names, shapes and places."""
        said = [[(name, held) for name, held in chunk.items()] for chunk in self.chunks]
        return xxhash.xxh3_128_hexdigest(repr(said).encode("utf-8", "surrogatepass"))

    def hashes(self) -> list[int]:
        """A hash of each tensor's bytes, in the order of ``chunks``."""
        pieces = [
            Piece(name, Region.whole(held.shape), "", held.offset, held.strides, held.dtype)
            for chunk in self.chunks
            for name, held in chunk.items()
        ]
        return [self.hash(piece) for piece in pieces]

    def hash(self, piece: Piece) -> int:
        """A hash of the bytes of a box, in row-major order."""
        copy = Copy(piece.region, piece.file, piece.offset, piece.strides, piece.dtype, MOVE)
        reader = MemoryReader(piece.file, self)
        hasher = xxhash.xxh3_64()
        for tile in copy.region.bands(_HASHED // ITEMSIZE[copy.dtype]):
            part = copy.clip(tile)
            if part is not None:
                out = np.empty(tile.shape, carrier(copy.dtype))
                reader.read_box(part, out)
                hasher.update(out.reshape(-1).view(np.uint8).data)
        return hasher.intdigest()


def _dtype(name: str, value: object) -> str:
    """The dtype of a tensor, by dconv's short name.

    Raises:
        Refused: no tensor, or one whose bytes are elsewhere or in another form than its shape says.
    """
    import torch

    kind = type(value).__name__
    if isinstance(value, torch.Tensor) and type(value) in (torch.Tensor, torch.nn.Parameter):
        dtype = FROM_TORCH.get(str(value.dtype).removeprefix("torch."))
        if dtype is not None and value.layout == torch.strided and not value.is_meta:
            return dtype
        kind = f"{value.dtype}, {value.layout}, on {value.device}"
    raise Refused(
        "a value in the model that is no plain tensor, nothing was written",
        where=name,
        expected="torch.Tensor with strides, on a CPU or a GPU",
        found=kind if isinstance(value, torch.Tensor) else short(value),
        do="hand over the module, its state_dict() or its sharded_state_dict()",
    )


class MemoryReader:
    """Reads boxes of this rank's tensors (`dconv.sharding.reader.BoxReader`): copies of the size asked for, no other.

    Args:
        file: the virtual file that ``memory`` is.
    """

    def __init__(self, file: str, memory: Memory) -> None:
        self._file = file
        self._memory = memory

    def close(self) -> None:
        """Nothing is open; the tensors stay the job's."""

    def has(self, file: str) -> bool:
        """Whether the file stands for this rank's memory: other ranks' cannot be read."""
        return file == self._file

    def is_sparse(self, file: str) -> bool:  # noqa: ARG002
        """Never."""
        return False

    def is_hole(self, copy: Copy) -> bool:  # noqa: ARG002
        """Never."""
        return False

    def read_box(self, copy: Copy, out: NDArray[np.generic]) -> None:
        """Fill ``out`` (shape of the copy's region, any strides) with the box, bit by bit."""
        import torch

        itemsize = ITEMSIZE[copy.dtype]
        number = bisect_right(self._memory.starts, copy.offset) - 1
        tensor = self._memory.tensors[number]
        bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[itemsize]
        at = tensor.storage_offset() + (copy.offset - self._memory.starts[number]) // itemsize
        framework: Any = torch  # whose from_numpy says nothing of what it takes
        box = tensor.as_strided(copy.region.shape, [stride // itemsize for stride in copy.strides], at)
        framework.from_numpy(out.view(f"<i{itemsize}")).copy_(box.view(bits))


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a rank says of the shard that it holds.

    Attributes:
        file: the virtual file's name.
        place: the rank's coordinates and the job's sizes; None of a sharded state dict, which says where all belongs.
        size: bytes of the virtual file.
        time: when it was said (nanoseconds since the epoch): no two handoffs have one plan.
    """

    file: str
    place: tuple[Coord, Parallel] | None
    size: int
    time: int
    chunks: Chunks


def plain_args(args: object) -> dict[str, object] | None:
    """Megatron's args, a Namespace or a mapping, as a checkpoint would give them back."""
    return megatron.plain_args(args if is_mapping(args) or args is None else vars(args))


def open_source(manifests: Sequence[Manifest], args: dict[str, object] | None) -> Source:
    """Describe the shards of a running job; one manifest a shard.

    Raises:
        Damaged: ranks that are not of one model, or not all of its ranks.
    """
    placed = [(manifest, *manifest.place) for manifest in manifests if manifest.place is not None]
    if placed and len(placed) < len(manifests):
        raise Damaged("some ranks hand over sharded state dicts, others local ones, nothing was written")
    if not placed:
        wholes = _wholes(manifests)
        return _source(
            manifests,
            args,
            parallel=None,
            locate=lambda family, facts: locate(apart(wholes, family, facts), family, facts),
            stored_bytes=sum(held.spec.nbytes for held in wholes),
            shapes={held.spec.name: held.spec.shape for held in wholes},
        )
    parallel, shards = _by_place(placed)
    return _source(
        manifests,
        args,
        parallel=parallel,
        locate=lambda family, facts: locate(shards, family, facts),
        stored_bytes=sum(s.stored.spec.nbytes for held in shards.values() for s in held),
        shapes={name: held[0].stored.spec.shape for name, held in shards.items()},
    )


def _source(
    manifests: Sequence[Manifest],
    args: dict[str, object] | None,
    *,
    locate: Callable[[Family, Facts], Located],
    **found: Any,
) -> Source:
    files = {m.file: FileStamp(m.size, m.time, 0, m.size) for m in manifests}
    return Source(
        format=FORMAT, root=_ROOT, config=None, args=args, side={}, files=files, locate=locate, in_memory=True, **found
    )


def _by_place(placed: Sequence[tuple[Manifest, Coord, Parallel]]) -> tuple[Parallel, Shards]:
    """The job's layout, and what its ranks hold under canonical names.

    Raises:
        Damaged: ranks that are not of one model, or not all of its ranks.
    """
    sizes = {parallel for _, _, parallel in placed}
    if len(sizes) != 1:
        raise Damaged("ranks disagree on the parallel sizes", found="\n".join(sorted(s.described for s in sizes)))
    parallel = sizes.pop()
    absent = set(parallel.coords()) - {coord for _, coord, _ in placed}
    if absent:
        raise Damaged(
            f"{len(absent)} of {parallel.world} shards are with no rank, nothing was written",
            where=group_names(sorted(map(shard_name, absent))),
            expected=parallel.described,
            do="every rank of the job calls handoff",
        )
    chunks = {(coord.tp, coord.pp, coord.ep): manifest.chunks for manifest, coord, _ in placed}
    parallel = staged(parallel, chunks)
    layers = parallel.chunks(sum(map(sum, parallel.stages or ())))
    shards: Shards = {}
    for manifest, coord, _ in placed:
        holder = Holder(coord.tp, parallel.tp, coord.ep, parallel.ep, coord.etp)
        for vp, chunk in enumerate(manifest.chunks):
            for name, held in chunk.items():
                extent = Extent(Region.whole(held.shape), manifest.file, held.offset, held.strides)
                stored = Stored(TensorSpec(name, held.shape, held.dtype), (extent,))
                key = names.renumber(name, layers[coord.pp][vp])
                shards.setdefault(key, []).append(Shard(stored, holder))
    return parallel, shards


def _wholes(manifests: Sequence[Manifest]) -> list[Stored]:
    """The global tensors of sharded state dicts, each with the boxes that ranks hold.

    Raises:
        Damaged: ranks disagree on a tensor's shape or dtype.
    """
    specs: dict[str, TensorSpec] = {}
    extents: dict[str, list[Extent]] = {}
    for manifest in manifests:
        for chunk in manifest.chunks:
            for held in chunk.values():
                if held.box is None:
                    continue
                key, lead = held.box.key, len(held.box.start) - len(held.shape)
                spec = TensorSpec(key, held.box.shape, held.dtype)
                if specs.setdefault(key, spec) != spec:
                    raise Damaged(
                        "ranks disagree on the shape or the dtype of a tensor, nothing was written",
                        where=f"{key} in {manifest.file}",
                        expected=f"{specs[key].dtype} {specs[key].shape}",
                        found=f"{spec.dtype} {spec.shape}",
                    )
                region = Region(held.box.start, (1,) * lead + held.shape)
                extent = Extent(region, manifest.file, held.offset, (0,) * lead + held.strides)
                extents.setdefault(key, []).append(extent)
    return [Stored(specs[key], tuple(held)) for key, held in extents.items()]
