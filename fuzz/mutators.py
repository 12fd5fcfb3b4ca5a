"""Changes that keep an input's form, so that what lies behind the first check of its form is reached too.

A mutator takes the bytes, how long they may become, a seed, and libFuzzer's own mutation of bytes.
"""

from __future__ import annotations

import json
import pickletools
import struct
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from random import Random
from typing import Any

#: libFuzzer's own: bytes, and how long they may become.
Raw = Callable[[bytes, int], bytes]
Mutator = Callable[[bytes, int, int, Raw], bytes]

_NUMBERS: tuple[Any, ...] = (
    -1, 0, 1, 2, 3, 4, 7, 8, 16, 61, 64, 255, 256, 4096, 65536, (1 << 31) - 1, 1 << 31, 1 << 32, 10**9, 1 << 53,
    (1 << 63) - 1, 1 << 63, 1 << 64, -(1 << 63), 10**30, 10**400, 0.0, -0.0, 0.5, 1.0, 1e-300, 1e308, float("inf"),
    float("-inf"), float("nan"),
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    "",
    "x",
    "0",
    "1",
    [],
    {},
    [None],
    [[]],
    {"": None},
    "\ud800",
    "\0",
    "../x",
)


def in_json(words: Sequence[str] = ()) -> Mutator:
    """Values and keys of a JSON text.

    Args:
        words: that mean something to who reads it.
    """

    def mutate(data: bytes, most: int, seed: int, raw: Raw) -> bytes:
        draw = Random(seed)  # noqa: S311 - no secret
        try:
            tree = json.loads(data)
        except (ValueError, RecursionError):
            return raw(data, most)
        if draw.random() < 0.05:
            return raw(data, most)
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            tree = _changed(tree, draw, words, raw)
        try:
            made = json.dumps(tree).encode()
        except (ValueError, RecursionError):
            return raw(data, most)
        return made if len(made) <= most else data[:most]

    return mutate


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a tree with each of its keys."""
    todo = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, dict):
            yield from ((node, key) for key in node)
            todo += node.values()
        elif isinstance(node, list):
            yield from ((node, at) for at in range(len(node)))
            todo += node


def _changed(tree: Any, draw: Random, words: Sequence[str], raw: Raw) -> Any:
    places = list(_places(tree))
    if not places:
        return _value(tree, draw, words, raw)
    holder, key = draw.choice(places)
    what = draw.randrange(8)
    if what < 4:
        holder[key] = _value(holder[key], draw, words, raw)
    elif what == 4:
        del holder[key]
    elif what == 5:
        other, at = draw.choice(places)
        if at in other if isinstance(other, dict) else at < len(other):
            holder[key] = deepcopy(other[at])
    elif isinstance(holder, dict):
        name = draw.choice(words) if words and draw.random() < 0.7 else draw.choice([str(k) for _, k in places])
        holder[name] = holder.pop(key) if what == 6 else _value(holder[key], draw, words, raw)
    else:
        holder.insert(key, _value(holder[key], draw, words, raw))
    return tree


def _value(old: Any, draw: Random, words: Sequence[str], raw: Raw) -> Any:
    what = draw.randrange(8)
    if isinstance(old, bool) and what < 3:
        return not old
    if isinstance(old, int) and what < 3:
        return draw.choice((old + 1, old - 1, old * 2, old // 2, -old, float(old) if abs(old) < 1 << 60 else 1.5))
    if isinstance(old, str) and what < 3:
        return raw(old.encode("utf-8", "surrogatepass"), len(old) + 16).decode("utf-8", "replace")
    if what < 5:
        return draw.choice(_NUMBERS)
    if what == 5 and words:
        return draw.choice(words)
    return deepcopy(draw.choice((*_VALUES, [old, [old]], {"x": old})))  # what is drawn is changed in place later


def in_pickle(words: Sequence[str] = ()) -> Mutator:
    """Opcodes of a pickle: left out, doubled, exchanged, with other numbers and other texts."""

    def mutate(data: bytes, most: int, seed: int, raw: Raw) -> bytes:
        draw = Random(seed)  # noqa: S311 - no secret
        spans = _spans(data)
        if len(spans) < 3 or draw.random() < 0.2:
            return raw(data, most)
        for _ in range(draw.choice((1, 1, 2, 4))):
            at = draw.randrange(len(spans))
            name, arg, _ = spans[at]
            what = draw.randrange(6)
            if isinstance(arg, int) and "GET" not in name and "PUT" not in name and what < 3:
                spans[at] = ("LONG1", 0, _number(draw.choice(_NUMBERS)))
            elif isinstance(arg, str) and "UNICODE" in name and what < 3:
                texts = [it for kind, it, _ in spans if "UNICODE" in kind]
                spans[at] = (name, arg, _unicode(draw.choice(words) if words and what else draw.choice(texts)))
            elif isinstance(arg, str) and name == "GLOBAL" and what < 3:
                spans[at] = (name, arg, draw.choice([it for kind, _, it in spans if kind == name]))
            elif what == 3:
                del spans[at]
            elif what == 4:
                spans.insert(draw.randrange(len(spans)), spans[at])
            elif what == 5:
                other = draw.randrange(len(spans))
                spans[at], spans[other] = spans[other], spans[at]
            else:
                spans[at] = (
                    name,
                    arg,
                    draw.choice((b"N", b"\x88", b")", b"]", b"}", b"(", b"t", b"R", b"b", b"K\x01")),
                )
            if not spans:
                return raw(data, most)
        made = b"".join(span for _, _, span in spans)
        return made if len(made) <= most else data[:most]

    return mutate


def _spans(data: bytes) -> list[tuple[str, Any, bytes]]:
    """Name, argument and bytes of each opcode, up to one that none is."""
    found: list[tuple[str, Any, int]] = []
    try:
        for op, arg, at in pickletools.genops(data):
            found.append((op.name, arg, at or 0))
    except Exception:  # noqa: S110 - of a library, on what a fuzzer made; what came before is kept
        pass
    ends = [*(at for _, _, at in found[1:]), len(data)]
    return [(name, arg, data[at:end]) for (name, arg, at), end in zip(found, ends, strict=False)]


def _number(value: Any) -> bytes:
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True) if size < 256 else b"N"


def _unicode(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def in_protobuf(data: bytes, most: int, seed: int, raw: Raw) -> bytes:
    """Fields of a message of Protocol Buffers, whose lengths stay right."""
    draw = Random(seed)  # noqa: S311 - no secret
    fields = _fields(data)
    if not fields or draw.random() < 0.1:
        return raw(data, most)
    made = _joined(_mutated(fields, draw, raw))
    return made if len(made) <= most else data[:most]


_Field = tuple[int, int, Any]


def _mutated(fields: list[_Field], draw: Random, raw: Raw) -> list[_Field]:
    at = draw.randrange(len(fields))
    number, kind, value = fields[at]
    inner = _fields(value) if kind == 2 else None
    what = draw.randrange(10)
    if inner and what < 6:
        fields[at] = (number, kind, _joined(_mutated(inner, draw, raw)))
    elif what == 6:
        del fields[at]
    elif what == 7:
        fields.insert(draw.randrange(len(fields)), fields[at])
    elif what == 8:
        fields[at] = (draw.choice((1, 2, 3, 5, 7, 8, 9, 13, 14, number)), kind, value)
    elif kind == 0:
        fields[at] = (number, kind, draw.choice([it for it in _NUMBERS if type(it) is int]) % (1 << 64))
    else:
        fields[at] = (number, kind, raw(value, len(value) + 16))
    return fields


def _fields(data: bytes) -> list[_Field] | None:
    found: list[_Field] = []
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            found.append((number, kind, value))
            continue
        length, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}.get(kind, -1), at)
        if length < 0 or at + length > len(data) or not number:
            return None
        found.append((number, kind, data[at : at + length]))
        at += length
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    found = shift = 0
    while at < len(data):
        found |= (data[at] & 127) << shift
        shift += 7
        at += 1
        if data[at - 1] < 128:
            return found, at
    return -1, at


def _joined(fields: list[_Field]) -> bytes:
    parts = []
    for number, kind, value in fields:
        parts.append(as_varint(number << 3 | kind))
        parts.append(as_varint(value) if kind == 0 else (as_varint(len(value)) if kind == 2 else b"") + value)
    return b"".join(parts)


def as_varint(value: int) -> bytes:
    made = bytearray()
    value %= 1 << 64
    while value > 127:
        made.append(value & 127 | 128)
        value >>= 7
    return bytes([*made, value])


def behind_length(inner: Mutator) -> Mutator:
    """A safetensors file: eight bytes of length that stay right, a header that ``inner`` changes, and the rest."""

    def mutate(data: bytes, most: int, seed: int, raw: Raw) -> bytes:
        length = int.from_bytes(data[:8], "little")
        if seed % 8 == 0 or not 2 <= length <= len(data) - 8:
            return raw(data, most)
        header = inner(data[8 : 8 + length], max(most - 8, 2), seed, raw)
        return (struct.pack("<Q", len(header)) + header + data[8 + length :])[:most]

    return mutate
