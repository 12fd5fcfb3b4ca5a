"""Read a pickle as data: nothing in it is imported, called or built except the plain types below.

Checkpoints of torch are pickles, and a pickle is a program. `load` runs it on a machine of its own whose only
verbs are "make a list", "make a dict", "note down this call": a class or function named by the file becomes a
`Symbol`, what the file wants done with it a `Record`. A name outside a closed list is refused.

It is no subclass of `pickle.Unpickler` on purpose: there a file can still make C code hash nested tuples (for
hours, or until the stack overflows), set attributes on what ``find_class`` gave out, and call ``__new__``.

Source of the opcodes: CPython's ``Lib/pickletools.py``. Protocols 2 to 5; torch never wrote 0 or 1.
"""

from __future__ import annotations

import gc
import struct
from collections.abc import Callable
from dataclasses import dataclass
from mmap import mmap
from typing import Any, Final, NoReturn

from dconv.errors import Damaged
from dconv.sharding.dtypes import FROM_TORCH

#: Longest pickle that is read, in bytes: a 1 M chunk ``.metadata`` takes about half.
MAX_BYTES: Final = 256 << 20
# One byte of pickle makes a container of up to 216 bytes: without a bound 256 MiB of input asks for 50 GB.
_MAX_CONTAINERS: Final = 16 << 20
# Tuples as keys hold a handful of numbers; hash() visits a nested one in full, shared parts again and again.
_MAX_KEY_NODES: Final = 1024


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

    def __init__(self, symbol: Symbol, args: tuple[Any, ...] = (), state: object = None) -> None:
        self.symbol = symbol
        self.args = args
        self.state = state
        self.items: list[object] = []

    @property
    def fields(self) -> dict[str, Any]:
        """Attributes by name; empty where the state is no mapping."""
        state = self.state
        if isinstance(state, dict):
            return state
        if isinstance(state, tuple) and len(state) == 2:  # (__dict__, __slots__)
            return {k: v for part in state if isinstance(part, dict) for k, v in part.items()}
        return {}

    def __repr__(self) -> str:
        # members of an enum and paths are read off this; nested arguments may be huge
        args = (repr(a) if isinstance(a, int | float | str) else "..." for a in self.args[:8])
        return f"{self.symbol}({', '.join(args)})"


class OrderedMap(dict[Any, Any]):
    """A dict that drops the attributes (torch's ``_metadata``) with which an ``OrderedDict`` may come."""

    __slots__ = ()


def load(data: bytes, *, where: str) -> Any:
    """The object in ``data``, made of plain Python values, `Record`, `Symbol`, `DTypeRef` and `TensorRef`.

    Args:
        data: one whole pickle, any protocol.
        where: file (and record) for messages.

    Raises:
        Damaged: foreign global, truncated, malformed, trailing bytes or too large.
    """
    machine = Machine(data, 0, where)
    value = machine.run()
    if machine.pos != len(data):
        found = f"{len(data) - machine.pos} bytes"
        raise Damaged("bytes after the end of a pickle", where=where, found=found)
    return value


def bounded(tree: object, *, where: str, nodes: int = 4_000_000, depth: int = 200) -> None:
    """Make sure that a recursion over ``tree`` ends soon: a list may hold itself, or another one twice.

    Raises:
        Damaged: more than ``nodes`` values on the way, or nested deeper than ``depth``.
    """
    todo = [iter((tree,))]
    while todo:
        node = next(todo[-1], todo)
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
        if nodes < 0 or len(todo) > depth:
            raise Damaged("a pickle nested without end", where=where)


