"""The GGUF container: total validation of a file's header, versions 2 and 3.

Source: ``docs/gguf.md`` of ggml, and the checks of its reader (``ggml/src/gguf.cpp``): keys and tensor names
stand once, every tensor begins where the one before it ends, rounded up to the alignment, and all of them end inside
the file.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dconv.checkpoint.files import check_tensor_name, read_whole, stamp
from dconv.codec.gguf import BLOCKS
from dconv.errors import Damaged, Refused, StorageFault
from dconv.sharding.region import Index

#: How a file begins.
MAGIC: Final = b"GGUF"
#: Type numbers. Source: ``enum ggml_type`` in ggml.h; those that are left out were removed, or are no storage types.
TYPES: Final = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
#: Formats of values that are one number. Source: ``enum gguf_type``.
FORMS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
_ALIGNMENT: Final = "general.alignment"
#: Where it is not said.
ALIGNMENT: Final = 32
#: ggml's limit (``GGML_MAX_DIMS``).
_MOST_AXES: Final = 4
#: The largest vocabularies make headers of some 20 MB.
_MAX_HEADER: Final = 256 << 20
_MAX_NAME: Final = 1 << 16
#: Far above the versions and types that ggml may yet come to have.
_ANY: Final = 256
#: Longer arrays (the vocabulary) are counted, not kept.
_KEPT: Final = 4096
_WINDOW: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Long:
    """A value of the metadata that is not kept: an array of so many."""

    count: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a file.

    Attributes:
        shape: the slowest axis first, as everywhere here; the file has them the other way round.
        kind: of its blocks (`dconv.codec.gguf.BLOCKS`).
        offset: byte in the file.
    """

    name: str
    shape: Index
    kind: str
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, along the fastest axis; blocks do not reach over rows."""
        weights, size = BLOCKS[self.kind]
        return (self.shape[-1] if self.shape else 1) // weights * size

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, without the padding behind."""
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True, slots=True)
class Header:
    """Metadata by key, and tensors by name, in the order of the file."""

    values: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def read_header(path: Path) -> Header:
    """Metadata and tensors of one file.

    Raises:
        Damaged: a header with which llama.cpp would read other bytes, or none.
        Refused: the first version, the other byte order, a type that is not known.
    """
    size = stamp(path).size
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _read(_Cursor(path, fd, size))
        finally:
            os.close(fd)
    except OSError as fault:
        raise StorageFault(f"cannot read: {fault.strerror}", where=str(path)) from fault


def raw_values(path: Path) -> dict[str, bytes]:
    """The values of all keys as the file has them: their types first.

    Raises:
        Damaged, Refused: see `read_header`, which is to have read the file.
    """
    size = stamp(path).size
    found: dict[str, bytes] = {}
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            cursor = _Cursor(path, fd, size)
            cursor.take(len(MAGIC) + struct.calcsize("<IQ"))
            for _ in range(cursor.number("Q")):
                key = cursor.text("a key", _MAX_NAME)
                start = cursor.at
                _value(cursor, key)
                found[key] = read_whole(fd, cursor.at - start, start)
        finally:
            os.close(fd)
    except OSError as fault:
        raise StorageFault(f"cannot read: {fault.strerror}", where=str(path)) from fault
    return found


class _Cursor:
    """Reads a header from its beginning; never past the file's end, nor more than a header may have."""

    def __init__(self, path: Path, fd: int, size: int) -> None:
        self.path, self.size, self.at = path, size, 0
        self._fd, self._end = fd, min(size, _MAX_HEADER)
        self._held, self._from = b"", 0

    def take(self, count: int) -> bytes:
        if count > self._end - self.at:
            raise self.bad(
                "cut off inside its header" if self._end == self.size else "a header that is implausibly large",
                f"{count:,} bytes at {self.at:,}",
                f"a file of {self.size:,} bytes",
            )
        low = self.at - self._from
        if low + count > len(self._held):
            self._held, self._from, low = read_whole(self._fd, max(count, _WINDOW), self.at), self.at, 0
            if len(self._held) < count:
                raise self.bad("cut off while it was read", f"{self.size:,} bytes", f"{self.at + len(self._held):,}")
        self.at += count
        return self._held[low : low + count]

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize(form)))[0]

    def text(self, what: str, limit: int = _MAX_HEADER) -> str:
        length = self.number("Q")
        if length > limit:
            raise self.bad(f"{what} is implausibly long", f"at most {limit:,} bytes", f"{length:,}")
        data = self.take(length)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self.bad(f"{what} is no text", "UTF-8", repr(data[:40])) from None

    def bad(self, what: str, expected: str = "", found: str = "", do: str = "") -> Damaged:
        return Damaged(f"a GGUF header is broken: {what}", where=str(self.path), expected=expected, found=found, do=do)


