"""What a graph's archive, or a file beside it, says of how it is run: taken, or refused before torch computes."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dconv.checkpoint.graphs import PORTS, Archive
from dconv.errors import Damaged, Refused, ToolMissing
from dconv.export import onnx_run
from dconv.export.genai import special_tokens
from dconv.export.graph_run import archive, loading, ports_of
from dconv.export.prompt import Prompt

TOKENS = {"name": "input_ids", "axes": ["batch", "sequence"], "dtype": "int64"}
LOGITS = {"name": "logits", "axes": ["batch", "sequence", 99], "dtype": "float32"}


def written(folder: Path, device: str) -> Archive:
    said = {"inputs": [TOKENS], "outputs": [LOGITS], "device": device}
    with zipfile.ZipFile(folder / "model.pt", "w") as file:
        for name, content in {"data.pkl": "", "code/x.py": "", "constants.pkl": "", "version": "3"}.items():
            file.writestr(f"model/{name}", content)
        file.writestr(f"model/extra/{PORTS}", json.dumps(said))
    return archive(folder / "model.pt", "torchscript")


@pytest.mark.parametrize(
    "change",
    [
        {}, {"dtype": "complex64"}, {"axes": ["batch", "length", 99]}, {"axes": ["batch", -1, 99]},
        {"axes": ["batch", 1.5, 99]}, {"axes": ["batch", None, 99]}, {"axes": 3},
    ],
)  # fmt: skip
def test_ports_are_those_of_a_graph_of_dconvs(change: dict[str, object], tmp_path: Path) -> None:
    found = written(tmp_path, "cpu")
    text = json.dumps({"inputs": [TOKENS], "outputs": [{**LOGITS, **change}]})
    if not change:
        assert ports_of(found, text).outputs[0].axes == ("batch", "sequence", 99)
        return
    with pytest.raises(Refused, match="does not say what it takes"):
        ports_of(found, text)


@pytest.mark.parametrize("device", ["auto", "cuda:x", "gpu", "cuda:-1"])
def test_a_graph_for_no_device_is_damaged(device: str, tmp_path: Path) -> None:
    with pytest.raises(Damaged, match="no device"), loading(written(tmp_path, device)):
        pass


def test_without_onnxruntime_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(ToolMissing, match="not installed"):
        onnx_run.can_infer(tmp_path, Prompt("decoder", np.zeros((1, 2), np.int64)))


def test_null_in_generation_config_says_nothing() -> None:
    config = {"bos_token_id": 5, "eos_token_id": 6, "vocab_size": 9}
    assert special_tokens(config, {"bos_token_id": None, "eos_token_id": [7, 8], "top_k": 3}) == {
        "bos_token_id": 5, "eos_token_id": [7, 8],
    }  # fmt: skip
