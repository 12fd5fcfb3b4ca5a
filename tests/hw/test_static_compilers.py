"""FORMAT rk (RKNN) and qnn: the vendors' compilers take dconv's graphs; where there is a simulator, it agrees."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dconv.cli import main
from dconv.hw import manifest

ROOT = Path(__file__).parents[2]
DRIVERS = ROOT / "dconv/hw/drivers"


def needs(name: str) -> pytest.MarkDecorator:
    made = (ROOT / ".venvs" / name / "toolchain-installed").exists()
    return pytest.mark.skipif(not made, reason=f"the compiler is not here: bash scripts/toolchains.sh {name}")


def hand(model: Path, target: str, out: Path, chip: str, settings: dict[str, object], *options: str) -> int:
    said = ["--quantization-config", json.dumps(settings)]
    return main(["convert", str(model), target, "--platform", chip, "-o", str(out), "--quiet", *said, *options])


def text(model: Path, length: int) -> np.ndarray:
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    return np.random.default_rng(0).integers(0, vocabulary, (1, length), np.int64)


def expected(model: Path, tokens: np.ndarray) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        return net(torch.from_numpy(tokens)).logits.numpy()


@needs("qnn")
def test_qualcomm_compiles_for_two_chips(llama: Path, tmp_path: Path) -> None:
    binaries = {}
    for chip, number in (("SM8750", 69), ("SM8650", 57)):
        assert hand(llama, "qnn", tmp_path / chip, chip, {"sequence": 16}) == 0
        said = manifest.checked(tmp_path / chip)
        assert said["evidence"]["operators"] == {"EPContext": 1}
        assert (said["evidence"]["chip"], said["evidence"]["soc_model"]) == (chip, number)
        binaries[chip] = (tmp_path / chip / "model_ctx_qnn.bin").read_bytes()
        assert f"soc_type={chip};".encode() in binaries[chip]
    assert binaries["SM8750"] != binaries["SM8650"]
    assert main(["check", str(tmp_path / "SM8750")]) == 0


@needs("qnn")
def test_qualcomm_takes_a_cache(llama: Path, tmp_path: Path) -> None:
    assert hand(llama, "hf2qnn", tmp_path / "out", "SM8750", {"sequence": 1, "past": 32}) == 0
    inputs = manifest.read(tmp_path / "out")["evidence"]["inputs"]
    assert inputs["attention_mask"] == [1, 33]
    assert inputs["past_key_values.1.value"][2] == 32


@pytest.mark.parametrize(
    ("target", "chip", "settings", "code", "words"),
    [
        ("qnn", "SM1", {}, 2, "compiles for one chip"),
        ("qnn", "SM7550", {}, 3, "no half precision"),
        ("qnn", "SM8750", {"dtype": "w8a16", "past": 8}, 3, "a cache of 8 tokens"),
        ("qnn", "SM8750", {"dtype": "int4"}, 2, "dtype cannot be this"),
        ("qnn", "SM8750", {"sequence": 0}, 2, "a whole number from 1"),
        ("rk", "RK3588", {"toolkit": "rknn", "dtype": "w4a16"}, 3, "does not compute in w4a16"),
        ("rk", "RK3588", {"toolkit": "rkn"}, 2, "toolkit cannot be this"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(
    target: str, chip: str, settings: dict[str, object], code: int, words: str, llama: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert hand(llama, target, tmp_path / "out", chip, settings, "--bundle") == code
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def simulated(bundle: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the vendor's simulator says of what a bundle compiles."""
    np.savez(bundle / "inputs.npz", **inputs)
    job = json.loads((bundle / "job.json").read_text())
    job["source"]["inputs"], job["out"] = "inputs.npz", "simulated"
    (bundle / "run.json").write_text(json.dumps(job))
    python = ROOT / ".venvs/rknn/bin/python"
    done = subprocess.run(
        [python, bundle / "rknn_driver.py", "run", bundle / "run.json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return dict(np.load(bundle / "simulated" / "outputs.npz"))


@needs("rknn")
def test_rockchip_compiles_and_its_simulator_agrees(llama: Path, tmp_path: Path) -> None:
    settings = {"toolkit": "rknn", "sequence": 16}
    assert hand(llama, "rk", tmp_path / "out", "RK3588", settings) == 0
    said = manifest.checked(tmp_path / "out")
    assert said["files"]["model.rknn"]["bytes"] == said["evidence"]["bytes"] > 0
    assert hand(llama, "rk", tmp_path / "bundle", "RK3588", settings, "--bundle") == 0
    tokens = text(llama, 16)
    inputs = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "position_ids": np.arange(16)[None]}
    found, wanted = simulated(tmp_path / "bundle", inputs)["logits"], expected(llama, tokens)
    assert np.abs(found - wanted).max() / np.abs(wanted).max() < 2e-2  # the NPU computes in half precision


def test_masks_leave_room_for_codes(llama: Path, tmp_path: Path) -> None:
    """Scores and masks share a scale: -16384 among them, 8 bits would have one code for all that is seen."""
    import onnx
    import onnxruntime

    settings = {"toolkit": "rknn", "sequence": 16, "dtype": "w8a8", "nsamples": 2}
    tokens = text(llama, 16)
    np.save(tmp_path / "ids.npy", tokens[0].repeat(4))
    told = ["--bundle", "--calibration", str(tmp_path / "ids.npy")]
    assert hand(llama, "rk", tmp_path / "bundle", "RK3588", settings, *told) == 0
    path = tmp_path / "bundle" / "onnx" / "model.onnx"
    graph = onnx.load(path, load_external_data=False).graph
    inside = [onnx.numpy_helper.to_array(it) for it in graph.initializer if not it.external_data]
    assert min(it.min() for it in inside if it.dtype == np.float32 and it.size) == -128
    inputs = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "position_ids": np.arange(16)[None]}
    found = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["logits"], inputs)[0]
    assert np.abs(found - expected(llama, tokens)).max() < 1e-4  # type: ignore[operator]


@needs("rknn")
def test_rockchip_finds_codes_by_calibration(llama: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "ids.npy"
    np.save(tokens, np.random.default_rng(1).integers(0, 300, 400))
    settings = {"toolkit": "rknn", "sequence": 8, "dtype": "w8a8", "nsamples": 4}
    assert hand(llama, "rk", tmp_path / "out", "RK3576", settings, "--calibration", str(tokens)) == 0
    assert manifest.checked(tmp_path / "out")["settings"]["dtype"] == "w8a8"