class Machine:
    """Runs the one pickle at ``start``. Afterwards ``pos`` is its end, ``storages`` what it referred to."""

    def __init__(self, data: bytes | mmap, start: int, where: str) -> None:
        self.data = data
        self.pos = start
        self.where = where
        self.limit = min(len(data), start + MAX_BYTES)
        self.storages: dict[str, StorageRef] = {}
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._symbols: dict[tuple[str, str], Symbol | DTypeRef] = {}
        self._builders: dict[int, _Builder] = {}  # by id of a symbol: faster than hashing two strings
        # lists and strings that constructors copy; a real file copies each at most a few times
        self._copies = 4 * (self.limit - start) + 65536

    def run(self) -> Any:
        """The pickled value.

        Raises:
            Damaged: foreign global, truncated, malformed or too large.
        """
        collecting = gc.isenabled()
        gc.disable()  # millions of new containers, none of them garbage: the collector takes half the time
        try:
            return self._run()
        except _MALFORMED as error:
            found = f"{str(error) or type(error).__name__}, near byte {self.pos}"
            raise Damaged("a pickle that cannot be read", where=self.where, found=found) from None
        finally:
            if collecting:
                gc.enable()

    def bad(self, found: str) -> NoReturn:
        """Give up on this pickle; `run` adds the place."""
        raise ValueError(found)

    def _run(self) -> Any:
        """The opcodes that make up nearly all of a real file, most frequent first; `_rare` has the others."""
        data, limit, memo, builders = self.data, self.limit, self._memo, self._builders
        stack, pos = self._stack, self.pos
        containers = _MAX_CONTAINERS
        while True:
            self.pos = pos
            if pos >= limit:
                self.bad("no end" if limit == len(data) else f"longer than {MAX_BYTES >> 20} MiB")
            op = data[pos]
            pos += 1
            if op == 0x94:  # MEMOIZE
                memo[len(memo)] = stack[-1]
            elif op == 0x68:  # BINGET
                stack.append(memo[data[pos]])
                pos += 1
            elif op == 0x71:  # BINPUT
                memo[data[pos]] = stack[-1]
                pos += 1
            elif op == 0x4B:  # BININT1
                stack.append(data[pos])
                pos += 1
            elif op == 0x6A:  # LONG_BINGET
                stack.append(memo[_U32.unpack_from(data, pos)[0]])
                pos += 4
            elif op == 0x72:  # LONG_BINPUT
                memo[_U32.unpack_from(data, pos)[0]] = stack[-1]
                pos += 4
            elif op == 0x85:  # TUPLE1
                stack[-1] = (stack[-1],)
            elif op == 0x86:  # TUPLE2
                stack[-2:] = [(stack[-2], stack[-1])]
            elif op == 0x87:  # TUPLE3
                stack[-3:] = [(stack[-3], stack[-2], stack[-1])]
            elif op == 0x29:  # EMPTY_TUPLE
                stack.append(())
            elif op in (0x52, 0x81):  # REDUCE, NEWOBJ
                args = stack.pop()
                symbol = stack[-1]
                if type(symbol) is not Symbol or type(args) is not tuple:
                    self.bad("a call of something that is no global")
                builder = builders.get(id(symbol))
                stack[-1] = Record(symbol, args) if builder is None else builder(self, symbol, args)
            elif op == 0x28:  # MARK
                containers -= 1
                self._marks.append(stack)
                stack = self._stack = []
            elif op == 0x75:  # SETITEMS
                items, stack = stack, self._marks.pop()
                self._stack = stack
                self._put(stack[-1], items)
            elif op == 0x74:  # TUPLE
                items, stack = tuple(stack), self._marks.pop()
                self._stack = stack
                stack.append(items)
            elif op == 0x62:  # BUILD
                state = stack.pop()
                self._build(stack[-1], state)
            elif op in (0x8C, 0x58):  # SHORT_BINUNICODE, BINUNICODE
                size, pos = (data[pos], pos + 1) if op == 0x8C else (_U32.unpack_from(data, pos)[0], pos + 4)
                if pos + size > limit:
                    self.bad("a string past the end")
                stack.append(str(data[pos : pos + size], "utf-8", "surrogatepass"))
                pos += size
            elif op == 0x4D:  # BININT2
                stack.append(_U16.unpack_from(data, pos)[0])
                pos += 2
            elif op == 0x4A:  # BININT
                stack.append(_I32.unpack_from(data, pos)[0])
                pos += 4
            elif op == 0x7D:  # EMPTY_DICT
                containers -= 1
                stack.append({})
            elif op == 0x5D:  # EMPTY_LIST
                containers -= 1
                stack.append([])
            elif op == 0x4E:  # NONE
                stack.append(None)
            elif op in (0x88, 0x89):  # NEWTRUE, NEWFALSE
                stack.append(op == 0x88)
            elif op == 0x51:  # BINPERSID
                stack[-1] = self._persistent(stack[-1])
            elif op == 0x2E:  # STOP
                self.pos = pos
                value = stack.pop()
                if stack or self._marks:
                    self.bad("values left over")
                return value
            else:
                containers -= 1
                self.pos = pos  # past the opcode, where its argument begins
                self._rare(op)
                stack, pos = self._stack, self.pos
            if containers < 0:
                self.bad(f"more than {_MAX_CONTAINERS} containers")

    def _rare(self, op: int) -> None:
        stack = self._stack
        match op:
            case 0x63:  # GLOBAL
                stack.append(self._global(self._line(), self._line()))
            case 0x93:  # STACK_GLOBAL
                name, module = stack.pop(), stack.pop()
                stack.append(self._global(module, name))
            case 0x80:  # PROTO
                if self._take(1)[0] > 5:
                    self.bad("an unknown protocol")
            case 0x95:  # FRAME: a hint for buffered readers
                self._take(8)
            case 0x61:  # APPEND
                self._extend(stack[-2], [stack.pop()])
            case 0x65 | 0x90:  # APPENDS, ADDITEMS
                items = self._pop_mark()
                self._extend(self._stack[-1], items)
            case 0x73:  # SETITEM
                value, key = stack.pop(), stack.pop()
                self._put(stack[-1], [key, value])
            case 0x47:  # BINFLOAT
                stack.append(struct.unpack(">d", self._take(8))[0])
            case 0x8A | 0x8B:  # LONG1, LONG4
                raw = self._take(self._number(1 if op == 0x8A else 4))
                stack.append(int.from_bytes(raw, "little", signed=True))
            case 0x8D:  # BINUNICODE8
                stack.append(str(self._take(self._number(8)), "utf-8", "surrogatepass"))
            case 0x43 | 0x42 | 0x8E | 0x96:  # SHORT_BINBYTES, BINBYTES, BINBYTES8, BYTEARRAY8
                raw = self._take(self._number({0x43: 1, 0x42: 4}.get(op, 8)))
                stack.append(bytearray(raw) if op == 0x96 else raw)
            case 0x55 | 0x54:  # SHORT_BINSTRING, BINSTRING: Python 2
                raw = self._take(self._number(1 if op == 0x55 else 4))
                stack.append(str(raw, "utf-8", "surrogateescape"))
            case 0x8F:  # EMPTY_SET
                stack.append(set())
            case 0x91:  # FROZENSET
                items = self._pop_mark()
                self._stack.append(frozenset(self._keys(items)))
            case 0x92:  # NEWOBJ_EX
                kwargs, args, symbol = stack.pop(), stack.pop(), stack.pop()
                stack.append(self._call(symbol, (*args, kwargs) if kwargs else args))
            case 0x30:  # POP
                _ = stack.pop() if stack else self._pop_mark()
            case 0x31:  # POP_MARK
                self._pop_mark()
            case 0x32:  # DUP
                stack.append(stack[-1])
            case _:  # protocols 0 and 1, extension registry, buffers out of band
                self.bad(f"opcode {op:#04x}")

    def _take(self, size: int) -> bytes:
        start, self.pos = self.pos, self.pos + size
        if size < 0 or self.pos > self.limit:
            self.bad("a value past the end")
        return self.data[start : self.pos]

    def _number(self, width: int) -> int:
        return int.from_bytes(self._take(width), "little")

    def _line(self) -> str:
        end = self.data.find(b"\n", self.pos, self.limit)
        return str(self._take(end - self.pos) + self._take(1)[:0], "utf-8")

    def _pop_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _global(self, module: object, name: object) -> Symbol | DTypeRef:
        known = self._symbols.get((module, name))  # type: ignore[arg-type]
        if known is not None:
            return known
        if not isinstance(module, str) or not isinstance(name, str):
            self.bad("a global whose name is no string")
        if not f"{module}.{name}".replace(".", "_").isidentifier():  # also keeps control characters off terminals
            self.bad("a global of odd name")
        if module in _PY2_MODULES:
            module, name = _PY2_MODULES[module], _PY2_NAMES.get(name, name)
        if module == "torch" and name in FROM_TORCH:
            return self._symbols.setdefault((module, name), DTypeRef(FROM_TORCH[name]))
        builder = _BUILDERS.get((module, name))
        if builder is None and not (module.partition(".")[0] in _ROOTS or name in _INERT_MODULES.get(module, ())):
            self.foreign(f"{module}.{name}")
        symbol = Symbol(module, name)
        self._symbols[module, name] = symbol
        if builder is not None:
            self._builders[id(symbol)] = builder
        return symbol

    def foreign(self, name: str) -> NoReturn:
        raise Damaged(
            "a pickle with a foreign global",
            where=self.where,
            expected="tensors, plain values, classes of torch and megatron",
            found=name[:200],
            do="do not load this file with torch either: loading would run that name",
        )

    def _call(self, symbol: object, args: object) -> Any:
        if not isinstance(symbol, Symbol) or not isinstance(args, tuple):
            self.bad("a call of something that is no global")
        builder = self._builders.get(id(symbol))
        return Record(symbol, args) if builder is None else builder(self, symbol, args)

    def _build(self, target: object, state: object) -> None:
        if type(target) is Record:
            target.state = state
        elif type(target) is not OrderedMap:
            self.bad(f"a state for a {type(target).__name__}")

    def _put(self, target: Any, items: list[Any]) -> None:
        """``target[items[0]] = items[1]`` and so on."""
        if len(items) % 2:
            self.bad("a key without a value")
        if type(target) is Record:
            target.items.extend(zip(items[::2], items[1::2], strict=True))
        elif isinstance(target, dict):
            target.update(zip(self._keys(items[::2]), items[1::2], strict=True))
        else:
            self.bad(f"entries for a {type(target).__name__}")

    def _extend(self, target: Any, items: list[Any]) -> None:
        if type(target) is list:
            target.extend(items)
        elif type(target) is set:
            target.update(self._keys(items))
        elif type(target) is Record:
            target.items.extend(items)
        else:
            self.bad(f"elements for a {type(target).__name__}")

    def _keys(self, keys: list[Any]) -> list[Any]:
        """The same keys, each cheap to hash and compare."""
        for key in keys:
            if type(key) is tuple or type(key) is frozenset:
                nodes, todo = 0, [key]
                while todo:
                    inner = todo.pop()
                    nodes += len(inner)
                    if nodes > _MAX_KEY_NODES:
                        self.bad("a key nested too deep or too long")
                    todo.extend(part for part in inner if type(part) is tuple or type(part) is frozenset)
        return keys

    def copied(self, size: int) -> None:
        """Account for a constructor that copies ``size`` elements."""
        self._copies -= size
        if self._copies < 0:
            self.bad("copies without end")

    def _persistent(self, pid: object) -> object:
        """torch's ``("storage", type, key, location, numel)``, in old files with a view (None) behind."""
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or any(pid[5:]):
            self.bad("a persistent id that is no storage")
        kind, key, _location, numel = pid[1:5]
        if not isinstance(kind, Symbol) or not kind.name.endswith("Storage") or type(key) is not str:
            self.bad("a storage of wrong form")
        if not _size(numel):
            self.bad("a storage of wrong size")
        dtype = STORAGE_DTYPES.get(kind.name, kind.name.replace("Storage", ""))
        ref = StorageRef(dtype, key, numel)
        self.storages.setdefault(key, ref)
        return ref


