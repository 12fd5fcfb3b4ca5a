"""The container of ``torch.save``: where each tensor's bytes lie, and how to write one around bytes to come.

Since torch 1.6 it is a zip of uncompressed records: ``<root>/data.pkl`` is the pickled tree and each
``<root>/data/<key>`` a storage. Before, it was a row of pickles and then the raw storages; that form is read
too. Reading touches the directory at the end, ``data.pkl`` and one header a storage, never the data.

Sources: PKWARE's APPNOTE.TXT 6.3 (zip, zip64); torch/serialization.py; caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short  # of nested hostile values too
from typing import Any, Final

from dconv.checkpoint import inert
from dconv.checkpoint.inert import DTypeRef, StorageRef, TensorRef
from dconv.checkpoint.pickling import Global, Persistent, Reduce, dtype, dumps
from dconv.errors import Damaged, Refused, StorageFault
from dconv.sharding.dtypes import ITEMSIZE

_LOCAL: Final = struct.Struct("<4s5H3L2H")
_CENTRAL: Final = struct.Struct("<4s6H3L5H2L")
_END: Final = struct.Struct("<4s4H2LH")
_END64: Final = struct.Struct("<4sQ2H2L4Q")
_LOCATOR: Final = struct.Struct("<4sLQL")
_U16_MAX: Final = 0xFFFF
_U32_MAX: Final = 0xFFFFFFFF
# a directory of 10^6 records takes about 80 MB
_MAX_DIRECTORY: Final = 256 << 20
#: Start of the older form: the pickled number 0x1950a86a20f9469cfc6c.
_LEGACY_MAGIC: Final = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


@dataclass(frozen=True, slots=True)
class Located:
    """A tensor in a file: byte offset of its first element, bytes from one to the next along each axis.

    Strides of 0 (an expanded tensor) or that overlap are possible; every element is inside its storage.
    """

    offset: int
    strides: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class TorchFile:
    """What one ``torch.save`` wrote. ``storages``: key -> (absolute offset, length), both in bytes."""

    path: Path
    tree: Any
    storages: Mapping[str, tuple[int, int]]

    def locate(self, ref: TensorRef) -> Located:
        """Where the tensor lies.

        Raises:
            Damaged: its storage is missing, of another size, or too short for it.
            Refused: a dtype that dconv does not know.
        """
        start, nbytes = self.storages.get(ref.storage.key, (0, -1))
        where = f"{self.path}, storage {short(ref.storage.key)}"
        for name in (ref.dtype, ref.storage.dtype):
            if name not in ITEMSIZE:
                raise Refused(f"a tensor of {name}", where=where, expected="one of " + " ".join(ITEMSIZE))
        size = ITEMSIZE[ref.dtype]
        if nbytes != ref.storage.numel * ITEMSIZE[ref.storage.dtype]:
            expected = f"{ref.storage.numel} x {ref.storage.dtype}"
            raise Damaged("a storage of wrong size", where=where, expected=expected, found=f"{nbytes} bytes")
        if len(ref.shape) != len(ref.stride) or _reach(ref.offset, ref.shape, ref.stride) * size > nbytes:
            found = f"offset {ref.offset}, shape {ref.shape}, strides {ref.stride} of {ref.dtype}"
            raise Damaged("a tensor larger than its storage", where=where, expected=f"{nbytes} bytes", found=found)
        offset = 0 if 0 in ref.shape else ref.offset * size
        return Located(start + offset, tuple(s * size for s in ref.stride), ref.shape, ref.dtype)


def _reach(offset: int, shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements of the storage up to the end of the tensor; torch lets an empty one start anywhere."""
    if 0 in shape:
        return 0
    return offset + 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


