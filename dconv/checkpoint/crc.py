"""The CRC-32 that ``torch.save`` puts beside each storage, compared with its bytes. torch itself never looks at it.

A checkpoint of somebody else's has no receipt: this is all there is that tells a weight from another that differs from
it by a bit. Containers without one (safetensors, GGUF, torch before 1.6) have nothing to compare.
"""

from __future__ import annotations

import zlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dconv.checkpoint import dcp, graphs, torchzip
from dconv.checkpoint.source import Source
from dconv.errors import Damaged, StorageFault, counted, group_names

_READ: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class Compared:
    """What was read and compared: storages of weights, and their bytes."""

    storages: int
    nbytes: int


def compare(source: Source) -> Compared | None:
    """Compare the storages that hold weights with their checksums; None where they have none.

    Raises:
        Damaged: some are not as they were saved; names the tensors in them.
        StorageFault: a file cannot be read.
    """
    return _compare(source.root, _records(source))


def compare_archive(archive: graphs.Archive) -> Compared | None:
    """The same of the weights of a graph that torch wrote; raises the same."""
    places = ((name, *archive.records[name]) for name in archive.weights())
    records = (
        (archive.path.name, [name], torchzip.Checksum(offset, nbytes, archive.crcs[name]))
        for name, offset, nbytes in places
        if offset is not None
    )
    return _compare(archive.path.parent, records)


def _compare(root: Path, records: Iterable[tuple[str, list[str], torchzip.Checksum]]) -> Compared | None:
    crcs: dict[tuple[str, int, int], int] = {}  # a hostile file may have a million directories of one storage
    wrong: dict[str, None] = {}
    for file, names, record in records:
        if record.crc:
            place = file, record.offset, record.nbytes
            if place not in crcs:
                crcs[place] = _crc(root / file, record)
            if crcs[place] != record.crc:
                wrong |= dict.fromkeys(f"{name} in {file}" for name in names)
    if wrong:
        many = len(wrong) > 1
        raise Damaged(
            f"{counted(len(wrong), 'tensor is', 'tensors are')} not as torch saved {'them' if many else 'it'}",
            where=f"{group_names(wrong)}\nin {root}",
            expected="bytes of the CRC-32 beside them",
            do="copy it again from where it was whole",
        )
    return Compared(len(crcs), sum(nbytes for _, _, nbytes in crcs)) if crcs else None


def _records(source: Source) -> Iterator[tuple[str, list[str], torchzip.Checksum]]:
    """Each record that holds weights: its file, the tensors in it, and what the zip says of it."""
    held: dict[str, list[tuple[int, str]]] = {}
    for stored in source.stored():
        for extent in stored.extents:
            held.setdefault(extent.file, []).append((extent.offset, stored.spec.name))
    for tensors in held.values():
        tensors.sort()
    for file, offset, length in _containers(source, held):
        if _within(held[file], offset, length):
            for record in torchzip.checksums(source.root / file, offset, length):
                if names := _within(held[file], record.offset, record.nbytes):
                    yield file, names, record


def _containers(source: Source, held: dict[str, list[tuple[int, str]]]) -> Iterator[tuple[str, int, int | None]]:
    """Each zip that may hold weights: its file, place and length (None: to the end)."""
    if source.format != "megatron torch_dist":
        yield from ((file, 0, None) for file in held)
        return
    for tensor in dcp.read_metadata(source.root).tensors.values():
        yield from ((chunk.file, chunk.offset, chunk.length) for chunk in tensor.chunks if chunk.file in held)


def _within(tensors: list[tuple[int, str]], offset: int, length: int | None) -> list[str]:
    """Names of those that begin in a stretch."""
    end = len(tensors) if length is None else bisect_left(tensors, (offset + length, ""))
    return [name for _, name in tensors[bisect_left(tensors, (offset, "")) : end]]


def _crc(path: Path, record: torchzip.Checksum) -> int:
    crc, left = 0, record.nbytes
    try:
        with open(path, "rb", buffering=0) as raw:
            raw.seek(record.offset)
            while left and (part := raw.read(min(left, _READ))):
                crc, left = zlib.crc32(part, crc), left - len(part)
    except OSError as fault:
        raise StorageFault(f"cannot read: {fault.strerror}", where=str(path)) from fault
    return crc
