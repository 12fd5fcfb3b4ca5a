"""What is stored where: the vocabulary that every container and every plan shares.

Logical tensors carry HuggingFace names. A *piece* says where one box of a logical tensor lies on disk, in any
container; reading and writing a checkpoint are both lists of pieces, so a conversion is their intersection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dconv.sharding.dtypes import ITEMSIZE
from dconv.sharding.region import Index, Region

if TYPE_CHECKING:
    from dconv.sharding.derived import Derived
    from dconv.sharding.reader import BoxReader


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor by name, shape (elements) and dtype (`dconv.sharding.dtypes`).

    Attributes:
        published: the shape that files give, where ``shape`` splits one of its axes: rows that alternate between gate
            and up are an axis of length 2 here.
    """

    name: str
    shape: Index
    dtype: str
    published: Index | None = None

    @property
    def file_shape(self) -> Index:
        """The shape that files give."""
        return self.shape if self.published is None else self.published

    @property
    def nbytes(self) -> int:
        """Bytes of its elements, without gaps."""
        return Region.whole(self.shape).volume * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class Extent:
    """A box of a stored tensor as bytes in a file.

    Attributes:
        region: the box, in the stored tensor's coordinates.
        file: path relative to the checkpoint's root.
        offset: byte offset of the box's first element.
        strides: bytes from one index to the next, per axis (0 for broadcast axes is not allowed).
    """

    region: Region
    file: str
    offset: int
    strides: Index


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as a container holds it: its spec and the extents that hold its elements."""

    spec: TensorSpec
    extents: tuple[Extent, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a logical tensor as bytes in a file: `Extent` after renaming, unfusing and translating.

    Attributes:
        tensor: the logical tensor's name.
        region: the box, in the logical tensor's coordinates.
        strides: bytes from one index to the next, per *logical* axis.
        factor: what a stored value is to be multiplied by; 1 leaves it as it is.
    """

    tensor: str
    region: Region
    file: str
    offset: int
    strides: Index
    dtype: str
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Slot:
    """A box of a logical tensor and its place in a tensor to be written.

    Attributes:
        tensor: the logical tensor's name.
        region: the box, in the logical tensor's coordinates.
        start: where the box begins, in the stored tensor's coordinates.
        axes: for each stored axis the logical axis it runs along, or -1 for an axis that only stacks (extent 1).
    """

    tensor: str
    region: Region
    start: Index
    axes: Index

    @staticmethod
    def whole(tensor: str, shape: Index) -> Slot:
        """All of a logical tensor, in a stored one of its own shape."""
        return Slot(tensor, Region.whole(shape), (0,) * len(shape), tuple(range(len(shape))))

    @property
    def stored(self) -> Region:
        """The box in the stored tensor's coordinates."""
        return Region(self.start, tuple(1 if a < 0 else self.region.shape[a] for a in self.axes))


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What must not change under a running plan. ``allocated`` is bytes on disk, less than size for sparse files."""

    size: int
    mtime_ns: int
    inode: int
    allocated: int


@dataclass(frozen=True, slots=True)
class Logical:
    """A checkpoint after describing: logical tensors and where each lies.

    Attributes:
        root: directory that piece files are relative to.
        specs: logical tensors by name, in the model's own order.
        pieces: for each name, disjoint boxes that cover it.
        replicas: for some names, boxes of ``pieces`` once more, from other shards; to be equal, byte by byte.
        files: every file that pieces name.
        left_out: stored tensors that no logical tensor has, with the reason.
        reader: opens what fills boxes, given its scratch buffer's size, where ``files`` are none that can be opened.
        made: what their bytes are, where they are in no file: a part of the plan's identity.
        derived: what pieces name as a file and is computed from others.
        stored: the tensors as the files have them, under their own names; no conversion asks for it.
        held: what pieces name as a file and the run itself makes on its way.
    """

    root: Path
    specs: dict[str, TensorSpec]
    pieces: dict[str, tuple[Piece, ...]]
    files: dict[str, FileStamp]
    left_out: dict[str, str] = field(default_factory=dict[str, str])
    replicas: dict[str, tuple[Piece, ...]] = field(default_factory=dict[str, tuple[Piece, ...]])
    reader: Callable[[int], BoxReader] | None = None
    made: str = ""
    derived: Mapping[str, Derived] = field(default_factory=dict[str, "Derived"])
    stored: Callable[[], Iterable[Stored]] = tuple
    held: frozenset[str] = frozenset()
