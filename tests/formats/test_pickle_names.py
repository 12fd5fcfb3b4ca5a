"""Of all names that Python has, a pickle may hold those written out here; and it may not be endless, odd or pending."""

from __future__ import annotations

import builtins
import importlib
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch writes the files that are read here")

from dconv.arch.registry import by_name  # noqa: E402
from dconv.checkpoint import dcp, inert, torchzip  # noqa: E402
from dconv.checkpoint.pickled import Record, Symbol  # noqa: E402
from dconv.errors import Damaged, DconvError  # noqa: E402
from dconv.pipeline import Request, convert  # noqa: E402
from tests.models import config_of, write_random  # noqa: E402

#: Every name of the standard library that is no foreign global. Whoever adds one must say so here, too.
ALLOWED: dict[str, set[str]] = {
    "_codecs": {"encode"},
    "_io": {"BytesIO"},
    "argparse": {"Namespace"},
    "builtins": {"bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "getattr", "int", "list",
                 "object", "range", "set", "slice", "str", "tuple"},
    "collections": {"Counter", "OrderedDict", "defaultdict", "deque"},
    "copyreg": {"__newobj__", "_reconstructor"},
    "datetime": {"date", "datetime", "timedelta"},
    "io": {"BytesIO"},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "signal": {"Handlers", "SIGABRT", "SIGALRM", "SIGCHLD", "SIGCONT", "SIGHUP", "SIGINT", "SIGKILL", "SIGPIPE",
               "SIGQUIT", "SIGSTOP", "SIGTERM", "SIGTSTP", "SIGUSR1", "SIGUSR2", "Signals"},
    "types": {"SimpleNamespace"},
}  # fmt: skip


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def spellings(module: str, name: str) -> list[bytes]:
    """A pickle that names a global, in both opcodes that can."""
    return [
        b"\x80\x02" + f"c{module}\n{name}\n.".encode(),
        b"\x80\x04" + text(module) + text(name) + b"\x93.",
    ]


def called(module: str, name: str, *args: bytes) -> bytes:
    return b"\x80\x02" + f"c{module}\n{name}\n(".encode() + b"".join(args) + b"tR."


def foreign(module: str, name: str) -> bool:
    """Whether every spelling of a name, alone and called, is refused as a foreign global."""
    found: set[str] = set()
    for data in (*spellings(module, name), called(module, name)):
        try:
            inert.load(data, where="test")
            found.add("read")
        except Damaged as error:
            found.add(error.what)
    return found == {"a pickle with a foreign global"}


def test_no_other_module_of_the_standard_library() -> None:
    names = ("system", "Popen", "run", "__import__", "loads", "__builtins__", "Namespace", "x")
    modules = {part for module in sys.stdlib_module_names for part in (module, f"{module}.path", f"{module}.x.y")}
    read = [f"{m}.{name}" for m in sorted(modules - ALLOWED.keys()) for name in names if not foreign(m, name)]
    assert not read


@pytest.mark.parametrize("module", sorted(ALLOWED))
def test_no_other_name_of_the_modules_that_have_one(module: str) -> None:
    there = {*dir(importlib.import_module(module)), "__class__", "__globals__", "system"}
    assert not [name for name in sorted(there - ALLOWED[module]) if not foreign(module, name)]
    for name in ALLOWED[module]:
        for data in spellings(module, name):
            assert isinstance(inert.load(data, where="test"), Symbol), name


