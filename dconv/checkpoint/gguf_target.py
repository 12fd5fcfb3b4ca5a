"""GGUF files to be written: header, metadata and tensors laid out beforehand, in one file or several.

Source of the layout: ``docs/gguf.md`` of ggml, and of a split set ``tools/gguf-split`` of llama.cpp: the first file has
all metadata, every file says which one it is, of how many.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dconv.checkpoint.gguf_header import ALIGNMENT, ARRAY, FORMS, MAGIC, TEXT, TYPES, padded
from dconv.checkpoint.source import seal
from dconv.coded.gguf_encode import Stored
from dconv.sharding.parsed import is_list_or_tuple
from dconv.sharding.plan import Target, TargetFile, TargetTensor
from dconv.sharding.tensor import Slot

_VERSION: Final = 3
_NUMBER_OF: Final = {name: number for number, name in TYPES.items()}
#: What a value of Python is written as (``GGUFWriter`` of the package gguf): whole numbers are 32 bits, those of arrays
#: with a sign.
_U16, _U32, _I32, _F32, _BOOL = 2, 4, 5, 6, 7


@dataclass(frozen=True, slots=True)
class Typed:
    """A whole number of a type of its own."""

    kind: int
    value: int


@dataclass(frozen=True, slots=True)
class Raw:
    """A value as a file has it, its type first."""

    data: bytes


def lay_out(
    name: str,
    tensors: Sequence[Stored],
    tables: Mapping[str, Sequence[float]],
    values: Mapping[str, Any],
    *,
    split: int | None,
    left_out: dict[str, str],
) -> Target:
    """A directory with one file, or with a set of them.

    Args:
        name: of the file, without its ending.
        tensors: the others, under their names, in the order to write them.
        tables: small tensors of fp32 by name; they come first.
        values: the metadata.
        split: bytes of tensors in a file, at most (one at least); None writes one file.
        left_out: stored tensors that are not written, each with the reason.
    """
    entries: list[tuple[str, str, tuple[int, ...]]] = [
        *((table, "F32", (len(numbers),)) for table, numbers in tables.items()),
        *((tensor.spec.name, tensor.kind, tensor.shape) for tensor in tensors),
    ]
    data = [struct.pack(f"<{len(numbers)}f", *numbers) for numbers in tables.values()]
    sizes = [*map(len, data), *(tensor.spec.nbytes for tensor in tensors)]
    files: list[TargetFile] = []
    placed: list[TargetTensor] = []
    parts = _parts(sizes, split)
    for number, part in enumerate(parts):
        said = dict(values) if number == 0 else {}
        file = f"{name}.gguf"
        if len(parts) > 1:
            file = f"{name}-{number + 1:05d}-of-{len(parts):05d}.gguf"
            said |= {
                "split.no": Typed(_U16, number),
                "split.count": Typed(_U16, len(parts)),
                "split.tensors.count": Typed(_I32, len(entries)),
            }
        offsets: list[int] = []
        at = 0
        for index in part:
            offsets.append(at)
            at = padded(at + sizes[index], ALIGNMENT)
        header = _header(said, [(*entries[index], offset) for index, offset in zip(part, offsets, strict=True)])
        begin = padded(len(header), ALIGNMENT)
        literals = [(0, header + bytes(begin - len(header)))]
        for index, offset in zip(part, offsets, strict=True):
            end = offset + sizes[index]
            gap = padded(end, ALIGNMENT) - end
            if index < len(data):
                literals.append((begin + offset, data[index] + bytes(gap)))
                continue
            if gap:
                literals.append((begin + end, bytes(gap)))
            spec = tensors[index - len(data)].spec
            placed.append(TargetTensor(spec.name, file, begin + offset, spec, (Slot.whole(spec.name, spec.shape),)))
        files.append(TargetFile(file, begin + at, tuple(literals)))
    return Target(tuple(files), tuple(placed), tuple, seal(None, {}), left_out=left_out)


def _parts(sizes: Sequence[int], split: int | None) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    held = 0
    for index, nbytes in enumerate(sizes):
        if split is not None and parts[-1] and held + nbytes > split:
            parts.append([])
            held = 0
        parts[-1].append(index)
        held += nbytes
    return parts


def _header(values: Mapping[str, Any], tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    infos = list(tensors)
    parts = [MAGIC, struct.pack("<IQQ", _VERSION, len(infos), len(values))]
    for key, value in values.items():
        parts += [_text(key), packed(value)]
    for name, kind, shape, offset in infos:
        parts += [_text(name), struct.pack("<I", len(shape)), struct.pack(f"<{len(shape)}Q", *reversed(shape)),
                  struct.pack("<IQ", _NUMBER_OF[kind], offset)]  # fmt: skip
    return b"".join(parts)


def _text(text: str | bytes) -> bytes:
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def packed(value: Any) -> bytes:
    """A value of the metadata with its type before it."""
    if isinstance(value, Raw):
        return value.data
    if isinstance(value, Typed):
        return struct.pack("<I" + FORMS[value.kind], value.kind, value.value)
    if isinstance(value, str | bytes):
        return struct.pack("<I", TEXT) + _text(value)
    if is_list_or_tuple(value):
        if isinstance(value[0], str | bytes):
            return struct.pack("<IIQ", ARRAY, TEXT, len(value)) + b"".join(map(_text, value))
        kind = _kind(value[0], _I32)
        return struct.pack(f"<IIQ{len(value)}{FORMS[kind]}", ARRAY, kind, len(value), *value)
    kind = _kind(value, _U32)
    return struct.pack("<I" + FORMS[kind], kind, value)


def _kind(value: object, whole: int) -> int:
    return _BOOL if isinstance(value, bool) else _F32 if isinstance(value, float) else whole
