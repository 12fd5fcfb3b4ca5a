"""A pickle is read as data: what real files hold comes through, anything foreign is refused, nothing runs."""

from __future__ import annotations

import argparse
import builtins
import collections
import io
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time
import types
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.enums import ModelType
from megatron.core.optimizer import OptimizerConfig
from megatron.core.safe_globals import SAFE_GLOBALS
from megatron.core.transformer.enums import AttnBackend

from dconv.checkpoint import inert, pickled, pickling
from dconv.checkpoint.pickled import DTypeRef, Record, Symbol, TensorRef
from dconv.checkpoint.pickling import Global, NewObj, Reduce
from dconv.errors import Damaged

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 500), 1 << 500)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(max_size=300)
)
#: hash() of a larger one repeats, which we do not let a file choose.
small = st.integers(-(1 << 61) + 2, (1 << 61) - 2)
plain_keys = st.none() | st.booleans() | small | st.floats(allow_nan=False) | st.text() | st.binary(max_size=300)
keys = plain_keys | st.tuples(st.integers(), st.text())
trees = st.recursive(
    scalars | st.sets(small),
    lambda inner: st.lists(inner) | st.lists(inner, max_size=5).map(tuple) | st.dictionaries(keys, inner),
    max_leaves=30,
)


def parse(value: object, protocol: int = 2) -> object:
    return inert.load(pickle.dumps(value, protocol), where="test")