def _size(value: object) -> bool:
    return type(value) is int and value >= 0


def _sizes(value: object) -> tuple[int, ...]:
    """A tensor's shape, strides or offsets; torch allows 64 axes."""
    if not isinstance(value, tuple | list) or len(value) > 64 or not all(map(_size, value)):
        raise ValueError("a shape of wrong form")
    return tuple(value)


def _tensor(machine: Machine, _symbol: Symbol, args: tuple[Any, ...]) -> TensorRef:
    """``_rebuild_tensor(storage, offset, size, stride)``; v2 adds four arguments of no interest."""
    storage, offset, shape, stride = args[:4]
    if not isinstance(storage, StorageRef) or not _size(offset):
        machine.bad("a tensor of wrong form")
    return TensorRef(storage, offset, _sizes(shape), _sizes(stride), storage.dtype)


def _tensor_v3(machine: Machine, symbol: Symbol, args: tuple[Any, ...]) -> TensorRef:
    """``_rebuild_tensor_v3``: dtypes without a storage class of their own, over untyped storages."""
    plain = _tensor(machine, symbol, args)
    dtype = args[6]
    if not isinstance(dtype, DTypeRef | Symbol):
        machine.bad("a tensor of wrong form")
    return TensorRef(plain.storage, plain.offset, plain.shape, plain.stride, dtype.name)


