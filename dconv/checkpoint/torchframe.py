"""The container of ``torch.save``, written around bytes that are to come. `dconv.checkpoint.torchzip` reads it.

Sources: PKWARE's APPNOTE.TXT 6.3 (zip, zip64); caffe2/serialize/inline_container.cc (alignment, padding field).
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from dconv.checkpoint.allowed import STORAGE_DTYPES
from dconv.checkpoint.pickled import DTypeRef
from dconv.checkpoint.pickling import Global, Persistent, Reduce, dtype, dumps
from dconv.checkpoint.torchzip import CENTRAL, END, END64, LOCAL, LOCATOR, U16_MAX, U32_MAX, reach
from dconv.sharding.dtypes import ITEMSIZE

#: Typed storages by dconv's dtype; the others lie in untyped ones and are named by ``_rebuild_tensor_v3``.
_STORAGE: Final = {short: Global("torch", name) for name, short in STORAGE_DTYPES.items() if name != "UntypedStorage"}
_UNTYPED: Final = Global("torch.storage", "UntypedStorage")
_NO_HOOKS: Final = Reduce(Global("collections", "OrderedDict"), ())
_KEY: Final = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)
#: The archive's folder: torch takes any one, and calls its own so.
_ROOT: Final = "archive"
#: torch aligns storages to 64 bytes so that a mapped tensor is aligned for vector loads.
_ALIGN: Final = 64


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in a tree to be written; see `tensor`."""

    dtype: str
    shape: tuple[int, ...]
    key: str
    offset: int
    stride: tuple[int, ...]


def tensor(dtype: str, shape: Sequence[int], key: str, offset: int = 0, stride: Sequence[int] | None = None) -> Tensor:
    """The node of a tensor that lies in storage ``key``.

    Args:
        dtype: dconv's short name.
        shape: elements along each axis.
        key: of the storage, as `frame` is given it.
        offset: elements before the first one.
        stride: elements from one to the next along each axis; row-major without gaps by default.
    """
    shape = tuple(shape)
    if stride is None:
        made: list[int] = []
        step = 1
        for n in reversed(shape):
            made.append(step)
            step *= max(n, 1)
        stride = made[::-1]
    return Tensor(dtype, shape, key, offset, tuple(stride))


@dataclass(frozen=True, slots=True)
class Frame:
    """Everything of a container but its storages' bytes.

    Attributes:
        size: bytes of the whole container.
        literals: (absolute file offset, bytes) to write as they are; with no storages exactly one.
        data: storage key -> absolute file offset of its first byte, a multiple of 64.
    """

    size: int
    literals: tuple[tuple[int, bytes], ...]
    data: dict[str, int]


def frame(tree: object, storages: Sequence[tuple[str, int]], *, base: int = 0) -> Frame:
    """A container for ``tree``, to lie at byte ``base`` of a file.

    Its storages' checksums are 0: torch never looks at them, and the bytes are not known yet.

    Args:
        tree: what `dconv.checkpoint.pickling.dumps` takes, and nodes of `tensor`, and `DTypeRef`.
        storages: (key, bytes) of each storage, in file order.
        base: where the container begins in its file, in bytes.

    Raises:
        ValueError: a key twice or of odd form, a tensor that is not inside its storage.
    """
    sizes = dict(storages)
    if len(sizes) != len(storages) or not all(map(_KEY.fullmatch, sizes)):
        raise ValueError("storage keys must be plain and unique")
    writer = ZipWriter(base, _ROOT)
    writer.add("data.pkl", dumps(tree, lambda node: lower(node, sizes)))
    writer.add("version", b"3\n")
    writer.add("byteorder", b"little")
    data = {key: writer.reserve(f"data/{key}", nbytes) for key, nbytes in storages}
    return Frame(writer.finish(), tuple(writer.literals), data)