def saved(value: object) -> object:
    """Through the pickler of ``torch.save``."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return inert.load(zipfile.ZipFile(stream).read("archive/data.pkl"), where="test")


@given(trees, st.integers(2, 5))
def test_plain_data_equals_what_pickle_reads(tree: object, protocol: int) -> None:
    assert parse(tree, protocol) == tree


@given(trees)
def test_written_trees_are_read_by_pickle_and_by_us(tree: object) -> None:
    data = pickling.dumps(tree)
    assert pickle.loads(data) == tree == inert.load(data, where="test")
    assert pickling.dumps(tree) == data


def test_edges_of_the_opcodes_that_numbers_and_memo_use() -> None:
    edges = [base + step for base in (0, 256, 1 << 16, 1 << 31, 1 << 63, -(1 << 31)) for step in (-1, 0, 1)]
    tree = [edges, [str(n) for n in range(70_000)] * 2, (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]
    data = pickling.dumps(tree)
    assert pickle.loads(data) == tree == inert.load(data, where="test")


def test_values_that_the_picklers_build_by_a_call() -> None:
    values = [
        frozenset({1, 2}), 1 + 2j, slice(1, None, 2), range(3), bytearray(b"xy"), {"s": {1}},
        collections.OrderedDict(a=1), collections.defaultdict(list, {1: [2]}), torch.Size((2, 3)),
        collections.Counter("aab"),
    ]  # fmt: skip
    for protocol in (2, 4):
        assert parse(values, protocol) == values


def test_state_dict_with_metadata_attribute() -> None:
    tree = saved(torch.nn.Linear(2, 3).state_dict())
    assert isinstance(tree, dict)
    assert list(tree) == ["weight", "bias"]
    assert isinstance(tree["weight"], TensorRef)
    assert (tree["weight"].shape, tree["weight"].stride, tree["weight"].dtype) == ((3, 2), (2, 1), "f32")


def test_megatron_args_with_odd_members() -> None:
    args = argparse.Namespace(
        num_layers=2,
        params_dtype=torch.bfloat16,
        attention_backend=AttnBackend.auto,
        model_type=ModelType.encoder_or_decoder,
        exit_signal=signal.SIGTERM,
        data_path=pathlib.PosixPath("/data/x"),
        activation=torch.nn.functional.gelu,
        extra=types.SimpleNamespace(q=1),
        optimizer=OptimizerConfig(lr=0.5),
        odd_dtype=torch.complex128,
        device=torch.device("cpu"),
        rng=np.random.get_state(),
        torch_rng=torch.get_rng_state(),
        scale=np.float64(2.0),
    )
    tree = saved({"args": args})
    assert isinstance(tree, dict)
    found = tree["args"]
    assert isinstance(found, Record)
    assert found.symbol == Symbol("argparse", "Namespace")
    fields = found.fields
    assert list(fields) == list(vars(args))
    assert fields["num_layers"] == 2
    assert fields["params_dtype"] == DTypeRef("bf16")
    assert fields["odd_dtype"] == Symbol("torch", "complex128")
    # by value; Python 3.11.0 to 3.11.3 pickles a member by its name
    assert fields["attention_backend"].args in ((AttnBackend.auto.value,), ("auto",))
    assert str(fields["model_type"]).removeprefix("megatron.core.enums.ModelType") in ("(1)", "('encoder_or_decoder')")
    assert fields["activation"].name == "gelu"
    assert fields["extra"].fields == {"q": 1}
    assert fields["optimizer"].fields["lr"] == 0.5
    assert fields["torch_rng"].dtype == "u8"


def test_every_global_that_megatron_declares_safe_is_read() -> None:
    for item in SAFE_GLOBALS:
        data = b"\x80\x02" + f"c{item.__module__}\n{item.__qualname__}\n.".encode()
        assert isinstance(inert.load(data, where="test"), Symbol)


class Evil:
    def __init__(self, call: object, *args: object) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call, self.args


class EvilState:
    def __setstate__(self, state: object) -> None:
        raise AssertionError("the file's code ran")

    def __getstate__(self) -> dict[str, int]:
        return {"x": 1}


@pytest.mark.parametrize("wrap", [lambda e: e, lambda e: [{"a": (1, e)}], lambda e: {"args": argparse.Namespace(x=e)}])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_foreign_globals_are_refused_and_nothing_runs(wrap: object, protocol: int, tmp_path: pathlib.Path) -> None:
    flag = tmp_path / "ran"
    evils: list[tuple[object, str]] = [
        (Evil(os.system, f"touch {flag}"), "posix.system"),
        (Evil(builtins.eval, f"open({str(flag)!r}, 'w')"), "builtins.eval"),
        (Evil(builtins.exec, "raise SystemExit"), "builtins.exec"),
        (Evil(subprocess.Popen, ["touch", str(flag)]), "Popen"),  # protocol 2 says commands.Popen
        (Evil(builtins.getattr, "x", "upper"), "builtins.getattr"),
        (Evil(builtins.__import__, "antigravity"), "builtins.__import__"),
        (EvilState(), "EvilState"),
    ]
    for evil, name in evils:
        with pytest.raises(Damaged) as caught:
            parse(wrap(evil), protocol)  # type: ignore[operator]
        assert "test" in caught.value.where
        if protocol:  # protocol 0 is refused by its first opcode that torch never writes
            assert caught.value.what == "a pickle with a foreign global"
            assert name in caught.value.found
    assert not flag.exists()


def test_classes_of_allowed_packages_stay_on_paper_and_their_functions_are_not_called(tmp_path: pathlib.Path) -> None:
    flag = tmp_path / "ran"
    bad = Reduce(Global("torch.utils.cpp_extension", "BuildExtension"), (str(flag),), {"__setstate__": 1})
    found = inert.load(pickling.dumps(bad), where="test")
    assert isinstance(found, Record)
    assert str(found.symbol) == "torch.utils.cpp_extension.BuildExtension"
    for module, name in (
        ("torch.utils.cpp_extension", "load"), ("torch.hub", "load"), ("torch.storage", "_load_from_bytes"),
        ("torch", "load"), ("torch.fx.graph_module", "reduce_graph_module"), ("torch", "utils.cpp_extension.load"),
        ("torch.multiprocessing.reductions", "rebuild_storage_fd"), ("megatron.training.utils", "print_rank_0"),
    ):  # fmt: skip
        for node in (Reduce(Global(module, name), (str(flag),)), NewObj(Global(module, name), (str(flag),))):
            with pytest.raises(Damaged, match="foreign global"):
                inert.load(pickling.dumps([node]), where="test")
        assert isinstance(inert.load(pickling.dumps(Global(module, name)), where="test"), Symbol)
    assert not flag.exists()


def _nested_tuple_key(depth: int) -> bytes:
    return b"\x80\x02}" + b")" + b"2\x86" * depth + b"Ns."


def _call(module: str, name: str, *args: object) -> Reduce:
    return Reduce(Global(module, name), args)


MALFORMED: dict[str, bytes] = {
    "hash of shared tuples": _nested_tuple_key(60),
    "hash of deep tuples": b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns.",
    "bytes of a number": pickling.dumps(_call("builtins", "bytearray", 1 << 40)),
    "list of a range": pickling.dumps(_call("builtins", "list", _call("builtins", "range", 1 << 40))),
    "copies": b"\x80\x04]q\x00(" + b"N" * 50000 + b"e0(" + b"cbuiltins\nlist\nh\x00\x85R" * 5000 + b"t.",
    "arguments of a range": b"\x80\x04ctorch\nX\n"
    + pickling.dumps(_call("builtins", "range", 1 << 26))[2:-1]
    + b"}NNs\x92.",
    "arguments copied again and again": (
        b"\x80\x02ccopyreg\n__newobj__\nq\x000(ctorch\nTensor\n"
        + b"N" * 20000
        + b"tq\x010("
        + b"h\x00h\x01R" * 20000
        + b"t."
    ),
    "storages of endless ids": (
        b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000NK\x00"
        + b"N" * 1_000_000
        + b"tq\x000]"
        + b"h\x00Q0" * 20000
        + b"."
    ),
    "encoding that imports": pickling.dumps(_call("_codecs", "encode", "x", "idna")),
    "unhashable key": b"\x80\x02}]Ns.",
    "state for a class": b"\x80\x02ctorch\nTensor\nN}(X\x01\x00\x00\x00aNu\x86b.",
    "state for a dict": b"\x80\x02}}b.",
    "call of a string": b"\x80\x02X\x01\x00\x00\x00a)R.",
    "tensor of nothing": pickling.dumps(_call("torch._utils", "_rebuild_tensor_v2", 1, 0, (), ())),
    "negative shape": pickling.dumps(_call("torch", "Size", (-1,))),
    "extension registry": b"\x80\x02\x82\x01.",
    "long string": b"\x80\x02X\xff\xff\xff\xffabc.",
    "control characters in a name": b"\x80\x02ctorch\n\x1b[2J\n.",
    "trailing bytes": b"\x80\x02N.N.",
    "left over values": b"\x80\x02NN.",
    "empty": b"",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_bombs_and_malformed_pickles_are_damaged_at_once(name: str) -> None:
    start = time.monotonic()
    with pytest.raises(Damaged):
        inert.load(MALFORMED[name], where=name)
    assert time.monotonic() - start < 5


def test_containers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inert, "_MAX_CONTAINERS", 1000)
    with pytest.raises(Damaged, match="cannot be read"):
        inert.load(b"\x80\x02(" + b"]" * 2000 + b"t.", where="test")


ENDLESS = (
    b"\x80\x02]q\x00h\x00a.",
    b"\x80\x02]" + b"2\x86" * 60 + b".",
    b"\x80\x02" + b"]" * 999 + b"a" * 998 + b".",
)


@pytest.mark.parametrize("data", ENDLESS, ids=["cycle", "shared", "deep"])
def test_trees_without_end_are_found(data: bytes) -> None:
    tree = inert.load(data, where="test")
    with pytest.raises(Damaged):
        pickled.bounded(tree, where="test", nodes=10_000)


@given(st.binary(max_size=200), st.integers(0, 400))
def test_broken_pickles_raise_nothing_but_damaged(noise: bytes, at: int) -> None:
    real = pickle.dumps({"a": [1, (2, 3)], "s": collections.OrderedDict(x=torch.Size((1,))), "d": torch.float16}, 4)
    for data in (noise, real[: at % len(real)], real[: at % len(real)] + noise):
        try:
            inert.load(data, where="test")
        except Damaged as error:
            assert error.where == "test"


def test_namespace_and_helpers_are_loaded_by_torch_as_safe(tmp_path: pathlib.Path) -> None:
    tree = pickling.namespace(
        {
            "a": 1,
            "d": pickling.dtype("bf16"),
            "e": pickling.enum("megatron.core.enums", "ModelType", 1),
            "b": b"\xff",
        }
    )
    loaded = pickle.loads(pickling.dumps(tree))
    assert loaded == argparse.Namespace(a=1, d=torch.bfloat16, e=ModelType.encoder_or_decoder, b=b"\xff")


def test_names_and_nodes_that_cannot_be_written() -> None:
    for node in (Global("os\nsystem", "x"), 1 << 3000):
        with pytest.raises(ValueError):
            pickling.dumps(node)
    with pytest.raises(TypeError):
        pickling.dumps(object())


def test_equal_names_are_written_once_and_objects_never_shared() -> None:
    node = NewObj(Global("argparse", "Namespace"), (), {"text": "text"})
    data = pickling.dumps([node, node])
    assert data.count(b"argparse") == 1
    assert data.count(b"text") == 1
    first, second = pickle.loads(data)
    assert first == second and first is not second


def test_reading_and_writing_does_not_import_torch() -> None:
    code = (
        "import sys; from dconv.checkpoint import inert, pickling, torchzip, dcp;"
        "assert not {'torch', 'megatron'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_enum_members_of_early_python_3_11() -> None:
    """3.11.2, Debian's, writes ``getattr(SomeEnum, "NAME")``: noted down; any other use of getattr is refused."""
    good = b"\x80\x02cbuiltins\ngetattr\ncmegatron.core.enums\nModelType\nX\x0a\x00\x00\x00encoder_or\x86R."
    found = inert.load(good, where="x")
    assert isinstance(found, Record)
    assert str(found.symbol) == "megatron.core.enums.ModelType"
    assert found.args == ("encoder_or",)
    for odd in (good.replace(b"encoder_or", b"__reduce__"), good.replace(b"R.", b"R(R.")):
        with pytest.raises(Damaged):
            inert.load(odd, where="x")
    with pytest.raises(Damaged, match="foreign global"):
        inert.load(good.replace(b"megatron.core.enums\nModelType", b"os\nsystem"), where="x")
    assert str(inert.load(b"\x80\x02csignal\nSIGTERM\n.", where="x")) == "signal.SIGTERM"  # argparse's --exit-signal
    with pytest.raises(Damaged, match="foreign global"):
        inert.load(b"\x80\x02csignal\nraise_signal\n.", where="x")