def read(path: str | os.PathLike[str], offset: int = 0, length: int | None = None) -> TorchFile:
    """Open what ``torch.save`` wrote at ``offset`` of a file, ``length`` bytes long (to the end by default).

    Raises:
        Damaged: not such a container, truncated, compressed, records that overlap, foreign globals.
        Refused: a TorchScript archive, big-endian data, the tar form of torch 0.1.
        StorageFault: the file cannot be read.
    """
    path = Path(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Damaged("a file is missing", where=str(path)) from None
    except OSError as fault:
        raise StorageFault(f"cannot open a file: {fault.strerror}", where=str(path)) from fault
    try:
        size = os.fstat(fd).st_size
        length = size - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > size:
            found = f"bytes {offset} to {offset + length}"
            raise Damaged("a range past the end of its file", where=str(path), expected=f"{size} bytes", found=found)
        blob = _Blob(fd, path, offset, length)
        magic = blob.pread(0, min(length, len(_LEGACY_MAGIC)))
        if magic[:4] == b"PK\x03\x04":
            return _read_zip(blob)
        if magic == _LEGACY_MAGIC:
            return _read_legacy(blob)
        if blob.pread(257 if length > 262 else 0, min(length, 5)) == b"ustar":
            raise Refused("the tar form of torch 0.1", where=str(path), do="save it again with a newer torch")
        raise Damaged("not a file of torch.save", where=str(path), found=f"it begins with {magic[:8]!r}")
    except OSError as fault:
        raise StorageFault(f"cannot read a file: {fault.strerror}", where=str(path)) from fault
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class _Blob:
    fd: int
    path: Path
    base: int
    length: int

    def pread(self, offset: int, size: int) -> bytes:
        """``size`` bytes at ``offset`` of the blob."""
        if offset < 0 or size < 0 or offset + size > self.length:
            raise self.damaged("a record outside its container", f"bytes {offset} to {offset + size}")
        parts = []
        while size:  # Linux returns at most 2 GiB at once
            part = os.pread(self.fd, size, self.base + offset)
            if not part:
                raise self.damaged("a file that ends early", f"no byte at {self.base + offset}")
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return b"".join(parts)

    def damaged(self, what: str, found: str) -> Damaged:
        place = f", bytes {self.base} to {self.base + self.length}" if self.base else ""
        return Damaged(what, where=f"{self.path}{place}", found=found)


@dataclass(frozen=True, slots=True)
class _Record:
    name: bytes
    header: int
    size: int
    crc: int
    limit: int


def _read_zip(blob: _Blob) -> TorchFile:
    records = _directory(blob)
    roots = [name[: -len(b"/data.pkl")] for name in records if re.fullmatch(rb"[^/]+/data\.pkl", name)]
    if len(roots) != 1:
        raise blob.damaged("a zip that torch.save did not write", f"{len(roots)} records data.pkl")
    root = roots[0]
    if root + b"/constants.pkl" in records:
        raise Refused("a TorchScript archive", where=str(blob.path), do="save its state_dict with torch.save")
    order = records.get(root + b"/byteorder")
    if order is not None and _content(blob, order) != b"little":
        raise Refused("data that is not little-endian", where=str(blob.path))
    pickled = records[root + b"/data.pkl"]
    if pickled.size > inert.MAX_BYTES:
        raise blob.damaged("an implausibly large data.pkl", f"{pickled.size} bytes")
    where = f"{blob.path}, data.pkl"
    machine = inert.Machine(_content(blob, pickled), 0, where)
    tree = machine.run()
    inert.bounded(tree, where=where)
    storages = {}
    for key in machine.storages:
        record = records.get(root + b"/data/" + key.encode("utf-8", "surrogatepass"))
        if record is None:
            raise blob.damaged("a storage without a record", f"no data/{key}")
        storages[key] = (blob.base + _data(blob, record), record.size)
    return TorchFile(blob.path, tree, storages)


def _directory(blob: _Blob) -> dict[bytes, _Record]:
    """The central directory: every record, checked to lie in the blob and apart from the others."""
    try:
        start, count, data = _find_directory(blob)
        found = []
        at = 0
        while at < len(data):
            record, at = _entry(blob, data, at)
            found.append(record)
    except struct.error as error:
        raise blob.damaged("a broken zip directory", str(error)) from None
    if len(found) != count:
        raise blob.damaged("a broken zip directory", f"{len(found)} records, {count} announced")
    found.sort(key=lambda entry: entry[1])
    records = {}
    for (name, header, size, crc), (_, limit, _, _) in zip(found, [*found[1:], (b"", start, 0, 0)], strict=True):
        if header + _LOCAL.size + len(name) + size > limit:
            raise blob.damaged("records that overlap", _shown(name))
        if name in records:
            raise blob.damaged("two records of one name", _shown(name))
        records[name] = _Record(name, header, size, crc, limit)
    return records


def _find_directory(blob: _Blob) -> tuple[int, int, bytes]:
    """(offset, number of entries, bytes) of the central directory."""
    for span in (4096, _END.size + _U16_MAX):  # a comment may follow the end record; torch writes none
        tail = blob.pread(max(0, blob.length - span), min(span, blob.length))
        at = tail.rfind(b"PK\x05\x06")
        while at >= 0 and (len(tail) < at + 22 or at + 22 + _END.unpack_from(tail, at)[7] != len(tail)):
            at = tail.rfind(b"PK\x05\x06", 0, at)
        if at >= 0:
            break
    else:
        raise blob.damaged("a truncated file", "no zip directory at its end")
    _, disk, first, here, count, size, start, _ = _END.unpack_from(tail, at)
    end = blob.length - len(tail) + at
    locator = blob.pread(end - _LOCATOR.size, _LOCATOR.size) if end >= _LOCATOR.size else b""
    if locator[:4] == b"PK\x06\x07":
        _, disk, end64, _ = _LOCATOR.unpack(locator)
        raw = blob.pread(end64, _END64.size)
        mark, extent, _, _, first, disk, here, count, size, start = _END64.unpack(raw)
        if mark != b"PK\x06\x06" or end64 + 12 + extent != end - _LOCATOR.size:
            raise blob.damaged("a broken zip directory", "no zip64 end record where it should be")
        end = end64
    if disk or first or here != count or start + size != end or size > _MAX_DIRECTORY:
        raise blob.damaged("a broken zip directory", f"{count} records, bytes {start} to {start + size}")
    return start, count, blob.pread(start, size)


def _entry(blob: _Blob, data: bytes, at: int) -> tuple[tuple[bytes, int, int, int], int]:
    """((name, offset of the local header, size, crc), offset of the next entry) from the directory."""
    fields = _CENTRAL.unpack_from(data, at)
    flags, method, crc, packed, size, n_name, n_extra, n_comment = *fields[3:5], *fields[7:13]
    header = fields[16]
    at += _CENTRAL.size
    name, extra = data[at : at + n_name], data[at + n_name : at + n_name + n_extra]
    at += n_name + n_extra + n_comment
    if fields[0] != b"PK\x01\x02" or at > len(data) or method or flags & 0x2041:
        shown = _shown(name)
        raise blob.damaged("a record that torch does not write", f"{shown}, compression {method}, flags {flags:#x}")
    wide = iter(_zip64(extra))
    size = next(wide, -1) if size == _U32_MAX else size
    packed = next(wide, -1) if packed == _U32_MAX else packed
    header = next(wide, -1) if header == _U32_MAX else header
    if size < 0 or packed != size or header < 0:
        raise blob.damaged("a record of wrong size", _shown(name))
    return (name, header, size, crc), at


def _zip64(extra: bytes) -> tuple[int, ...]:
    """The 64-bit numbers of extra field 1."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            return struct.unpack_from(f"<{size // 8}Q", extra, at + 4)
        at += 4 + size
    return ()


def _data(blob: _Blob, record: _Record) -> int:
    """Offset in the blob of a record's bytes: its local header may be longer than the directory says."""
    head = blob.pread(record.header, _LOCAL.size + len(record.name))
    fields = _LOCAL.unpack_from(head)
    start = record.header + len(head) + fields[10]
    if fields[0] != b"PK\x03\x04" or fields[3] or head[_LOCAL.size :] != record.name or fields[9] != len(record.name):
        raise blob.damaged("a broken local header", _shown(record.name))
    if start + record.size > record.limit:
        raise blob.damaged("records that overlap", _shown(record.name))
    return start


def _shown(name: bytes) -> str:
    return short(name.decode("utf-8", "replace"))


def _content(blob: _Blob, record: _Record) -> bytes:
    content = blob.pread(_data(blob, record), record.size)
    if record.crc and zlib.crc32(content) != record.crc:  # 0: written with compute_crc32 = False
        raise blob.damaged("a record with a wrong checksum", _shown(record.name))
    return content


def _read_legacy(blob: _Blob) -> TorchFile:
    """Pickles: magic, protocol, system, tree, storage keys; then each storage as int64 numel and raw data."""
    end = blob.base + blob.length
    with mmap.mmap(blob.fd, end, access=mmap.ACCESS_READ) as data:
        at = blob.base
        values: list[Any] = []
        refs: dict[str, StorageRef] = {}
        for part in ("magic number", "protocol", "system", "tree", "storage keys"):
            machine = inert.Machine(data, at, f"{blob.path}, {part}")
            values.append(machine.run())
            inert.bounded(values[-1], where=machine.where)
            refs.update(machine.storages)
            at = machine.pos
    _, protocol, system, tree, keys = values
    if protocol != 1001 or not isinstance(system, dict) or not isinstance(keys, list):
        raise blob.damaged("a broken file of torch before 1.6", f"protocol {short(protocol)}")
    if system.get("little_endian") is not True:
        raise Refused("data that is not little-endian", where=str(blob.path))
    storages: dict[str, tuple[int, int]] = {}
    for key in keys:
        ref = refs.get(key) if isinstance(key, str) else None
        if ref is None or key in storages:
            raise blob.damaged("a storage that the tree does not name", short(key))
        if ref.dtype not in ITEMSIZE:
            raise Refused(f"a storage of {ref.dtype}", where=str(blob.path))
        (numel,) = struct.unpack("<q", blob.pread(at - blob.base, 8))
        nbytes = ref.numel * ITEMSIZE[ref.dtype]
        at += 8 + nbytes
        if numel != ref.numel or at > end:
            raise blob.damaged("a storage of wrong size", f"{short(key)}: {numel} elements, tree says {ref.numel}")
        storages[key] = (at - nbytes, nbytes)
    return TorchFile(blob.path, tree, storages)


#: Typed storages by dconv's dtype; the others lie in untyped ones and are named by ``_rebuild_tensor_v3``.
_STORAGE: Final = {
    short: Global("torch", name) for name, short in inert.STORAGE_DTYPES.items() if name != "UntypedStorage"
}
_UNTYPED: Final = Global("torch.storage", "UntypedStorage")
_NO_HOOKS: Final = Reduce(Global("collections", "OrderedDict"), ())
_KEY: Final = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)
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
        offset: elements before the first one.
        stride: elements from one to the next along each axis; row-major without gaps by default.
    """
    shape = tuple(shape)
    if stride is None:
        made, step = [], 1
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


def frame(tree: object, storages: Sequence[tuple[str, int]], *, base: int = 0, root: str = "archive") -> Frame:
    """A container for ``tree``, to lie at byte ``base`` of a file.

    Its storages' checksums are 0: torch never looks at them, and the bytes are not known yet.

    Args:
        tree: what `dconv.checkpoint.pickling.dumps` takes, and nodes of `tensor`, and `DTypeRef`.
        storages: (key, bytes) of each storage, in file order.

    Raises:
        ValueError: a key twice or of odd form, a tensor that is not inside its storage.
    """
    sizes = dict(storages)
    if len(sizes) != len(storages) or not all(map(_KEY.fullmatch, [root, *sizes])):
        raise ValueError("storage keys must be plain and unique")
    writer = _ZipWriter(base, root)
    writer.add("data.pkl", dumps(tree, lambda node: _lower(node, sizes)))
    writer.add("version", b"3\n")
    writer.add("byteorder", b"little")
    data = {key: writer.reserve(f"data/{key}", nbytes) for key, nbytes in storages}
    return Frame(writer.finish(), tuple(writer.literals), data)


def _lower(node: object, sizes: Mapping[str, int]) -> object:
    if isinstance(node, DTypeRef):
        return dtype(node.name)
    if not isinstance(node, Tensor):
        raise TypeError(f"no pickle form for {type(node).__name__}")
    size, nbytes = ITEMSIZE[node.dtype], sizes.get(node.key, -1)
    if nbytes < 0 or len(node.shape) != len(node.stride):
        raise ValueError(f"a tensor without its storage {node.key!r}")
    if nbytes % size or _reach(node.offset, node.shape, node.stride) * size > nbytes:
        raise ValueError(f"a tensor that is not inside its storage {node.key!r}")
    kind = _STORAGE.get(node.dtype)
    storage = Persistent(("storage", kind or _UNTYPED, node.key, "cpu", nbytes // size if kind else nbytes))
    common = (storage, node.offset, node.shape, node.stride, False, _NO_HOOKS)
    if kind:
        return Reduce(Global("torch._utils", "_rebuild_tensor_v2"), common)
    return Reduce(Global("torch._utils", "_rebuild_tensor_v3"), (*common, dtype(node.dtype)))


class _ZipWriter:
    """Zip records one after the other, the directory last. Positions count from the container's start."""

    def __init__(self, base: int, root: str) -> None:
        self.literals: list[tuple[int, bytes]] = []
        self._base = base
        self._root = root
        self._at = 0
        self._pending = bytearray()  # written since the last gap
        self._central: list[bytes] = []

    def add(self, name: str, content: bytes) -> None:
        """A record whose bytes are known."""
        self._header(name, len(content), zlib.crc32(content), b"")
        self._write(content)

    def reserve(self, name: str, nbytes: int) -> int:
        """A record whose bytes come later; their absolute offset."""
        fixed = self._base + self._at + _LOCAL.size + len(f"{self._root}/{name}") + _zip64_size(nbytes) + 4
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
        self._write(_END64.pack(b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start))
        self._write(_LOCATOR.pack(b"PK\x06\x07", 0, end64, 1))
        short, low_size, low_start = min(count, _U16_MAX), min(size, _U32_MAX), min(start, _U32_MAX)
        self._write(_END.pack(b"PK\x05\x06", 0, 0, short, short, low_size, low_start, 0))
        self._flush()
        return self._at

    def _header(self, name: str, nbytes: int, crc: int, padding: bytes) -> None:
        raw = f"{self._root}/{name}".encode("ascii")
        header, low = self._at, min(nbytes, _U32_MAX)
        wide = struct.pack("<2H2Q", 1, 16, nbytes, nbytes) if low == _U32_MAX else b""
        extra = wide + padding
        # version 4.5 (zip64), no flags, stored, 1980-01-01: the same bytes whenever they are written
        self._write(_LOCAL.pack(b"PK\x03\x04", 45, 0, 0, 0, 0x21, crc, low, low, len(raw), len(extra)) + raw + extra)
        numbers = ([nbytes, nbytes] if wide else []) + ([header] if header >= _U32_MAX else [])
        extra = struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""
        place = (len(raw), len(extra), 0, 0, 0, 0, min(header, _U32_MAX))
        self._central.append(_CENTRAL.pack(b"PK\x01\x02", 45, 45, 0, 0, 0, 0x21, crc, low, low, *place) + raw + extra)

    def _write(self, data: bytes) -> None:
        self._pending += data
        self._at += len(data)

    def _flush(self) -> None:
        if self._pending:
            self.literals.append((self._base + self._at - len(self._pending), bytes(self._pending)))
            self._pending.clear()


def _zip64_size(nbytes: int) -> int:
    return 20 if nbytes >= _U32_MAX else 0
