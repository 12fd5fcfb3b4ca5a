"""ONNX graphs read: which weights a file has, where each lies in it or beside it; no package is needed.

A graph is no checkpoint: weights are turned, joined and folded as its operations take them, under names that the tracer
chose. So it is looked at, run, and written anew as a graph, and nothing else is made of it.

Source: ``onnx.proto`` of ONNX 1.23 (numbers of fields), its ExternalData document, and Protocol Buffers' encoding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO, Final

from dconv.arch.family import Family
from dconv.arch.layouts import Facts
from dconv.checkpoint.files import check_plain_name, listed, read_json, stamp
from dconv.checkpoint.rename import AS_STORED, Renaming
from dconv.checkpoint.signs import ONNX
from dconv.checkpoint.source import Located, Source, side_files
from dconv.errors import Damaged, Refused, StorageFault
from dconv.sharding.dtypes import ITEMSIZE
from dconv.sharding.region import Index, Region, row_major
from dconv.sharding.tensor import Extent, FileStamp, Stored, TensorSpec

#: ``TensorProto.DataType`` -> dconv's name.
DTYPES: Final = {
    1: "f32", 2: "u8", 3: "i8", 4: "u16", 5: "i16", 6: "i32", 7: "i64", 9: "bool", 10: "f16", 11: "f64", 12: "u32",
    13: "u64", 16: "bf16",
}  # fmt: skip
_GRAPH, _INITIALIZER = 7, 5
_DIMS, _TYPE, _NAME, _RAW, _EXTERNAL, _LOCATION = 1, 2, 8, 9, 13, 14
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
#: How a weight's fields are encoded; of one that is a number the place is none.
_KINDS: Final = {_TYPE: _VARINT, _NAME: _BYTES, _RAW: _BYTES, _EXTERNAL: _BYTES, _LOCATION: _VARINT}
#: No name or list of a tensor is longer.
_LONGEST: Final = 1 << 20
#: torch's limit; ONNX has none, and the product of a million lengths takes minutes.
_MOST_AXES: Final = 64


@dataclass(frozen=True, slots=True)
class Initializer:
    """A weight of a graph.

    Attributes:
        dtype: dconv's name; "" for a type that it has none for.
        file: relative to the graph; "" where its numbers are fields of the message, which only ONNX's own reader reads.
        offset, nbytes: where its bytes lie there.
    """

    name: str
    shape: Index
    dtype: str
    file: str
    offset: int
    nbytes: int

    @property
    def plain(self) -> bool:
        """Whether its bytes lie somewhere as a plan reads them."""
        return bool(self.dtype and self.file)


def open_source(path: Path, *, rename: Renaming = AS_STORED) -> Source:
    """Describe a graph, or the graphs of a directory, by their weights.

    Raises:
        Damaged: a message that is broken, or a weight that lies outside its file.
    """
    del rename
    folder = path if path.is_dir() else path.parent
    graphs = listed(folder, f"*{ONNX}") if path.is_dir() else [path]
    files: dict[str, FileStamp] = {}
    tensors: dict[str, Stored] = {}
    for graph in graphs:
        files[graph.name] = stamp(graph)
        for one in initializers(graph):
            if one.file and one.file not in files:
                files[one.file] = stamp(folder / one.file)
            if one.plain:
                tensors[one.name] = stored(one, files[one.file].size, graph)
    config = folder / "config.json"
    return Source(
        format="onnx",
        root=folder,
        config=read_json(config, what=config.name) if config.exists() else None,
        args=None,
        side=side_files(folder),
        files=files,
        parallel=None,
        locate=_nowhere,
        lacks="a graph without a config.json beside it",
        stored_bytes=sum(tensor.spec.nbytes for tensor in tensors.values()),
        shapes={name: tensor.spec.shape for name, tensor in tensors.items()},
        tensors=tensors,
        fault=Refused(
            "a graph is no checkpoint: its weights are turned and joined as its operations take them, "
            "nothing was written",
            where=str(path),
            expected="FORMAT onnx (--opset, --dtype, --quant, --shard-size)",
            do="convert from the checkpoint that it was made of",
        ),
        stored=lambda: tensors.values(),
    )


def _nowhere(family: Family, facts: Facts) -> Located:
    del family, facts
    return Located({}, {}, {})


def stored(one: Initializer, size: int, graph: Path) -> Stored:
    """A weight with its place.

    Raises:
        Damaged: it is not as long as its shape says, or reaches past the end of its file.
    """
    spec = TensorSpec(one.name, one.shape, one.dtype)
    if one.nbytes != spec.nbytes or one.offset + one.nbytes > size:
        raise Damaged(
            "a weight does not lie where the graph says",
            where=f"{one.name} of {graph}",
            expected=f"{spec.nbytes:,} bytes inside {one.file} ({size:,} bytes)",
            found=f"{one.nbytes:,} bytes at {one.offset:,}",
        )
    extent = Extent(Region.whole(one.shape), one.file, one.offset, row_major(one.shape, ITEMSIZE[one.dtype]))
    return Stored(spec, (extent,))


def initializers(path: Path) -> list[Initializer]:
    """The weights of a file's main graph, in its order.

    Raises:
        Damaged: it is no message that ONNX writes.
    """
    found: list[Initializer] = []
    try:
        with path.open("rb") as file:
            end = os.fstat(file.fileno()).st_size
            for number, kind, graph in _fields(file, 0, end):
                if number == _GRAPH and kind == _BYTES:
                    for inner, how, place in _fields(file, *graph):
                        if inner == _INITIALIZER and how == _BYTES:
                            found.append(_initializer(file, path, *place))
    except OSError as fault:
        raise StorageFault(f"cannot read a graph: {fault.strerror}", where=str(path)) from fault
    except (ValueError, UnicodeDecodeError, OverflowError) as fault:
        raise Damaged("not a graph as ONNX writes it", where=str(path), found=str(fault)[:200]) from fault
    names = [one.name for one in found]
    if len(set(names)) != len(names):
        raise Damaged("a graph has two weights of one name", where=str(path))
    return found


def _initializer(file: BinaryIO, path: Path, begin: int, end: int) -> Initializer:
    shape: list[int] = []
    dtype, name, raw, outside = 0, "", None, False
    said: dict[str, str] = {}
    for number, kind, place in _fields(file, begin, end):
        if number == _DIMS and kind == _VARINT:
            shape.append(place[0])
        elif number == _DIMS and kind == _BYTES:
            shape += _varints(_text(file, *place))
        elif kind != _KINDS.get(number, kind):
            raise ValueError(f"field {number} of a weight in an encoding of kind {kind}")
        elif number == _TYPE:
            dtype = place[0]
        elif number == _NAME:
            name = _text(file, *place).decode()
        elif number == _RAW:
            raw = place
        elif number == _LOCATION:
            outside = place[0] == 1
        elif number == _EXTERNAL:
            pair = {n: _text(file, *p).decode() for n, k, p in _fields(file, *place) if k == _BYTES}
            said[pair.get(1, "")] = pair.get(2, "")
    if len(shape) > _MOST_AXES or any(length < 0 or length >= 1 << 48 for length in shape):
        raise ValueError(f"{name[:80]!r} has a shape that nothing has")
    short = DTYPES.get(dtype, "")
    size = prod(shape) * ITEMSIZE.get(short, 0)
    if outside:
        at, length = int(said.get("offset") or 0), int(said.get("length") or size)
        if at < 0 or length < 0:
            raise ValueError(f"{name[:80]!r} lies at {at}")
        return Initializer(name, tuple(shape), short, check_plain_name(said.get("location"), said_by=path), at, length)
    if raw is None:
        return Initializer(name, tuple(shape), short, "", 0, 0)
    return Initializer(name, tuple(shape), short, path.name, raw[0], raw[1] - raw[0])


def _fields(file: BinaryIO, begin: int, end: int) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """The fields of a message: number, kind of encoding, and its value, or where it begins and ends."""
    at = begin
    while at < end:
        key, at = _varint(file, at, end)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(file, at, end)
            yield number, kind, (value - (1 << 64) if value >> 63 else value, 0)
            continue
        if kind == _BYTES:
            length, at = _varint(file, at, end)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"an encoding of kind {kind} at byte {at}")
        if at + length > end:
            raise ValueError(f"a field at byte {at} reaches past its message")
        yield number, kind, (at, at + length)
        at += length


def _varint(file: BinaryIO, at: int, end: int) -> tuple[int, int]:
    file.seek(at)
    found = 0
    for i, byte in enumerate(file.read(min(10, end - at))):
        found |= (byte & 127) << 7 * i
        if byte < 128:
            return found & ((1 << 64) - 1), at + i + 1
    raise ValueError(f"a number at byte {at} has no end")


def _varints(data: bytes) -> list[int]:
    """Numbers one behind the other.

    Raises:
        ValueError: the last one has no end, or one is longer than 64 bits take.
    """
    found: list[int] = []
    value = shift = 0
    for byte in data:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            found.append(value)
            value = shift = 0
        elif shift >= 70:
            break
    if shift:
        raise ValueError("a number in a list has no end")
    return found


def _text(file: BinaryIO, begin: int, end: int) -> bytes:
    if end - begin > _LONGEST:
        raise ValueError(f"a text of {end - begin} bytes at byte {begin}")
    file.seek(begin)
    return file.read(end - begin)
