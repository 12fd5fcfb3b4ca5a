"""What a pickle turns into when it is read as data (`dconv.checkpoint.inert`): plain values, and these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from dconv.errors import Damaged
from dconv.sharding.parsed import is_dict

#: Of containers in each other; a real file nests some ten deep.
_MAX_DEPTH: Final = 200


@dataclass(frozen=True, slots=True)
class Symbol:
    """The name of a class or function. Nothing was imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True)
class DTypeRef:
    """A torch dtype, by dconv's short name."""

    name: str


@dataclass(frozen=True, slots=True)
class StorageRef:
    """The bytes behind tensors: record ``key`` of the container, ``numel`` elements of ``dtype``.

    ``dtype`` is dconv's short name, or torch's own where dconv has none (``ComplexDouble``).
    """

    dtype: str
    key: str
    numel: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A strided view of a storage, not yet checked against its size; offset and strides in elements."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str


class Record:
    """What a file wanted to build: ``symbol(*args)``, its state, the list or dict entries it put in.

    Compared and hashed by identity, so that a hostile tree costs nothing as a dict key.
    """

    __slots__ = ("args", "items", "state", "symbol")

    def __init__(self, symbol: Symbol, args: tuple[Any, ...]) -> None:
        self.symbol = symbol
        self.args = args
        self.state: Node = None
        self.items: list[object] = []

    @property
    def fields(self) -> dict[str, Any]:
        """Attributes by name; empty where the state is no mapping."""
        state = self.state
        if isinstance(state, dict):
            return state
        if isinstance(state, tuple) and len(state) == 2:  # (__dict__, __slots__)
            return {k: v for part in state if is_dict(part) for k, v in part.items()}
        return {}

    def __repr__(self) -> str:
        # members of an enum and paths are read off this; nested arguments may be huge
        args = (repr(a) if isinstance(a, int | float | str) else "..." for a in self.args[:8])
        return f"{self.symbol}({', '.join(args)})"


#: Whatever a tree is made of. What containers hold is of these again.
Node: TypeAlias = (
    dict[Any, Any] | list[Any] | tuple[Any, ...] | set[Any] | frozenset[Any] | str | bytes | bytearray | int | float
    | Record | TensorRef | StorageRef | DTypeRef | Symbol | None
)  # fmt: skip


class OrderedMap(dict[Any, Any]):
    """A dict that drops the attributes (torch's ``_metadata``) with which an ``OrderedDict`` may come."""

    __slots__ = ()


def bounded(tree: Node, *, where: str, nodes: int = 4_000_000) -> None:
    """Make sure that a recursion over ``tree`` ends soon: a list may hold itself, or another one twice.

    Raises:
        Damaged: more than ``nodes`` values on the way, or nested deeper than any.
    """
    todo: list[Any] = [iter((tree,))]
    while todo:
        node: Node = next(todo[-1], todo)
        if node is todo:
            todo.pop()
            continue
        nodes -= 1
        if isinstance(node, dict):
            todo.append(iter([*node.keys(), *node.values()]))
        elif isinstance(node, list | tuple | set | frozenset):
            todo.append(iter(node))
        elif type(node) is Record:
            todo.append(iter((node.args, node.state, node.items)))
        if nodes < 0 or len(todo) > _MAX_DEPTH:
            raise Damaged("a pickle nested without end", where=where)