def _parameter(_machine: Machine, _symbol: Symbol, args: tuple[Any, ...]) -> Any:
    return args[0]


def _from_type(machine: Machine, _symbol: Symbol, args: tuple[Any, ...]) -> Any:
    """``_rebuild_from_type_v2(function, class, args, state)``: a subclass, read as the tensor it wraps."""
    return machine._call(args[0], args[2])


def _reconstructor(machine: Machine, _symbol: Symbol, args: tuple[Any, ...]) -> Any:
    """``copyreg._reconstructor(class, base, state)``, how protocols 0 and 1 make an object."""
    kind, base, state = args
    return machine._call(kind, () if base == Symbol("builtins", "object") else (state,))


def _new(machine: Machine, _symbol: Symbol, args: tuple[Any, ...]) -> Any:
    return machine._call(args[0], args[1:])


def _shape(_machine: Machine, _symbol: Symbol, args: tuple[Any, ...]) -> tuple[int, ...]:
    return _sizes(args[0]) if args else ()


def _mapping(machine: Machine, symbol: Symbol, args: tuple[Any, ...]) -> dict[Any, Any]:
    """dict, OrderedDict and Counter of nothing, of a dict or of pairs; ``defaultdict(factory, ...)``."""
    if symbol.name == "defaultdict":
        args = args[1:]
    content = args[0] if args else ()
    if not _concrete(content):
        machine.bad("a dict of no pairs")
    machine.copied(len(content))
    pairs = list(content.items()) if isinstance(content, dict) else list(content)
    made: dict[Any, Any] = {} if symbol.module == "builtins" else OrderedMap()
    machine._put(made, [part for key, value in pairs for part in (key, value)])
    return made


