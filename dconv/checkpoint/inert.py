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
from mmap import mmap
from typing import Any, Final, NoReturn

from dconv.checkpoint.allowed import (
    INERT_MODULES,
    PY2_MODULES,
    PY2_NAMES,
    ROOTS,
    STORAGE_DTYPES,
    Builder,
    builder_of,
    is_size,
)
from dconv.checkpoint.pickled import DTypeRef, Node, OrderedMap, Record, StorageRef, Symbol
from dconv.errors import Damaged
from dconv.sharding.dtypes import FROM_TORCH

#: Longest pickle that is read, in bytes: a 1 M chunk ``.metadata`` takes about half.
MAX_BYTES: Final = 256 << 20
# One byte of pickle makes a container of up to 216 bytes: without a bound 256 MiB of input asks for 50 GB.
_MAX_CONTAINERS: Final = 16 << 20
# Other opcodes of one byte make up to 83; a 1 M chunk ``.metadata`` takes about half as many.
_MAX_STEPS: Final = 64 << 20
_MAX_MARKS: Final = 1 << 16  # each that is open is a list of its own; a real file nests some ten deep
# Tuples as keys hold a handful of numbers; hash() visits a nested one in full, shared parts again and again.
_MAX_KEY_NODES: Final = 1024
# hash() repeats above: larger keys could be made to collide
_MAX_KEY: Final = (1 << 61) - 1
# Of a call that makes something: one tuple may stand in many of them. The longest of a real file, a tensor's, has 7.
_MAX_ARGS: Final = 256
#: Bytes of a whole number; seeds of random states have 16, and printing thousands of digits is slow or refused.
_MAX_INT: Final = 64


def load(data: bytes, *, where: str) -> Any:
    """The object in ``data``, made of plain Python values, `Record`, `Symbol`, `DTypeRef` and `TensorRef`.

    Args:
        data: one whole pickle, of protocol 2 to 5.
        where: file (and record) for messages.

    Raises:
        Damaged: foreign global, truncated, malformed, trailing bytes or too large.
    """
    machine = Machine(data, 0, where)
    value = machine.run()
    if machine.pos != len(data):
        raise Damaged("bytes after the end of a pickle", where=where, found=f"{len(data) - machine.pos} bytes")
    return value