@pytest.mark.parametrize("name", sorted({*dir(builtins), "execfile", "reduce", "apply", "file", "raw_input", "reload"}))
def test_no_other_builtin_under_its_old_name(name: str) -> None:
    """``__builtin__`` is what Python 2 called the module; xrange, unicode and long were its own names."""
    old = ALLOWED["builtins"] | {"xrange", "unicode", "long"}
    assert foreign("__builtin__", name) != (name in old)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        *((m, "system") for m in ("torchx", "torch_evil", "megatronx", "xtorch", "Torch", "numpy.os", "nt")),
        *(("numpy", name) for name in ("load", "fromfile", "memmap", "os", "loadtxt", "genfromtxt", "save")),
        ("numpy.testing._private.utils", "runstring"),
        ("numpy.core.multiarray", "fromfile"),
        ("argparse", "Namespace.__init__.__globals__"),
        ("collections", "OrderedDict.update"),
        ("builtins", "object.__subclasses__"),
        ("builtins", "dict.update"),
        ("_codecs", "encode.__call__"),
        ("transformers", "AutoModel"),
        ("cloudpickle.cloudpickle", "_make_function"),
        ("dill._dill", "_create_code"),
        ("joblib", "load"),
    ],
)  # fmt: skip
def test_neighbours_of_allowed_names(module: str, name: str) -> None:
    assert foreign(module, name)


@pytest.mark.parametrize(
    ("module", "name"),
    [("torch\x1b[2J", "x"), ("", "eval"), ("torch ", "x"), ("torch", "a-b"), (".torch", "..x y")],
)
def test_odd_names(module: str, name: str) -> None:
    for data in spellings(module, name):
        with pytest.raises(Damaged) as caught:
            inert.load(data, where="test")
        assert "\x1b" not in str(caught.value)


ENUM, DICT = b"cmegatron.core.enums\nModelType\n", b"c__builtin__\ndict\n"


@pytest.mark.parametrize(
    "args",
    [
        (ENUM, text("__class__")),
        (ENUM, text("_member_map_")),
        (ENUM, text("a.b")),
        (ENUM, text("")),
        (ENUM, b"K\x01"),
        (ENUM, text("a"), b"N"),
        (ENUM,),
        (),
        (DICT, text("update")),
        (b"c__builtin__\ngetattr\n", text("x")),
        (text("text"), text("upper")),
        (b"}", text("update")),
        (b"]", text("append")),
        (b"N", text("x")),
        (ENUM + b")R", text("x")),  # of what a call gave
    ],
)
@pytest.mark.parametrize("module", ["builtins", "__builtin__"])
def test_getattr_is_for_members_of_enums_alone(module: str, args: tuple[bytes, ...]) -> None:
    with pytest.raises(Damaged):
        inert.load(called(module, "getattr", *args), where="test")
    found = inert.load(called(module, "getattr", ENUM, text("encoder")), where="test")
    assert isinstance(found, Record)
    assert (str(found.symbol), found.args) == ("megatron.core.enums.ModelType", ("encoder",))


# -------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("digits", [256, 257, 1 << 20])
def test_numbers_that_calls_make_are_limited(digits: int) -> None:
    """Python refuses to print those of more than 4,300 digits, and makes them of any."""
    data = called("builtins", "int", text("f" * digits), b"K\x10")
    if digits == 256:
        assert inert.load(data, where="test") == (1 << 1024) - 1
        return
    with pytest.raises(Damaged, match="too many digits"):
        inert.load(data, where="test")


def test_length_is_limited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = pickle.dumps({"x": "y" * 2000}, protocol=2)
    torch.save({"x": "y" * 2000}, tmp_path / "file.pt")
    (tmp_path / ".metadata").write_bytes(data)
    assert inert.load(data, where="test") == torchzip.read(tmp_path / "file.pt").tree == {"x": "y" * 2000}
    monkeypatch.setattr(inert, "MAX_BYTES", len(data))
    assert inert.load(data, where="test")
    monkeypatch.setattr(inert, "MAX_BYTES", len(data) - 1)
    with pytest.raises(Damaged, match="cannot be read"):
        inert.load(data, where="test")
    monkeypatch.setattr(inert, "MAX_BYTES", 1000)
    with pytest.raises(Damaged, match=r"implausibly large data\.pkl"):
        torchzip.read(tmp_path / "file.pt")
    with pytest.raises(Damaged):
        dcp.read_metadata(tmp_path)


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("_MAX_CONTAINERS", b"]"), ("_MAX_CONTAINERS", b"}"), ("_MAX_CONTAINERS", b"(t"), ("_MAX_CONTAINERS", b"\x8f"),
        ("_MAX_CONTAINERS", b"(\x91"), ("_MAX_CONTAINERS", b"G" + bytes(8)), ("_MAX_STEPS", b"N"), ("_MAX_STEPS", b")"),
        ("_MAX_STEPS", b"K\x01\x85"), ("_MAX_STEPS", b"N0"),
    ],
)  # fmt: skip
def test_containers_and_steps_are_limited(monkeypatch: pytest.MonkeyPatch, name: str, unit: bytes) -> None:
    data = b"\x80\x04(" + unit * 300 + b"t."
    inert.load(data, where="test")
    monkeypatch.setattr(inert, name, 250)
    with pytest.raises(Damaged, match="cannot be read") as caught:
        inert.load(data, where="test")
    assert "more than" in caught.value.found


