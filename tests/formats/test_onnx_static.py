"""FORMAT onnx with --lengths: graphs whose axes are all numbers compute what transformers computes."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx
import onnxruntime

import dconv
from dconv import logits
from dconv.describe import describe_model
from dconv.errors import Refused, UsageError
from dconv.export import onnx_opset
from dconv.export.onnx_run import Runs
from dconv.export.prompt import kind_of
from dconv.launch.values import lengths
from dconv.pipeline import prepare, run
from dconv.request import Request
from dconv.sharding.rank import Settings
from tests.formats import onnx_models as models
from tests.oracles import hf

BOUND = 1e-4
#: What computes shapes, decides, or looks up by computed places, and truth values of the mask.
DYNAMIC = {
    *("Shape", "Size", "Range", "ConstantOfShape", "If", "Loop", "Scan", "NonZero"),
    *("GatherND", "ScatterND", "And", "Constant"),
}


def fixed(name: str, sequence: int, past: int, opset: int | None = None) -> models.Made:
    return _fixed(name, sequence, past, opset)


@cache
def _fixed(name: str, sequence: int, past: int, opset: int | None) -> models.Made:
    model, folder = models.source(name)
    out = folder.parent / f"{name}-{sequence}-{past}-{opset}"
    job = prepare(Request(folder, "onnx", out, dtype="f32", lengths=(sequence, past), opset=opset))
    run(job, Settings())
    return models.Made(model, folder, out, job)


def session(one: models.Made, file: str = "model.onnx") -> Any:
    return onnxruntime.InferenceSession(one.out / file, providers=["CPUExecutionProvider"])


def answer(it: Any, **given: np.ndarray) -> dict[str, np.ndarray]:
    names = [output.name for output in it.get_outputs()]
    return dict(zip(names, it.run(None, given), strict=True))


def places(begin: int, end: int) -> np.ndarray:
    return np.arange(begin, end)[None]


@pytest.mark.parametrize(("name", "opset"), [("llama", None), ("mixtral", 18)])
def test_a_whole_text(name: str, opset: int | None) -> None:
    one = fixed(name, 11, 0, opset)
    it, ids = session(one), models.tokens(1, 11)
    said = answer(it, input_ids=ids, attention_mask=np.ones_like(ids), position_ids=places(0, 11))
    assert models.apart(said["logits"], models.theirs(one.model, ids)) < BOUND
    assert said["present.0.key"].shape[2] == 11
    mask = np.array([[1] * 7 + [0] * 4])
    said = answer(it, input_ids=ids, attention_mask=mask, position_ids=places(0, 11))
    assert models.apart(said["logits"][:, :7], models.theirs(one.model, ids[:, :7])) < BOUND


@pytest.mark.parametrize(("name", "opset"), [("llama", 18), ("mixtral", None)])
def test_stepping_behind_a_past(name: str, opset: int | None) -> None:
    """The cache is a ring that a caller turns: what is unused of it is rubbish that the mask hides."""
    one, past = fixed(name, 1, 8, opset), 8
    it, ids = session(one), models.tokens(1, 8, 3)
    wanted = models.theirs(one.model, ids)
    ports = it.get_inputs()[3:]
    draw = np.random.default_rng(0)
    held = {port.name: draw.normal(0, 9, port.shape).astype(np.float32) for port in ports}
    for at in range(8):
        mask = np.array([[0] * (past - at) + [1] * (at + 1)])
        said = answer(it, input_ids=ids[:, at : at + 1], attention_mask=mask, position_ids=places(at, at + 1), **held)
        assert models.apart(said["logits"][:, 0], wanted[:, at]) < BOUND
        held = {name: said[name.replace("past_key_values", "present")][:, :, 1:] for name in held}


def test_an_encoder_and_its_two_heads() -> None:
    one = fixed("bert", 9, 0, 18)
    ids, types = models.tokens(1, 9), np.array([[0] * 4 + [1] * 5])
    mask = np.array([[1] * 6 + [0] * 3])
    said = answer(session(one), input_ids=ids, attention_mask=mask, token_type_ids=types)
    import torch

    with torch.no_grad():
        wanted = one.model(*(torch.from_numpy(it) for it in (ids, mask, types)))
    assert models.apart(said["logits"][:, :6], wanted.prediction_logits[:, :6].numpy()) < BOUND
    assert models.apart(said["seq_relationship_logits"], wanted.seq_relationship_logits.numpy()) < BOUND


@pytest.mark.parametrize(
    ("name", "sequence", "past", "opset"),
    [
        ("llama", 11, 0, None),
        ("llama", 1, 8, 18),
        ("mixtral", 11, 0, 18),
        ("bert", 9, 0, 18),
        pytest.param("t5", 16, 0, None, marks=pytest.mark.long),
    ],
)
def test_all_is_numbers(name: str, sequence: int, past: int, opset: int | None) -> None:
    one = fixed(name, sequence, past, opset)
    for path in one.out.glob("*.onnx"):
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(path, load_external_data=False)
        assert [it.version for it in model.opset_import if it.domain == ""] == [opset or 20]
        assert {it.domain for it in model.opset_import} == {""}
        for port in (*model.graph.input, *model.graph.output):
            axes = port.type.tensor_type.shape.dim
            assert axes and all(axis.HasField("dim_value") and axis.dim_value > 0 for axis in axes), port.name
            assert axes[0].dim_value == 1
        assert all(0 not in it.dims for it in model.graph.initializer)
        assert not {node.op_type for node in model.graph.node} & DYNAMIC
        named = {it.name: it for it in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Reshape":
                assert min(onnx.numpy_helper.to_array(named[node.input[1]])) > 0
                assert not node.attribute
            if node.op_type in ("Expand", "Slice", "Unsqueeze"):
                assert set(node.input[1:]) <= named.keys()
            if node.op_type == "Cast":
                assert node.attribute[0].i != onnx.TensorProto.BOOL
    assert not (one.out / "genai_config.json").exists()


def test_ports_of_a_decoder() -> None:
    def shapes(ports: Any) -> dict[str, list[int]]:
        return {port.name: port.shape for port in ports}

    it = session(fixed("llama", 1, 8, 18))
    said = shapes(it.get_inputs())
    assert (said["input_ids"], said["attention_mask"], said["position_ids"]) == ([1, 1], [1, 9], [1, 1])
    assert said["past_key_values.1.value"] == [1, 4, 8, 16]
    assert shapes(it.get_outputs())["present.1.value"] == [1, 4, 9, 16]
    assert len(said) == 3 + 2 * 2
    assert len(session(fixed("llama", 11, 0)).get_inputs()) == 3


def test_masks_are_finite_in_fp16() -> None:
    """Compilers compute an fp32 graph in fp16: a number that it lacks would be an infinity there."""
    model = onnx.load(fixed("llama", 11, 0).out / "model.onnx", load_external_data=False)
    small = [onnx.numpy_helper.to_array(it) for it in model.graph.initializer if not it.external_data]
    assert max(np.abs(it).max() for it in small if it.dtype == np.float32) < np.finfo(np.float16).max
    assert any((it == -16384).any() for it in small)


@pytest.mark.parametrize(
    ("name", "sequence", "past", "opset"),
    [("llama", 1, 8, 18), ("bert", 9, 0, 18), ("t5", 16, 0, None), ("gemma2", 3, 14, None)],
)
def test_checked_and_verified(name: str, sequence: int, past: int, opset: int | None) -> None:
    """Also a text in pieces, and windows that are shorter than the past."""
    one = fixed(name, sequence, past, opset)
    assert logits.compare(one.job, one.out)["bound"] == BOUND
    found = dconv.check(one.out)
    assert found.run is not None
    assert str(found.run["runtime"]).startswith("onnxruntime")


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in hf.FAMILIES if name != "llava"])
def test_every_family(name: str) -> None:
    _, folder = models.source(name)
    past = 13 if kind_of(describe_model(folder).family) == "decoder" else 0
    one = fixed(name, 3 if past else 16, past)
    assert logits.compare(one.job, one.out)["bound"] == BOUND
    for path in one.out.glob("*.onnx"):
        assert not {node.op_type for node in onnx.load(path, load_external_data=False).graph.node} & DYNAMIC


def test_a_text_goes_on_until_the_graph_is_full() -> None:
    from dconv.export.prompt import Prompt

    ids = models.tokens(1, 5)
    whole = models.made("llama").runs.generated(Prompt("decoder", ids), ids)
    for sequence, past, reach in ((1, 8, 9), (11, 0, 11)):
        runs = Runs(fixed("llama", sequence, past, 18 if past else None).out)
        assert runs.generated(Prompt("decoder", ids), ids).tolist() == whole[:, :reach].tolist()
    with pytest.raises(Refused, match="no longer text"):
        runs.step(models.tokens(1, 12), None)


def test_any_world_writes_the_same_bytes(tmp_path: Path) -> None:
    one = fixed("llama", 11, 0)
    job = replace(one.job, request=replace(one.job.request, out=tmp_path / "out"))
    for rank in range(3):
        run(job, Settings(rank=rank, world=3))
    for path in one.out.glob("model.onnx*"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_what_there_is_not(tmp_path: Path) -> None:
    llama, bert = models.source("llama")[1], models.source("bert")[1]
    graph = models.made("llama").out
    refused: tuple[tuple[Path, dict[str, str], str], ...] = (
        (llama, {"lengths": "8", "quant": "int4"}, "compilers"),
        (bert, {"lengths": "8+8"}, "no cache"),
        (graph, {"lengths": "8"}, "written anew as it is"),
    )
    for source, options, said in refused:
        with pytest.raises(UsageError, match=said):
            dconv.plan(source, "onnx", tmp_path / "out", **options)
    for format in ("huggingface", "gguf", "torch_export"):
        with pytest.raises(UsageError, match="no lengths"):
            dconv.plan(llama, format, tmp_path / "out", lengths="8")
    assert (lengths("128"), lengths(7), lengths("1+1024"), lengths("4+0")) == ((128, 0), (7, 0), (1, 1024), (4, 0))
    for text in ("0", "0+4", "-1", "4+", "+4", "4+-1", "4x4", "1+2+3", "٣"):
        with pytest.raises(argparse.ArgumentTypeError):
            lengths(text)


def test_older_opsets_of_graphs_of_any_length(tmp_path: Path) -> None:
    _, folder = models.source("gemma")
    job = prepare(Request(folder, "onnx", tmp_path / "out", dtype="f32", opset=18))
    run(job, Settings())
    onnx.checker.check_model(str(tmp_path / "out" / "model.onnx"), full_check=True)
    ids = models.tokens(2, 7)
    found = Runs(tmp_path / "out").step(ids, None)[0]
    assert models.apart(found, models.theirs(models.source("gemma")[0], ids)) < BOUND


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_gelu_without_gelu(approximate: str, dtype: Any) -> None:
    whole = one_node("Gelu", dtype, approximate=approximate)
    model = in_opset_18(whole)
    onnx.checker.check_model(model, full_check=True)
    x = np.linspace(-6, 6, 64).astype(dtype)
    found, wanted = (
        np.asarray(onnxruntime.InferenceSession(one.SerializeToString()).run(None, {"x": x})[0], np.float64)
        for one in (model, whole)
    )
    assert np.abs(found - wanted).max() < (1e-6 if dtype == np.float32 else 1e-2)


def test_what_an_older_opset_lacks_is_refused() -> None:
    with pytest.raises(Refused, match="no form in that opset") as caught:
        in_opset_18(one_node("Swish", np.float32, 24))  # ONNX has it since 24
    assert "Swish" in str(caught.value)


def one_node(operation: str, dtype: Any, opset: int = 20, **attributes: Any) -> Any:
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    ports = [onnx.helper.make_tensor_value_info(name, kind, [64]) for name in ("x", "y")]
    node = onnx.helper.make_node(operation, ["x"], ["y"], **attributes)
    graph = onnx.helper.make_graph([node], "graph", ports[:1], ports[1:])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)


def in_opset_18(whole: Any) -> Any:
    import onnx_ir as ir

    model = ir.from_proto(onnx.shape_inference.infer_shapes(whole))
    onnx_opset.convert(model, 18)
    return ir.to_proto(model)