class Machine:
    """Runs the one pickle at ``start``. Afterwards ``pos`` is its end, ``storages`` what it referred to."""

    def __init__(self, data: bytes | mmap, start: int, where: str) -> None:
        self.data, self.pos, self.where = data, start, where
        self.limit = min(len(data), start + MAX_BYTES)
        self.storages: dict[str, StorageRef] = {}
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._symbols: dict[tuple[str, str], Symbol | DTypeRef] = {}
        self._builders: dict[int, Builder] = {}  # by id of a symbol: faster than hashing two strings
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
        containers, steps = _MAX_CONTAINERS, _MAX_STEPS
        while True:
            self.pos = pos
            steps -= 1
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
                stack[-1:] = [(stack[-1],)]
            elif op == 0x86:  # TUPLE2
                stack[-2:] = [(stack[-2], stack[-1])]
            elif op == 0x87:  # TUPLE3
                stack[-3:] = [(stack[-3], stack[-2], stack[-1])]
            elif op == 0x29:  # EMPTY_TUPLE
                stack.append(())
            elif op in (0x52, 0x81):  # REDUCE, NEWOBJ
                args: Node = stack.pop()
                symbol: Node = stack[-1]
                if type(symbol) is not Symbol or type(args) is not tuple:
                    self.bad("a call of something that is no global")
                builder = builders.get(id(symbol))
                stack[-1] = Record(symbol, args) if builder is None else self._made(builder, symbol, args)
            elif op == 0x28:  # MARK
                containers -= 1
                if len(self._marks) == _MAX_MARKS:
                    self.bad("more marks than any nesting has: containers without end")
                self._marks.append(stack)
                stack = self._stack = []
            elif op == 0x75:  # SETITEMS
                items, stack = stack, self._marks.pop()
                self._stack = stack
                self.put(stack[-1], items)
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
            if containers < 0 or steps < 0:
                self.bad(f"more than {_MAX_CONTAINERS} containers or {_MAX_STEPS} steps")

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
                self.put(stack[-1], [key, value])
            case 0x47:  # BINFLOAT
                stack.append(struct.unpack(">d", self._take(8))[0])
            case 0x8A | 0x8B:  # LONG1, LONG4
                size = self._number(1 if op == 0x8A else 4)
                if size > _MAX_INT:
                    self.bad(f"a number of {size} bytes")
                stack.append(int.from_bytes(self._take(size), "little", signed=True))
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
                self._stack.append(frozenset(self.keys(items)))
            case 0x92:  # NEWOBJ_EX
                kwargs: Node = stack.pop()
                args: Node = stack.pop()
                symbol: Node = stack.pop()
                if not isinstance(args, tuple):  # a range has any length
                    self.bad("arguments that are no tuple")
                self.copied(len(args))
                stack.append(self.call(symbol, (*args, kwargs) if kwargs else args))
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
        if type(module) is not str or type(name) is not str:  # before they are hashed
            self.bad("a global whose name is no string")
        if known := self._symbols.get((module, name)):
            return known
        if not f"{module}.{name}".replace(".", "_").isidentifier():  # also keeps control characters off terminals
            self.bad("a global of odd name")
        if module in PY2_MODULES:
            module, name = PY2_MODULES[module], PY2_NAMES.get(name, name)
        if module == "torch" and name in FROM_TORCH:
            return self._symbols.setdefault((module, name), DTypeRef(FROM_TORCH[name]))
        builder = builder_of(module, name)
        if builder is None and not (module.partition(".")[0] in ROOTS or name in INERT_MODULES.get(module, ())):
            self.foreign(f"{module}.{name}")
        symbol = Symbol(module, name)
        self._symbols[module, name] = symbol
        if builder is not None:
            self._builders[id(symbol)] = builder
        return symbol

    def foreign(self, name: str) -> NoReturn:
        """Refuse a name that neither torch nor megatron writes; loading the file elsewhere would run it."""
        raise Damaged(
            "a pickle with a foreign global",
            where=self.where,
            expected="tensors, plain values, classes of torch and megatron",
            found=name[:200],
            do="do not load this file with torch either: loading would run that name",
        )

    def call(self, symbol: Node, args: Node) -> Any:
        """What calling a symbol makes: plain data where it is known how, else a `Record` of the call."""
        if not isinstance(symbol, Symbol) or not isinstance(args, tuple):
            self.bad("a call of something that is no global")
        builder = self._builders.get(id(symbol))
        return Record(symbol, args) if builder is None else self._made(builder, symbol, args)

    def _made(self, builder: Builder, symbol: Symbol, args: tuple[Any, ...]) -> Any:
        if len(args) > _MAX_ARGS:
            self.bad(f"{len(args)} arguments for {symbol}")
        return builder(self, symbol, args)

    def _build(self, target: Node, state: Node) -> None:
        if type(target) is Record:
            target.state = state
        elif type(target) is not OrderedMap:
            self.bad(f"a state for a {type(target).__name__}")

    def put(self, target: Node, items: list[Any]) -> None:
        """``target[items[0]] = items[1]`` and so on."""
        if len(items) % 2:
            self.bad("a key without a value")
        if type(target) is Record:
            target.items.extend(zip(items[::2], items[1::2], strict=True))
        elif isinstance(target, dict):
            target.update(zip(self.keys(items[::2]), items[1::2], strict=True))
        else:
            self.bad(f"entries for a {type(target).__name__}")

    def _extend(self, target: Node, items: list[Any]) -> None:
        if type(target) is list:
            target.extend(items)
        elif type(target) is set:
            target.update(self.keys(items))
        elif type(target) is Record:
            target.items.extend(items)
        else:
            self.bad(f"elements for a {type(target).__name__}")

    def keys(self, keys: list[Node]) -> list[Node]:
        """The same keys, each cheap to hash and compare."""
        for key in keys:
            if type(key) is int and not -_MAX_KEY < key < _MAX_KEY:
                self.bad("a number too large for a key")
            if type(key) is tuple or type(key) is frozenset:
                nodes = 0
                todo: list[tuple[Node, ...] | frozenset[Node]] = [key]
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

    def _persistent(self, pid: Node) -> StorageRef:
        """A storage by torch's ``("storage", type, key, location, numel)``, in old files with a view (None) behind."""
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage" or any(pid[5:]):
            self.bad("a persistent id that is no storage")
        kind, key, _location, numel = pid[1:5]
        if not isinstance(kind, Symbol) or not kind.name.endswith("Storage") or type(key) is not str:
            self.bad("a storage of wrong form")
        if not is_size(numel):
            self.bad("a storage of wrong size")
        dtype = STORAGE_DTYPES.get(kind.name, kind.name.replace("Storage", ""))
        ref = StorageRef(dtype, key, numel)
        self.storages.setdefault(key, ref)
        return ref


_U16, _U32, _I32 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<i")
# what opcodes and constructors raise on wrong operands; none of them runs code of the file
_MALFORMED: Final = (
    AttributeError, IndexError, KeyError, MemoryError, OverflowError, RecursionError, TypeError, ValueError,
    struct.error,
)  # fmt: skip
