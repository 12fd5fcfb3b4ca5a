"""The closed list of names that a pickle may hold, and what each constructor among them makes.

Everything here is a function of plain values: nothing is imported or called by a name that a file holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NoReturn

from dconv.checkpoint.pickled import DTypeRef, Node, OrderedMap, Record, StorageRef, Symbol, TensorRef

if TYPE_CHECKING:
    from dconv.checkpoint.inert import Machine

# Of a whole number that a call makes: the largest float has 1,024, and printing thousands of digits is refused.
_MAX_BITS: Final = 1024


def is_size(value: object) -> bool:
    """A count of bytes, elements or indices."""
    return type(value) is int and 0 <= value < 1 << 63


def _sizes(value: Node) -> tuple[int, ...]:
    """A tensor's shape, strides or offsets; torch allows 64 axes."""
    if not isinstance(value, tuple | list) or len(value) > 64 or not all(map(is_size, value)):
        raise ValueError("a shape of wrong form")
    return tuple(value)


def _tensor(machine: Machine, symbol: Symbol, args: tuple[Any, ...]) -> TensorRef:
    """``_rebuild_tensor(storage, offset, size, stride)``; v2 adds what needs a gradient, hooks, and pending changes."""
    storage, offset, shape, stride = args[:4]
    if any(args[6:]) and symbol.name != "_rebuild_tensor_v3":
        machine.bad("a tensor whose negation or conjugation is pending")
    if not isinstance(storage, StorageRef) or not is_size(offset):
        machine.bad("a tensor of wrong form")
    return TensorRef(storage, offset, _sizes(shape), _sizes(stride), storage.dtype)


def _tensor_v3(machine: Machine, symbol: Symbol, args: tuple[Any, ...]) -> TensorRef:
    """``_rebuild_tensor_v3``: dtypes without a storage class of their own, over untyped storages."""
    plain = _tensor(machine, symbol, args)
    dtype = args[6]
    if any(args[7:]):
        machine.bad("a tensor whose negation or conjugation is pending")
    if not isinstance(dtype, DTypeRef | Symbol):
        machine.bad("a tensor of wrong form")
    return TensorRef(plain.storage, plain.offset, plain.shape, plain.stride, dtype.name)


def _parameter(_machine: Machine, _symbol: Symbol, args: tuple[Any, ...]) -> Any:
    return args[0]


def _from_type(machine: Machine, _symbol: Symbol, args: tuple[Any, ...]) -> Any:
    """``_rebuild_from_type_v2(function, class, args, state)``: a subclass, read as the tensor it wraps."""
    return machine.call(args[0], args[2])


def _reconstructor(machine: Machine, _symbol: Symbol, args: tuple[Any, ...]) -> Any:
    """``copyreg._reconstructor(class, base, state)``, how protocols 0 and 1 make an object."""
    kind, base, state = args
    return machine.call(kind, () if base == Symbol("builtins", "object") else (state,))


def _new(machine: Machine, _symbol: Symbol, args: tuple[Any, ...]) -> Any:
    machine.copied(len(args))
    return machine.call(args[0], args[1:])


def _shape(_machine: Machine, _symbol: Symbol, args: tuple[Any, ...]) -> tuple[int, ...]:
    return _sizes(args[0]) if args else ()


def _mapping(machine: Machine, symbol: Symbol, args: tuple[Any, ...]) -> dict[Any, Any]:
    """dict, OrderedDict and Counter of nothing, of a dict or of pairs; ``defaultdict(factory, ...)``."""
    if symbol.name == "defaultdict":
        args = args[1:]
    content: dict[Any, Any] | list[Any] | tuple[Any, ...] = args[0] if args else ()
    if not _concrete(content):
        machine.bad("a dict of no pairs")
    machine.copied(len(content))
    pairs = list(content.items()) if isinstance(content, dict) else list(content)
    made: dict[Any, Any] = {} if symbol.module == "builtins" else OrderedMap()
    machine.put(made, [part for key, value in pairs for part in (key, value)])
    return made


def _concrete(value: Node) -> bool:
    """Not a range: its elements cost the file nothing."""
    return isinstance(value, list | tuple | set | frozenset | dict)