# --------------------------------------------------------------------------------------------------------- odd trees


def endless(kind: str) -> Any:
    if kind == "list":
        inner: Any = []
        inner.append(inner)
    elif kind == "dict":
        inner = {}
        inner["self"] = [inner]
    else:
        inner = []
        for _ in range(40):
            inner = [inner, inner]
    return inner


@pytest.mark.parametrize("kind", ["list", "dict", "shared"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_tree_without_end_in_a_file_of_torch(tmp_path: Path, kind: str, zipped: bool) -> None:
    path = tmp_path / "file.pt"
    tree = {"w": torch.ones(2), "args": endless(kind)}
    torch.save(tree, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(Damaged, match="nested without end"):
        torchzip.read(path)


@pytest.mark.parametrize("protocol", [b"\x80\x02", b"\x80\x04"])
@pytest.mark.parametrize("which", ["module", "name", "both"])
def test_nested_tuples_for_a_name(protocol: bytes, which: str) -> None:
    """hash() of them overflows the stack, which ends the process: so in one of its own."""
    deep = b")" + b"\x85" * 2_000_000
    module, name = (deep if which in (part, "both") else text("torch") for part in ("module", "name"))
    program = (
        "import sys\nfrom dconv.checkpoint import inert\nfrom dconv.errors import Damaged\n"
        "try:\n    inert.load(sys.stdin.buffer.read(), where='test')\n"
        "except Damaged as error:\n    sys.stdout.write(error.found)\n    sys.stdout.flush()\n"
        "    __import__('os')._exit(0)\n"
    )
    data = protocol + module + name + b"\x93."
    ran = subprocess.run([sys.executable, "-c", program], input=data, capture_output=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr[-500:]
    assert b"name is no string" in ran.stdout


def pending(kind: str) -> Any:
    value = torch.arange(6, dtype=torch.float32).to(torch.complex64)
    return value.conj() if kind == "conj" else value.conj().imag


@pytest.mark.parametrize("kind", ["neg", "conj"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_tensor_with_a_pending_change_is_refused(tmp_path: Path, kind: str, zipped: bool) -> None:
    """Its bytes in the file are those before the negation or the conjugation."""
    value = pending(kind)
    assert value.is_neg() if kind == "neg" else value.is_conj()
    path = tmp_path / "file.pt"
    torch.save({"w": value}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(Damaged) as caught:
        torchzip.read(path)
    assert "pending" in caught.value.found
    torch.save({"w": value.resolve_neg().resolve_conj()}, path, _use_new_zipfile_serialization=zipped)
    assert torchzip.read(path).tree["w"].shape == (6,)


@pytest.mark.parametrize("odd", [endless("list"), pending("neg")], ids=["endless", "pending"])
def test_a_conversion_of_such_a_file_is_refused(tmp_path: Path, odd: Any) -> None:
    family = by_name("llama")
    model = write_random(tmp_path / "model", family, config_of(family))
    (model / "model.safetensors").unlink()
    torch.save({"odd": odd}, model / "pytorch_model.bin")
    with pytest.raises(DconvError) as caught:
        convert(Request(model, "hf", tmp_path / "out"))
    assert caught.value.exit_code == 4
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
