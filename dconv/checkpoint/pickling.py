"""Write pickles without having the classes they name: torch's files without torch.

Protocol 2 and only the opcodes that ``torch.load(weights_only=True)`` takes.
The same tree always gives the same bytes. Source: torch/_weights_only_unpickler.py.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from dconv.sharding.dtypes import TO_TORCH

_NAME: Final = re.compile(r"[A-Za-z_][\w.]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function, imported by the reader of the pickle."""

    module: str
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Reduce:
    """``callable(*args)``, then its state."""

    callable: Global
    args: tuple[Any, ...]
    state: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class NewObj:
    """``cls.__new__(cls, *args)``, then its state (mostly its ``__dict__``)."""

    cls: Global
    args: tuple[Any, ...] = ()
    state: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class Persistent:
    """A persistent id; torch's means a storage."""

    id: tuple[Any, ...]


def namespace(mapping: Mapping[str, Any]) -> NewObj:
    """An ``argparse.Namespace``, the form of Megatron's ``args``."""
    return NewObj(Global("argparse", "Namespace"), (), dict(mapping))


def dtype(name: str) -> Global:
    """The torch dtype with dconv's short name ``name``."""
    return Global("torch", TO_TORCH[name])


def enum(module: str, name: str, value: int | str) -> Reduce:
    """The member of an enum class that has ``value``."""
    return Reduce(Global(module, name), (value,))


def dumps(tree: object, lower: Callable[[object], object] | None = None) -> bytes:
    """``tree`` as a pickle.

    Args:
        tree: None, bool, int, float, str, bytes, list, tuple, dict, set and the nodes above, nested. An
            object shared within the tree is written once for each place.
        lower: turns a node of any other type into one of these.

    Raises:
        TypeError: a node of another type and no ``lower``.
    """
    writer = _Writer(lower)
    writer.put(tree)
    return b"\x80\x02" + b"".join(writer.out) + b"."


#: ``type``, whose answer the type checker takes for one it knows.
_type_of: Final[Callable[[Any], type[Any]]] = type


class _Writer:
    def __init__(self, lower: Callable[[object], object] | None) -> None:
        self.out: list[bytes] = []
        self._lower = lower
        # by value, never by identity: only names and strings, which nothing can change after they are read
        self._memo: dict[Global | str, bytes] = {}

    def put(self, node: Any) -> None:
        out = self.out
        kind = _type_of(node)
        if kind is str or kind is Global:
            known = self._memo.get(node)
            if known is not None:
                out.append(known)
            else:
                out.append(_text(node) if kind is str else _global(node))
                self._remember(node)
        elif kind is int:
            out.append(_int(node))
        elif kind is tuple:
            self._tuple(node)
        elif kind is NewObj or kind is Reduce:
            self.put(node.cls if kind is NewObj else node.callable)
            self._tuple(node.args)
            out.append(b"\x81" if kind is NewObj else b"R")
            if node.state is not None:
                self.put(node.state)
                out.append(b"b")
        elif node is None:
            out.append(b"N")
        elif kind is bool:
            out.append(b"\x88" if node else b"\x89")
        elif kind is float:
            out.append(b"G" + struct.pack(">d", node))
        elif issubclass(kind, dict):
            out.append(b"}")
            if node:
                out.append(b"(")
                for key, value in node.items():
                    self.put(key)
                    self.put(value)
                out.append(b"u")
        elif issubclass(kind, list):
            out.append(b"]")
            if node:
                out.append(b"(")
                for item in node:
                    self.put(item)
                out.append(b"e")
        elif kind is bytes:  # protocol 2 has no bytes; this is how CPython writes them
            self.put(Reduce(_ENCODE, (node.decode("latin1"), "latin1")))
        elif kind is set:
            self.put(Reduce(_SET, (sorted(node, key=dumps),)))
        elif kind is Persistent:
            self.put(node.id)
            out.append(b"Q")
        elif self._lower is not None:
            self.put(self._lower(node))
        else:
            raise TypeError(f"no pickle form for {kind.__name__}")

    def _tuple(self, items: tuple[Any, ...]) -> None:
        if len(items) > 3:
            self.out.append(b"(")
        for item in items:
            self.put(item)
        self.out.append(_TUPLES[len(items)] if len(items) <= 3 else b"t")

    def _remember(self, node: Global | str) -> None:
        index = len(self._memo)
        short = index < 256
        self.out.append(b"q" + bytes([index]) if short else b"r" + struct.pack("<I", index))
        self._memo[node] = b"h" + bytes([index]) if short else b"j" + struct.pack("<I", index)


_ENCODE: Final = Global("_codecs", "encode")
_SET: Final = Global("__builtin__", "set")
_TUPLES: Final = (b")", b"\x85", b"\x86", b"\x87")


def _global(node: Global) -> bytes:
    if not _NAME.fullmatch(node.module) or not _NAME.fullmatch(node.name):
        raise ValueError(f"no name of a global: {node.module!r} {node.name!r}")
    return f"c{node.module}\n{node.name}\n".encode("ascii")


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def _int(number: int) -> bytes:
    if 0 <= number < 256:
        return b"K" + bytes([number])
    if 0 <= number < 65536:
        return b"M" + struct.pack("<H", number)
    if -(2**31) <= number < 2**31:
        return b"J" + struct.pack("<i", number)
    raw = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    if len(raw) > 255:
        raise ValueError("an integer of more than 255 bytes")
    return b"\x8a" + bytes([len(raw)]) + raw
