"""The container of ``torch.save``, read: where each tensor's bytes lie. `dconv.checkpoint.torchframe` writes it.

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
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short  # of nested hostile values too
from typing import Any, Final

from dconv.checkpoint import inert
from dconv.checkpoint.files import stamp
from dconv.checkpoint.pickled import StorageRef, TensorRef, bounded
from dconv.errors import Damaged, Refused, StorageFault
from dconv.sharding.dtypes import ITEMSIZE
from dconv.sharding.parsed import is_dict, is_list

LOCAL: Final = struct.Struct("<4s5H3L2H")
CENTRAL: Final = struct.Struct("<4s6H3L5H2L")
END: Final = struct.Struct("<4s4H2LH")
END64: Final = struct.Struct("<4sQ2H2L4Q")
LOCATOR: Final = struct.Struct("<4sLQL")
U16_MAX: Final = 0xFFFF
U32_MAX: Final = 0xFFFFFFFF
# a directory of 10^6 records takes about 80 MB
_MAX_DIRECTORY: Final = 256 << 20
#: Start of today's form, and of the older one: the pickled number 0x1950a86a20f9469cfc6c.
_ZIP_MAGIC: Final = b"PK\x03\x04"
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
        if len(ref.shape) != len(ref.stride) or reach(ref.offset, ref.shape, ref.stride) * size > nbytes:
            found = f"offset {ref.offset}, shape {ref.shape}, strides {ref.stride} of {ref.dtype}"
            raise Damaged("a tensor larger than its storage", where=where, expected=f"{nbytes} bytes", found=found)
        offset = 0 if 0 in ref.shape else ref.offset * size
        return Located(start + offset, tuple(s * size for s in ref.stride), ref.shape, ref.dtype)


def reach(offset: int, shape: Sequence[int], stride: Sequence[int]) -> int:
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
    with _opened(Path(path), offset, length) as blob:
        magic = blob.pread(0, min(blob.length, len(_LEGACY_MAGIC)))
        if magic[:4] == _ZIP_MAGIC:
            return _read_zip(blob)
        if magic == _LEGACY_MAGIC:
            return _read_legacy(blob)
        if blob.pread(257 if blob.length > 262 else 0, min(blob.length, 5)) == b"ustar":
            raise Refused("the tar form of torch 0.1", where=str(path), do="save it again with a newer torch")
        raise Damaged("not a file of torch.save", where=str(path), found=f"it begins with {magic[:8]!r}")


@dataclass(frozen=True, slots=True)
class Checksum:
    """A record of a zip: offset in the file, bytes, and the CRC-32 that they had when written; 0 where none was."""

    offset: int
    nbytes: int
    crc: int


def checksums(path: Path, offset: int = 0, length: int | None = None) -> list[Checksum]:
    """Of the records of a zip that ``torch.save`` wrote; none of anything else.

    Args:
        path: the file.
        offset: where the zip begins.
        length: its bytes; None for all up to the end.

    Raises:
        Damaged: the zip's directory is broken.
        StorageFault: the file cannot be read.
    """
    with _opened(path, offset, length) as blob:
        if blob.pread(0, min(blob.length, 4)) != _ZIP_MAGIC:
            return []
        found = _directory(blob).values()
        return [Checksum(blob.base + _data(blob, record), record.size, record.crc) for record in found]


@contextmanager
def _opened(path: Path, offset: int, length: int | None) -> Generator[_Blob]:
    stamp(path)  # it is a file, not a pipe that nobody writes to
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as fault:
        raise StorageFault(f"cannot open a file: {fault.strerror}", where=str(path)) from fault
    try:
        size = os.fstat(fd).st_size
        length = size - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > size:
            found = f"bytes {offset} to {offset + length}"
            raise Damaged("a range past the end of its file", where=str(path), expected=f"{size} bytes", found=found)
        yield _Blob(fd, path, offset, length)
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
        parts: list[bytes] = []
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
    bounded(tree, where=where)
    storages: dict[str, tuple[int, int]] = {}
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
        found: list[tuple[bytes, int, int, int]] = []
        at = 0
        while at < len(data):
            record, at = _entry(blob, data, at)
            found.append(record)
    except struct.error as error:
        raise blob.damaged("a broken zip directory", str(error)) from None
    if len(found) != count:
        raise blob.damaged("a broken zip directory", f"{len(found)} records, {count} announced")
    found.sort(key=lambda entry: entry[1])
    records: dict[bytes, _Record] = {}
    for (name, header, size, crc), (_, limit, _, _) in zip(found, [*found[1:], (b"", start, 0, 0)], strict=True):
        if header + LOCAL.size + len(name) + size > limit:
            raise blob.damaged("records that overlap", _shown(name))
        if name[:1] in b"/\\" or b".." in re.split(rb"[/\\]", name):
            raise blob.damaged("a name that leaves its archive", _shown(name))
        if name in records:
            raise blob.damaged("two records of one name", _shown(name))
        records[name] = _Record(name, header, size, crc, limit)
    return records


def _find_directory(blob: _Blob) -> tuple[int, int, bytes]:
    """(offset, number of entries, bytes) of the central directory."""
    for span in (4096, END.size + U16_MAX):  # a comment may follow the end record; torch writes none
        tail = blob.pread(max(0, blob.length - span), min(span, blob.length))
        at = tail.rfind(b"PK\x05\x06")
        while at >= 0 and (len(tail) < at + 22 or at + 22 + END.unpack_from(tail, at)[7] != len(tail)):
            at = tail.rfind(b"PK\x05\x06", 0, at)
        if at >= 0:
            break
    else:
        raise blob.damaged("a truncated file", "no zip directory at its end")
    _, disk, first, here, count, size, start, _ = END.unpack_from(tail, at)
    end = blob.length - len(tail) + at
    locator = blob.pread(end - LOCATOR.size, LOCATOR.size) if end >= LOCATOR.size else b""
    if locator[:4] == b"PK\x06\x07":
        _, disk, end64, _ = LOCATOR.unpack(locator)
        raw = blob.pread(end64, END64.size)
        mark, extent, _, _, first, disk, here, count, size, start = END64.unpack(raw)
        if mark != b"PK\x06\x06" or end64 + 12 + extent != end - LOCATOR.size:
            raise blob.damaged("a broken zip directory", "no zip64 end record where it should be")
        end = end64
    if disk or first or here != count or start + size != end or size > _MAX_DIRECTORY:
        raise blob.damaged("a broken zip directory", f"{count} records, bytes {start} to {start + size}")
    return start, count, blob.pread(start, size)


def _entry(blob: _Blob, data: bytes, at: int) -> tuple[tuple[bytes, int, int, int], int]:
    """((name, offset of the local header, size, crc), offset of the next entry) from the directory."""
    fields = CENTRAL.unpack_from(data, at)
    flags, method, crc, packed, size, n_name, n_extra, n_comment = *fields[3:5], *fields[7:13]
    header = fields[16]
    at += CENTRAL.size
    name, extra = data[at : at + n_name], data[at + n_name : at + n_name + n_extra]
    at += n_name + n_extra + n_comment
    if fields[0] != b"PK\x01\x02" or at > len(data) or method or flags & 0x2041:
        shown = _shown(name)
        raise blob.damaged("a record that torch does not write", f"{shown}, compression {method}, flags {flags:#x}")
    wide = iter(_zip64(extra))
    size = next(wide, -1) if size == U32_MAX else size
    packed = next(wide, -1) if packed == U32_MAX else packed
    header = next(wide, -1) if header == U32_MAX else header
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
    head = blob.pread(record.header, LOCAL.size + len(record.name))
    fields = LOCAL.unpack_from(head)
    start = record.header + len(head) + fields[10]
    if fields[0] != b"PK\x03\x04" or fields[3] or head[LOCAL.size :] != record.name or fields[9] != len(record.name):
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
            bounded(values[-1], where=machine.where)
            refs.update(machine.storages)
            at = machine.pos
    _, protocol, system, tree, keys = values
    if protocol != 1001 or not is_dict(system) or not is_list(keys):
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