def _collection(machine: Machine, symbol: Symbol, args: tuple[Any, ...]) -> Any:
    content = args[0] if args else ()
    if len(args) > 1 or not _concrete(content):
        machine.bad(f"a {symbol.name} of no elements")
    machine.copied(len(content))
    kind: Any = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[symbol.name]
    return kind(content if symbol.name in ("list", "tuple") else machine.keys(list(content)))


def _text(machine: Machine, symbol: Symbol, args: tuple[Any, ...]) -> Any:
    """str, bytes, bytearray and ``_codecs.encode`` of text; bytes of a number would ask for memory."""
    source: Node = args[0] if args else b""
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
    made = kind[symbol.name](*args)
    if isinstance(made, int) and made.bit_length() > _MAX_BITS:
        machine.bad("a number of too many digits")
    return made


Builder = Callable[["Machine", Symbol, tuple[Any, ...]], Any]


def _member(machine: Machine, symbol: Symbol, args: tuple[Any, ...]) -> Record:
    """``getattr(SomeEnum, "NAME")``, as Python 3.11.0 to 3.11.3 pickles an enum's member; noted down, not looked up."""
    plain = len(args) == 2 and type(args[0]) is Symbol and isinstance(args[1], str) and args[1].isidentifier()
    if not plain or args[1].startswith("_") or args[0].module == "builtins":
        machine.foreign(str(symbol))
    return Record(args[0], (args[1],))


def _uncalled(machine: Machine, symbol: Symbol, _args: tuple[Any, ...]) -> NoReturn:
    machine.foreign(f"{symbol}, called")


BUILDERS: Final[dict[tuple[str, str], Builder]] = {
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
ROOTS: Final = frozenset({"torch", "megatron", "transformer_engine", "omegaconf"})
#: Of their functions, which are in lower case, those that tensors and options are made by, and classes spelled so.
_CALLED: Final = re.compile(
    r"_rebuild_\w+|_get_layout|device|dtype|layout|memory_format|finfo|iinfo|build_\w+list|restore_type_tag|"
    r"_make_in_reduce_ex"
)


def builder_of(module: str, name: str) -> Builder | None:
    """What a call of a global makes; None where the call is noted down.

    A class of these packages is noted down with its arguments. A call of a function is what attacks are made of
    (``torch.hub.load``, ``torch.utils.cpp_extension.load``, ``torch.storage._load_from_bytes``), and refused.
    """
    last = name.rpartition(".")[2]
    if module.partition(".")[0] in ROOTS and last.lstrip("_")[:1].islower() and not _CALLED.fullmatch(last):
        return BUILDERS.get((module, name), _uncalled)
    return BUILDERS.get((module, name))


_NUMPY = ("_reconstruct", "scalar")
#: Other names that real arguments and random states hold; also `Record`. From megatron/core/safe_globals.py,
#: pickles of ``np.random.get_state()`` and of DCP's ``StorageMeta``.
INERT_MODULES: Final[dict[str, tuple[str, ...]]] = {
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
    "builtins": ("object",),
    "collections": ("deque",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath", "PurePath", "WindowsPath", "PureWindowsPath"),
    # Python 3.11.0 to 3.11.3 pickles a signal by its name: --exit-signal
    "signal": (
        "Signals", "Handlers", "SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGQUIT", "SIGABRT", "SIGALRM",
        "SIGCHLD", "SIGCONT", "SIGTSTP", "SIGPIPE", "SIGKILL", "SIGSTOP",
    ),
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
PY2_MODULES: Final = {"__builtin__": "builtins", "copy_reg": "copyreg"}
PY2_NAMES: Final = {"xrange": "range", "unicode": "str", "long": "int"}

#: torch's typed storages -> dconv's short name; an untyped one counts bytes.
STORAGE_DTYPES: Final[dict[str, str]] = {
    "DoubleStorage": "f64", "FloatStorage": "f32", "HalfStorage": "f16", "BFloat16Storage": "bf16",
    "LongStorage": "i64", "IntStorage": "i32", "ShortStorage": "i16", "CharStorage": "i8",
    "ByteStorage": "u8", "BoolStorage": "bool", "ComplexFloatStorage": "c64", "UntypedStorage": "u8",
}  # fmt: skip
