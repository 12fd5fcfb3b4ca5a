"""ONNX to ONNX: the graph computes the same, or within what the numbers allow; its weights are copied, not held."""

from __future__ import annotations

import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx
from onnx import TensorProto, helper, numpy_helper

from dconv.checkpoint.onnx import initializers
from dconv.errors import Damaged, Refused, UsageError
from dconv.export import onnx_run as engine
from dconv.export.onnx_run import Runs
from dconv.pipeline import convert
from dconv.request import Request
from tests.formats import onnx_models as models


def again(source: Path, out: Path, **options: object) -> Runs:
    convert(Request(source, "onnx", out, **options))  # type: ignore[arg-type]
    assert engine.validate(out)
    return Runs(out)


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({}, 0.0),
        pytest.param({"opset": 23}, 1e-6, marks=pytest.mark.long),
        ({"shard_size": 300_000}, 0.0),
        ({"dtype": "f16"}, 2e-2),
        pytest.param({"quant": "int8"}, 0.2, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_graph_once_more_computes_the_same(options: dict[str, object], bound: float, tmp_path: Path) -> None:
    one = models.made("llama")
    runs = again(one.out, tmp_path / "out", **options)
    ids = models.tokens(2, 9)
    wanted, past = one.runs.step(ids[:, :6], None)
    found, mine = runs.step(ids[:, :6], None)
    assert models.apart(found, wanted) <= bound
    assert models.apart(runs.step(ids[:, 6:], mine)[0], one.runs.step(ids[:, 6:], past)[0]) <= bound
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    if "shard_size" in options:
        assert len(list((tmp_path / "out").glob("model.onnx.data-*"))) > 2
    if "opset" in options:
        assert {entry.domain: entry.version for entry in graph.opset_import}[""] == options["opset"]
    if options == {"dtype": "f16"}:
        assert {w.data_type for w in graph.graph.initializer if len(w.dims) == 2 and 128 in w.dims} == {10}
    if "quant" in options:
        mine_ = models.made("llama", "f32", "int8").out / "model.onnx.data"
        assert (tmp_path / "out" / "model.onnx.data").stat().st_size == mine_.stat().st_size


def test_narrow_numbers_become_wide_ones(tmp_path: Path) -> None:
    one = models.made("gemma", "f16")
    ids = models.tokens(2, 9)
    found = again(one.out, tmp_path / "out", dtype="f32").step(ids, None)[0]
    narrow = deepcopy(one.model).half().float()  # the model itself is other tests' too
    assert models.apart(found, models.theirs(narrow, ids)) < 1e-4
    with pytest.raises(Refused, match="one narrow number"):
        convert(Request(one.out, "onnx", tmp_path / "other", dtype="bf16"))
    assert not (tmp_path / "other").exists()


def small(path: Path, dims: tuple[int, int] = (64, 96)) -> np.ndarray:
    """One file of opset 13 with its weight inside, and no config beside it; returns the weight."""
    weight = np.random.default_rng(0).standard_normal(dims).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, dims[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, dims[1]])],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return weight


@pytest.mark.parametrize(("options", "bound"), [({"opset": 18}, 1e-6), ({"quant": "int4"}, 0.3)], ids=str)
def test_any_graph_is_taken(options: dict[str, object], bound: float, tmp_path: Path) -> None:
    import onnxruntime

    weight = small(tmp_path / "net.onnx")
    convert(Request(tmp_path / "net.onnx", "onnx", tmp_path / "out", **options))  # type: ignore[arg-type]
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "net.onnx"))
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    assert models.apart(session.run(None, {"x": x})[0], x @ weight) < bound
    (held,) = [one for one in initializers(tmp_path / "out" / "net.onnx") if one.name in ("w", "w_Q4")]
    assert held.file == "net.onnx.data"


def test_of_a_graph_nothing_else_is_made(tmp_path: Path) -> None:
    one = models.made("llama")
    for format in ("hf", "megatron", "gguf"):
        with pytest.raises(Refused, match="a graph is no checkpoint"):
            convert(Request(one.out, format, tmp_path / "out"))
    with pytest.raises(UsageError, match="written anew as it is"):
        convert(Request(one.out, "onnx", tmp_path / "out", drop=("x",)))
    assert not list(tmp_path.iterdir())


def test_damaged_graphs_are_found(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    small(path)
    data = path.read_bytes()
    for cut in range(1, len(data), 997):
        path.write_bytes(data[:cut])
        with pytest.raises(Damaged):
            convert(Request(path, "onnx", tmp_path / "out"))
    for seed in range(40):
        draw = np.random.default_rng(seed)
        broken = bytearray(data)
        broken[int(draw.integers(0, 80))] = int(draw.integers(0, 256))
        path.write_bytes(bytes(broken))
        try:
            initializers(path)
        except Damaged:
            continue
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4], np.zeros(4, np.float32).tobytes(), raw=True)
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "../secret"), ("offset", "0"), ("length", "16")):
        entry = weight.external_data.add()
        entry.key, entry.value = key, value
    model = helper.make_model(helper.make_graph([], "g", [], [], [weight]))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(Damaged, match="outside"):
        convert(Request(path, "onnx", tmp_path / "out"))


@pytest.mark.parametrize("dims", [b"\xff" * (1 << 20), b"\x04\x84"], ids=["endless", "cut off"])
def test_packed_lengths_without_an_end_are_found_at_once(tmp_path: Path, dims: bytes) -> None:
    """A shape as one packed field, as other writers have it; a number has ten bytes at most."""

    def field(number: int, content: bytes) -> bytes:
        length = len(content)
        size = bytearray()
        while length > 127:
            size.append(length & 127 | 128)
            length >>= 7
        return bytes([number << 3 | 2, *size, length]) + content

    path = tmp_path / "net.onnx"
    path.write_bytes(field(7, field(5, field(1, b"\x04\x82\x01") + field(8, b"w"))))
    assert initializers(path)[0].shape == (4, 130)
    path.write_bytes(field(7, field(5, field(1, dims) + field(8, b"w"))))
    start = time.monotonic()
    with pytest.raises(Damaged, match="not a graph"):
        initializers(path)
    assert time.monotonic() - start < 5