def _read(cursor: _Cursor) -> Header:
    if cursor.take(len(MAGIC)) != MAGIC:
        raise Damaged("not a GGUF file", where=str(cursor.path), expected="the letters GGUF at its beginning")
    version = cursor.number("I")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "big"), "little") in (1, 2, 3)
        if not swapped and not 0 < version < _ANY:
            raise cursor.bad("a version that none is", "2 or 3", f"{version:,}")
        raise Refused(
            "a GGUF file that this version does not read, nothing was written",
            where=str(cursor.path),
            expected="version 2 or 3, little-endian",
            found="big-endian" if swapped else f"version {version}",
            do="" if swapped else "make it anew with a recent llama.cpp",
        )
    tensors, keys = cursor.number("Q"), cursor.number("Q")
    values: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.text("a key", _MAX_NAME)
        if key in values:
            raise cursor.bad("a key stands there twice", found=repr(key)[:120])
        values[key] = _value(cursor, key)
    alignment = values.get(_ALIGNMENT, ALIGNMENT)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.bad("an alignment that none is", "a power of two", f"{_ALIGNMENT} {alignment!r:.40}")
    return Header(values, _tensors(cursor, tensors, alignment))


def _value(cursor: _Cursor, key: str) -> Any:
    kind = cursor.number("I")
    if kind != ARRAY:
        return _one(cursor, key, kind)
    kind, count = cursor.number("I"), cursor.number("Q")
    if kind == TEXT:
        if count <= _KEPT:
            return [cursor.text(key) for _ in range(count)]
        for _ in range(count):
            cursor.take(cursor.number("Q"))
        return Long(count)
    if kind not in FORMS:
        raise cursor.bad("an array of what no array has", "numbers or texts", f"type {kind} of {key[:120]!r}")
    form = FORMS[kind]
    data = cursor.take(count * struct.calcsize(form)) if count <= _MAX_HEADER else cursor.take(_MAX_HEADER + 1)
    return list(struct.unpack(f"<{count}{form}", data)) if count <= _KEPT else Long(count)


def _one(cursor: _Cursor, key: str, kind: int) -> Any:
    if kind == TEXT:
        return cursor.text(f"the value of {key[:120]!r}")
    if kind not in FORMS:
        raise cursor.bad("a value of no known type", "0 to 12", f"type {kind} of {key[:120]!r}")
    return cursor.number(FORMS[kind])


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, Tensor]:
    """The tensors, whose offsets count from the end of the header.

    Raises:
        Damaged: two of one name, one of a shape that none has, or not where its file has it.
    """
    listed: list[tuple[str, Index, str, int]] = []
    names: set[str] = set()
    for _ in range(count):
        name = cursor.text("a tensor's name", _MAX_NAME)
        check_tensor_name(name, said_by=cursor.path)
        if name in names:
            raise cursor.bad("two tensors of one name", found=repr(name)[:120])
        names.add(name)
        axes = cursor.number("I")
        if axes > _MOST_AXES:
            raise cursor.bad(f"{name[:120]!r} has too many axes", f"at most {_MOST_AXES}", str(axes))
        shape = tuple(reversed([cursor.number("Q") for _ in range(axes)]))
        kind, offset = cursor.number("I"), cursor.number("Q")
        if kind >= _ANY:
            raise cursor.bad(f"{name[:120]!r} is of a type that none is", "a number of ggml's", f"type {kind:,}")
        if kind not in TYPES:
            raise Refused(
                "a GGUF type that this version does not decode, nothing was written",
                where=f"{name[:120]} in {cursor.path}",
                expected=", ".join(TYPES.values()),
                found=f"type {kind}",
            )
        if (shape or (1,))[-1] % BLOCKS[TYPES[kind]][0] or math.prod(shape) >= 2**60:
            raise cursor.bad(
                f"{name[:120]!r} has a shape that none has",
                f"rows of whole blocks of {BLOCKS[TYPES[kind]][0]}",
                f"{list(shape)} of {TYPES[kind]}",
            )
        listed.append((name, shape, TYPES[kind], offset))
    begin = padded(cursor.at, alignment)
    found: dict[str, Tensor] = {}
    at = 0
    for name, shape, kind, offset in listed:
        tensor = Tensor(name, shape, kind, begin + offset)
        if offset != at:
            raise cursor.bad(f"{name[:120]!r} does not begin where the one before it ends", f"{at:,}", f"{offset:,}")
        if begin + offset + tensor.nbytes > cursor.size:
            raise cursor.bad(
                "the file ends before its tensors do",
                f"{begin + offset + tensor.nbytes:,} bytes or more, for {name[:120]!r}",
                f"{cursor.size:,} bytes",
                do="the download or copy was cut off: fetch it again",
            )
        found[name] = tensor
        at = padded(offset + tensor.nbytes, alignment)
    return found


def padded(at: int, alignment: int) -> int:
    """The next offset that is aligned."""
    return -(-at // alignment) * alignment
