"""``--quant int4`` and ``int8`` of FORMAT onnx: onnxruntime's own quantiser makes the same bytes of the plain graph."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx
import torch
from onnx.external_data_helper import load_external_data_for_model
from onnx.numpy_helper import to_array

from dconv.codec import nbits
from tests.formats import onnx_models as models


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.long)])
def test_codes_are_those_of_onnxruntimes_quantiser(bits: int) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    plain = onnx.load(models.made("llama").out / "model.onnx")
    config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, bits=bits)
    quantiser = MatMulNBitsQuantizer(plain, algo_config=config)
    quantiser.process()
    wanted = {one.name: to_array(one) for one in quantiser.model.model.graph.initializer}
    graph = opened(models.made("llama", "f32", f"int{bits}"))
    named = {node.input[1]: node for node in graph.node if node.op_type == "MatMulNBits"}
    assert len(named) == 15  # seven in each layer, and the output layer
    weights = {one.name: to_array(one) for one in graph.initializer}
    for name, node in named.items():
        assert np.array_equal(weights[name], wanted[name]), name
        assert np.array_equal(weights[node.input[2]], wanted[node.input[2]]), name
    theirs = [node for node in quantiser.model.model.graph.node if node.op_type == "MatMulNBits"]
    said = [{a.name: a.i for a in node.attribute} for node in (*named.values(), *theirs)]
    assert sorted(map(str, said[: len(named)])) == sorted(map(str, said[len(named) :]))


@pytest.mark.parametrize(
    ("name", "bits"), [("llama", 4), ("llama", 8), pytest.param("gemma", 4, marks=pytest.mark.long)]
)
def test_graph_computes_what_the_codes_are_worth(name: str, bits: int) -> None:
    one = models.made(name, "f32", f"int{bits}")
    graph = opened(one)
    weights = {held.name: to_array(held) for held in graph.initializer}
    import copy

    model = copy.deepcopy(one.model)
    worth = {}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            columns = next(a.i for a in node.attribute if a.name == "K")
            codes = nbits.unpack(weights[node.input[1]].reshape(len(weights[node.input[1]]), -1), bits)
            worth[node.input[1].rpartition("_Q")[0]] = nbits.decode(codes, weights[node.input[2]], bits)[:, :columns]
    if name == "gemma":  # the output layer's codes are its own, the embedding stays
        model.lm_head.weight = torch.nn.Parameter(torch.from_numpy(worth.pop("model.embed_tokens.weight")))
    missing = model.load_state_dict({key: torch.from_numpy(value) for key, value in worth.items()}, strict=False)
    assert not missing.unexpected_keys
    ids = models.tokens(2, 9)
    assert models.apart(one.runs.step(ids, None)[0], models.theirs(model, ids)) < 1e-4
    assert models.apart(models.theirs(model, ids), models.theirs(one.model, ids)) > 1e-3


def opened(one: models.Made) -> onnx.GraphProto:
    model = onnx.load(one.out / "model.onnx", load_external_data=False)
    load_external_data_for_model(model, str(one.out))
    return model.graph
