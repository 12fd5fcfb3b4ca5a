"""The safetensors container: total validation of headers, and files laid out before a byte of data is known.

Source: the safetensors format description and its reference implementation (``safetensors/src/tensor.rs``): 8 bytes
of header length, a JSON header, then the tensors without a gap up to the end of the file.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, TypeGuard

from dconv.checkpoint.files import check_tensor_name, parse_json, read_whole, stamp
from dconv.errors import Damaged, Refused, StorageFault
from dconv.sharding.dtypes import FROM_SAFETENSORS, ITEMSIZE, TO_SAFETENSORS
from dconv.sharding.parsed import Json, mapping_or_empty
from dconv.sharding.region import Region, row_major
from dconv.sharding.tensor import Extent, Stored, TensorSpec

#: The reference implementation's own limit.
_MAX_HEADER: Final = 100_000_000
#: A model of 10^5 experts has as many in all of its files.
_MOST_TENSORS: Final = 1_000_000
#: Dtypes of safetensors 0.8.0 that nothing here reads, and their bits.
_UNREAD: Final = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}


def read_header(path: Path) -> dict[str, Stored]:
    """All tensors of one file, in file order; the extents' ``file`` is the file's own name.

    Raises:
        Damaged: a header with which the reference implementation would read other bytes, or none.
        Refused: a dtype that the reference implementation knows, and dconv does not.
    """
    size = stamp(path).size
    data = _header_bytes(path, size)
    begin = 8 + len(data)
    header = _parsed(data, path)
    about: Json = header.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise _bad(path, "__metadata__", "texts by name", repr(about)[:80])
    stored: list[tuple[int, int, Stored]] = []
    for name, entry in header.items():
        check_tensor_name(name, said_by=path)
        spec, first, last = _entry(path, name, entry)
        strides = row_major(spec.shape, ITEMSIZE[spec.dtype])
        extent = Extent(Region.whole(spec.shape), path.name, begin + first, strides)
        stored.append((first, last, Stored(spec, (extent,))))
    stored.sort(key=lambda item: item[:2])
    at = 0
    for first, last, tensor in stored:
        if first != at:
            raise _bad(path, tensor.spec.name, "data without gap or overlap", f"starts at {first}, expected {at}")
        at = last
    if begin + at != size:
        raise Damaged(
            "a safetensors file is not as long as its header says",
            where=str(path),
            expected=f"{begin + at} bytes",
            found=f"{size} bytes",
            do="the download or copy was cut off: fetch it again" if size < begin + at else "",
        )
    return {tensor.spec.name: tensor for _, _, tensor in stored}


def framework(path: Path) -> str:
    """Whose tensors a file says that it holds (``pt``, ``mlx``); "" where it does not.

    Raises:
        Damaged: see `read_header`.
    """
    header = _parsed(_header_bytes(path, stamp(path).size), path)
    return str(mapping_or_empty(header.get("__metadata__")).get("format", ""))


def _parsed(data: bytes, path: Path) -> dict[str, Any]:
    if data.count(b'"data_offsets"') > _MOST_TENSORS:
        raise Damaged(
            "a safetensors header holds more tensors than any", where=str(path), expected=f"at most {_MOST_TENSORS:,}"
        )
    return parse_json(data, where=str(path), what="the safetensors header")


def _header_bytes(path: Path, size: int) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            head = read_whole(fd, 8, 0)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise Damaged(
                    "not a safetensors file, or cut off inside its header",
                    where=str(path),
                    expected=f"a header of 2 to {min(_MAX_HEADER, max(size - 8, 2))} bytes",
                    found=f"header length {length}, file of {size} bytes",
                )
            return read_whole(fd, length, 8)
        finally:
            os.close(fd)
    except OSError as fault:
        raise StorageFault(f"cannot read: {fault.strerror}", where=str(path)) from fault


def _entry(path: Path, name: str, entry: Json) -> tuple[TensorSpec, int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, name, "dtype, shape and data_offsets", repr(entry)[:80])
    said = str(entry["dtype"])
    if said not in FROM_SAFETENSORS and said not in _UNREAD:
        raise _bad(path, name, "a dtype among " + " ".join(FROM_SAFETENSORS), repr(entry["dtype"])[:40])
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(path, name, "a shape and two ordered offsets", f"{shape!r:.60} {offsets!r:.60}")
    bits = math.prod(shape) * (_UNREAD[said] if said in _UNREAD else 8 * ITEMSIZE[FROM_SAFETENSORS[said]])
    if 8 * (offsets[1] - offsets[0]) != bits:
        needed = f"{bits} bits" if bits % 8 else f"{bits // 8} bytes"
        raise _bad(path, name, f"{needed} for shape {shape}", f"{offsets[1] - offsets[0]} bytes")
    if said in _UNREAD:
        raise Refused("a dtype that this version does not read, nothing was written", where=f"{name[:120]} in {path}",
                      expected=" ".join(FROM_SAFETENSORS), found=said)  # fmt: skip
    return TensorSpec(name, tuple(shape), FROM_SAFETENSORS[said]), offsets[0], offsets[1]


def _naturals(value: Json) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= 32
        and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63 for n in value)
    )


def _bad(path: Path, name: str, expected: str, found: str) -> Damaged:
    return Damaged("a safetensors header is broken", where=f"{name[:200]} in {path}", expected=expected, found=found)


def lay_out(specs: Sequence[TensorSpec], framework: str = "pt") -> tuple[int, bytes, list[int]]:
    """Lay out one file: (file size, its first bytes, byte offset of each tensor).

    Args:
        specs: the tensors, in the order to write them.
        framework: whose tensors they are; without it transformers refuses the file.
    """
    header: dict[str, object] = {"__metadata__": {"format": framework}}
    at = 0
    offsets: list[int] = []
    for spec in specs:
        header[spec.name] = {
            "dtype": TO_SAFETENSORS[spec.dtype],
            "shape": list(spec.file_shape),
            "data_offsets": [at, at + spec.nbytes],
        }
        offsets.append(at)
        at += spec.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % 64)  # aligned tensors can be mapped and used in place
    first = struct.pack("<Q", len(text)) + text
    return len(first) + at, first, [len(first) + offset for offset in offsets]


def by_size(specs: Iterable[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """Deal tensors, in order, to files of at most ``limit`` bytes (a larger tensor gets a file of its own)."""
    files: list[list[TensorSpec]] = []
    room = 0
    for spec in specs:
        if not files or spec.nbytes > room:
            files.append([])
            room = limit
        files[-1].append(spec)
        room -= spec.nbytes
    return files or [[]]
