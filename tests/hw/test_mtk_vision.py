"""FORMAT mtk of models that see: the GPTQ form is made on the way, and the repository's other script compiles."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dconv.cli import main
from dconv.hw import manifest
from tests.hw.conftest import STAND_INS
from tests.models import tensors
from tests.oracles import hf, minicpmv

_SETTINGS = {"nsamples": 4, "seqlen": 32, "group_size": -1, "model_size": "1_2B"}


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is calibrated on."""
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, 300, (8, 32)))
    return path


def told(ids: Path, chip: str, **settings: object) -> list[str]:
    said = json.dumps({**_SETTINGS, **settings})
    return ["--platform", chip, "--calibration", str(ids), "--quantization-config", said, "--quiet"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("seeing")
    config, sees = minicpmv.tiny(num_hidden_layers=2)
    text = {**hf.SIZES, "num_hidden_layers": 2, "model_type": "llama"}
    return {
        "llava": hf.save(hf.tiny("llava", text_config=text)[1], folder / "llava"),
        "minicpmv": minicpmv.save(config, sees, folder / "minicpmv"),
    }


@pytest.mark.parametrize("name", ["llava", "minicpmv"])
def test_a_bundle_has_the_model_and_its_codes(name: str, models: dict[str, Path], ids: Path, tmp_path: Path) -> None:
    cloud, out = shutil.copytree(STAND_INS / "mtk_cloud", tmp_path / "mtk_cloud"), tmp_path / "out"
    assert main(["convert", str(models[name]), "mtk", "-o", str(out), "--bundle", *told(ids, "MT6991")]) == 0
    theirs = tensors(models[name])
    if name == "llava":  # under the names of the hub
        theirs = {part.replace("vision_tower.", "vision_tower.vision_model."): it for part, it in theirs.items()}
    assert tensors(out / "hf") == theirs
    prefix = {"llava": "language_model.model.layers.", "minicpmv": "llm.model.layers."}[name]
    codes = [part for part in tensors(out / "gptq") if part.endswith(".qweight")]
    assert len(codes) == 14
    assert all(part.startswith(prefix) for part in codes)
    said = json.loads((out / "gptq" / "quantize_config.json").read_text())
    assert (said["bits"], said["group_size"]) == (4, -1)
    environment = {**os.environ, "MTK_CLOUD_PATH": str(cloud)}
    subprocess.run(["bash", str(out / "compile.sh")], env=environment, check=True, capture_output=True)
    vision = (out / "out" / "1_2B_vision.tflite").read_bytes()[8:].decode()
    assert "MODEL_KIND=multimodal" in vision.splitlines()
    assert (out / "out" / "1_2B_decoder_part2of2.tflite").exists()


@pytest.mark.parametrize("name", ["llava", "minicpmv"])
def test_compiled_where_the_repository_is(
    name: str, models: dict[str, Path], ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTK_CLOUD_PATH", str(STAND_INS / "mtk_cloud"))
    words = ["mtk", "-o", str(tmp_path / "out"), *told(ids, "MT6989", weight_bit=8)]
    assert main(["convert", str(models[name]), *words]) == 0
    parts = manifest.checked(tmp_path / "out")["evidence"]["parts"]
    assert len(parts) == 3
    assert "1_2B_vision.tflite" in parts