def _concrete(value: object) -> bool:
    """Not a range: its elements cost the file nothing."""
    return isinstance(value, list | tuple | set | frozenset | dict)


def _collection(machine: Machine, symbol: Symbol, args: tuple[Any, ...]) -> Any:
    content = args[0] if args else ()
    if len(args) > 1 or not _concrete(content):
        machine.bad(f"a {symbol.name} of no elements")
    machine.copied(len(content))
    kind: Any = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[symbol.name]
    return kind(content if symbol.name in ("list", "tuple") else machine._keys(list(content)))


def _text(machine: Machine, symbol: Symbol, args: tuple[Any, ...]) -> Any:
    """str, bytes, bytearray and ``_codecs.encode`` of text; bytes of a number would ask for memory."""
    source = args[0] if args else b""
    encoding = args[1] if len(args) > 1 else "utf-8"
    if encoding not in ("latin1", "latin-1", "ascii", "utf-8"):  # others import a module by name
        machine.bad("an encoding of no use")
    if symbol.name == "str" and isinstance(source, int | float):
        return str(source)
    if isinstance(source, list) and symbol.name != "str":
        source = bytes(source)
    if not isinstance(source, str | bytes | bytearray):
        machine.bad(f"a {symbol.name} of {type(source).__name__}")
    machine.copied(len(source))
    if symbol.name == "str":
        return source if isinstance(source, str) else bytes(source).decode(encoding)
    raw = source.encode(encoding) if isinstance(source, str) else bytes(source)
    return bytearray(raw) if symbol.name == "bytearray" else raw