def lower(node: object, sizes: Mapping[str, int], device: str = "cpu") -> object:
    """The pickle form of a node of `tensor` or a `DTypeRef`, for `dconv.checkpoint.pickling.dumps`.

    Args:
        node: what `dumps` has no form for.
        sizes: bytes of each storage, by key.
        device: torch's name of where a reader puts it.

    Raises:
        TypeError: a node of another type.
        ValueError: a tensor that is not inside its storage.
    """
    if isinstance(node, DTypeRef):
        return dtype(node.name)
    if not isinstance(node, Tensor):
        raise TypeError(f"no pickle form for {type(node).__name__}")
    size, nbytes = ITEMSIZE[node.dtype], sizes.get(node.key, -1)
    if nbytes < 0 or len(node.shape) != len(node.stride):
        raise ValueError(f"a tensor without its storage {node.key!r}")
    if nbytes % size or reach(node.offset, node.shape, node.stride) * size > nbytes:
        raise ValueError(f"a tensor that is not inside its storage {node.key!r}")
    kind = _STORAGE.get(node.dtype)
    storage = Persistent(("storage", kind or _UNTYPED, node.key, device, nbytes // size if kind else nbytes))
    common = (storage, node.offset, node.shape, node.stride, False, _NO_HOOKS)
    if kind:
        return Reduce(Global("torch._utils", "_rebuild_tensor_v2"), common)
    return Reduce(Global("torch._utils", "_rebuild_tensor_v3"), (*common, dtype(node.dtype)))


class ZipWriter:
    """Zip records one after the other, the directory last. Positions count from the container's start."""

    def __init__(self, base: int, root: str) -> None:
        self.literals: list[tuple[int, bytes]] = []
        self._base = base
        self._root = root
        self._at = 0
        self._pending = bytearray()  # written since the last gap
        self._central: list[bytes] = []

    def add(self, name: str, content: bytes) -> None:
        """Write a record whose bytes are known, with their checksum."""
        self._header(name, len(content), zlib.crc32(content), b"")
        self._write(content)

    def reserve(self, name: str, nbytes: int) -> int:
        """A record whose bytes come later; their absolute offset."""
        fixed = self._base + self._at + LOCAL.size + len(f"{self._root}/{name}") + _zip64_size(nbytes) + 4
        gap = -fixed % _ALIGN
        self._header(name, nbytes, 0, b"FB" + struct.pack("<H", gap) + b"Z" * gap)  # torch's padding field
        start = self._base + self._at
        if nbytes:
            self._flush()
            self._at += nbytes
        return start

    def finish(self) -> int:
        """Write the directory; the size of the whole container."""
        start, count = self._at, len(self._central)
        directory = b"".join(self._central)
        self._write(directory)
        size, end64 = len(directory), self._at
        self._write(END64.pack(b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start))
        self._write(LOCATOR.pack(b"PK\x06\x07", 0, end64, 1))
        short, low_size, low_start = min(count, U16_MAX), min(size, U32_MAX), min(start, U32_MAX)
        self._write(END.pack(b"PK\x05\x06", 0, 0, short, short, low_size, low_start, 0))
        self._flush()
        return self._at

    def _header(self, name: str, nbytes: int, crc: int, padding: bytes) -> None:
        raw = f"{self._root}/{name}".encode("ascii")
        header, low = self._at, min(nbytes, U32_MAX)
        wide = struct.pack("<2H2Q", 1, 16, nbytes, nbytes) if low == U32_MAX else b""
        extra = wide + padding
        # version 4.5 (zip64), no flags, stored, 1980-01-01: the same bytes whenever they are written
        self._write(LOCAL.pack(b"PK\x03\x04", 45, 0, 0, 0, 0x21, crc, low, low, len(raw), len(extra)) + raw + extra)
        numbers = ([nbytes, nbytes] if wide else []) + ([header] if header >= U32_MAX else [])
        extra = struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""
        place = (len(raw), len(extra), 0, 0, 0, 0, min(header, U32_MAX))
        self._central.append(CENTRAL.pack(b"PK\x01\x02", 45, 45, 0, 0, 0, 0x21, crc, low, low, *place) + raw + extra)

    def _write(self, data: bytes) -> None:
        self._pending += data
        self._at += len(data)

    def _flush(self) -> None:
        if self._pending:
            self.literals.append((self._base + self._at - len(self._pending), bytes(self._pending)))
            self._pending.clear()


def _zip64_size(nbytes: int) -> int:
    return 20 if nbytes >= U32_MAX else 0