def _scalar(machine: Machine, symbol: Symbol, args: tuple[Any, ...]) -> Any:
    if not all(arg is None or isinstance(arg, int | float | str) for arg in args):
        machine.bad(f"a {symbol.name} of wrong form")
    kind: Any = {"int": int, "float": float, "bool": bool, "complex": complex, "slice": slice, "range": range}
    return kind[symbol.name](*args)


_Builder = Callable[[Machine, Symbol, tuple[Any, ...]], Any]


def _member(machine: Machine, symbol: Symbol, args: tuple[Any, ...]) -> Record:
    """``getattr(SomeEnum, "NAME")``, as Python 3.11.0 to 3.11.3 pickles an enum's member; noted down, not looked up."""
    plain = len(args) == 2 and type(args[0]) is Symbol and isinstance(args[1], str) and args[1].isidentifier()
    if not plain or args[1].startswith("_") or args[0].module == "builtins":
        machine.foreign(str(symbol))
    return Record(args[0], (args[1],))


_BUILDERS: Final[dict[tuple[str, str], _Builder]] = {
    ("builtins", "getattr"): _member,
    ("collections", "OrderedDict"): _mapping,
    ("collections", "defaultdict"): _mapping,
    ("collections", "Counter"): _mapping,
    ("builtins", "dict"): _mapping,
    **{("builtins", name): _collection for name in ("list", "tuple", "set", "frozenset")},
    **{("builtins", name): _text for name in ("str", "bytes", "bytearray")},
    **{("builtins", name): _scalar for name in ("int", "float", "bool", "complex", "slice", "range")},
    ("_codecs", "encode"): _text,
    ("copyreg", "_reconstructor"): _reconstructor,
    ("copyreg", "__newobj__"): _new,
    ("torch", "Size"): _shape,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
}

#: Packages whose classes may stand in a checkpoint under any name; they become a `Record`.
_ROOTS: Final = frozenset({"torch", "megatron", "transformer_engine", "omegaconf"})
_NUMPY = ("_reconstruct", "scalar")
#: Other names that real arguments and random states hold; also `Record`. From megatron/core/safe_globals.py,
#: pickles of ``np.random.get_state()`` and of DCP's ``StorageMeta``.
_INERT_MODULES: Final[dict[str, tuple[str, ...]]] = {
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
    "builtins": ("object",),
    "collections": ("deque",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath", "PurePath", "WindowsPath", "PureWindowsPath"),
    "signal": ("Signals", "Handlers"),
    "io": ("BytesIO",),
    "_io": ("BytesIO",),
    "datetime": ("timedelta", "datetime", "date"),
    "numpy": (
        "ndarray", "dtype", "bool_", "float16", "float32", "float64", "int8", "int16", "int32", "int64",
        "uint8", "uint16", "uint32", "uint64", "str_",
    ),
    "numpy.core.multiarray": _NUMPY,
    "numpy._core.multiarray": _NUMPY,
    "numpy.core.numeric": ("_frombuffer",),
    "numpy._core.numeric": ("_frombuffer",),
    "numpy.dtypes": ("UInt32DType", "UInt64DType", "Int64DType", "Float32DType", "Float64DType"),
}  # fmt: skip

#: What Python 2 called things; protocols 0 to 2 still write these names.
_PY2_MODULES: Final = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_PY2_NAMES: Final = {"xrange": "range", "unicode": "str", "long": "int"}

#: torch's typed storages -> dconv's short name; an untyped one counts bytes.
STORAGE_DTYPES: Final[dict[str, str]] = {
    "DoubleStorage": "f64", "FloatStorage": "f32", "HalfStorage": "f16", "BFloat16Storage": "bf16",
    "LongStorage": "i64", "IntStorage": "i32", "ShortStorage": "i16", "CharStorage": "i8",
    "ByteStorage": "u8", "BoolStorage": "bool", "ComplexFloatStorage": "c64", "UntypedStorage": "u8",
}  # fmt: skip

_U16, _U32, _I32 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<i")
# what opcodes and constructors raise on wrong operands; none of them runs code of the file
_MALFORMED: Final = (
    AttributeError, IndexError, KeyError, MemoryError, OverflowError, RecursionError, TypeError, ValueError,
    struct.error,
)  # fmt: skip
