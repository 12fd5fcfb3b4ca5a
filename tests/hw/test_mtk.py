"""FORMAT mtk: the closed repository's contract held by a stand-in, and each way in which it fails."""

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
from tests.arch.test_minicpm import write_model
from tests.hw.conftest import STAND_INS
from tests.models import tensors
from tests.oracles import hf

LITERT = Path(__file__).parents[2] / ".venvs" / "litert" / "bin" / "python"
SMALL = {"nsamples": 4, "seqlen": 32, "group_size": -1, "model_size": "0_5B"}


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of the repository, which says where it is."""
    monkeypatch.setenv("MTK_CLOUD_PATH", str(tmp_path / "mtk_cloud"))
    return Path(shutil.copytree(STAND_INS / "mtk_cloud", tmp_path / "mtk_cloud"))


@pytest.fixture(scope="session")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is calibrated on."""
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, 61, (8, 32)))
    return path


@pytest.fixture(scope="session")
def coded(llama: Path, ids: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model by GPTQ."""
    out = tmp_path_factory.mktemp("mtk") / "gptq"
    told = ["--calibration", str(ids), "--quantization-config", '{"nsamples": 4, "seqlen": 32, "group_size": -1}']
    assert main(["convert", str(llama), "gptq", "-o", str(out), "--quiet", *told]) == 0
    return out


def mtk(model: Path, out: Path, *options: str, chip: str = "MT6991", **settings: object) -> int:
    said = json.dumps({**SMALL, **settings})
    told = ["--platform", chip, "-o", str(out), "--quiet", "--quantization-config", said, *options]
    return main(["convert", str(model), "mtk", *told])


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"mtk_cloud", "llava"}


def variables(part: Path) -> dict[str, str]:
    """What the repository was told."""
    lines = part.read_bytes()[8:].decode().splitlines()
    return dict(line.split("=", 1) for line in lines)


@pytest.mark.usefixtures("cloud")
def test_parts_come_of_a_model_and_its_codes(llama: Path, ids: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert mtk(llama, out, "--calibration", str(ids), weight_bit=8, clen=1024) == 0
    said = manifest.checked(out)
    assert set(said["evidence"]["parts"]) == {"0_5B_decoder_part1of2.tflite", "0_5B_decoder_part2of2.tflite"}
    told = variables(out / "0_5B_decoder_part1of2.tflite")
    assert (told["PLATFORM"], told["MODEL_KIND"], told["WEIGHT_BIT"], told["CLEN"]) == ("MT6991", "word", "8", "1024")
    assert left(tmp_path) == {"out"}
    assert main(["check", str(out)]) == 0
    assert main(["convert", str(out), "hf2mtk", "-o", str(tmp_path / "again"), "--quiet"]) == 0
    assert manifest.checked(tmp_path / "again")["evidence"] == said["evidence"]


def test_a_bundle_is_compiled_where_the_repository_is(
    llama: Path, coded: Path, cloud: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MTK_CLOUD_PATH")
    assert mtk(llama, tmp_path / "out") == 7
    assert left(tmp_path) == set()
    assert mtk(llama, tmp_path / "out", "--bundle", gptq_path=str(coded)) == 0
    elsewhere = tmp_path / "else where"
    (tmp_path / "out").rename(elsewhere)
    assert tensors(elsewhere / "gptq") == tensors(coded)
    assert json.loads((elsewhere / "gptq" / "quantize_config.json").read_text())["bits"] == 4
    script = ["bash", str(elsewhere / "compile.sh")]
    assert subprocess.run(script, env={**os.environ}, capture_output=True, check=False).returncode
    subprocess.run(script, env={**os.environ, "MTK_CLOUD_PATH": str(cloud)}, check=True)
    assert variables(elsewhere / "out" / "0_5B_decoder_part2of2.tflite")["OUTPUT_DIR"] == f"{elsewhere}/out"
    with (elsewhere / "hf" / "model.safetensors").open("r+b") as file:
        file.truncate(4096)
    broken = subprocess.run(script, env={**os.environ, "MTK_CLOUD_PATH": str(cloud)}, capture_output=True, check=False)
    assert broken.returncode and b"model.safetensors" in broken.stdout + broken.stderr


@pytest.mark.parametrize("fold", [True, False])
def test_mup_is_folded_in_both_or_in_neither(ids: Path, tmp_path: Path, fold: bool) -> None:
    model = write_model(tmp_path / "minicpm", "minicpm", tie_word_embeddings=True)
    assert mtk(model, tmp_path / "out", "--bundle", "--calibration", str(ids), fold_mup=fold) == 0
    for role in ("hf", "gptq"):
        assert ("scale_emb" in json.loads((tmp_path / "out" / role / "config.json").read_text())) == (not fold)


@pytest.mark.parametrize(
    ("fails", "code", "words"),
    [
        ("crash", 7, "GATHER_ND"),
        ("hang", 7, "longer than it may"),
        ("disk-full", 5, "No space left"),
        ("exit-1", 7, "exit code 1"),
        ("exit-0-error", 6, "NaN in layer 3"),
        ("nothing", 6, "no .tflite"),
        ("zero-bytes", 6, "0 bytes"),
        ("too-few-parts", 6, "1 of 2 parts"),
        ("wrong-magic", 6, "at byte 4"),
        ("beside", 7, "beside the folder"),
    ],
)
@pytest.mark.usefixtures("cloud")
def test_a_failure_leaves_its_log_alone(
    fails: str, code: int, words: str, llama: Path, coded: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("STAND_IN_FAILS", fails)
    limit = "3" if fails == "hang" else "60"
    assert mtk(llama, tmp_path / "out", "--toolchain-timeout", limit, gptq_path=str(coded)) == code
    assert words in capsys.readouterr().err
    assert left(tmp_path) == {"out.compile.log"}


@pytest.mark.usefixtures("cloud")
@pytest.mark.parametrize(
    ("settings", "options", "code", "words"),
    [
        ({"model_size": None}, (), 2, "model_size cannot be this"),
        ({"model_size": "7B"}, (), 2, "model_size cannot be this"),
        ({"toolkit": "mtkcloud"}, (), 2, "toolkit cannot be this"),
        ({"weight_bits": 4}, (), 2, "did you mean weight_bit"),
        ({"platform": "MT6989"}, (), 2, "two chips"),
        ({}, ("--quant", "awq"), 2, "takes a GPTQ model"),
        ({}, ("--task", "image-text-to-text"), 3, "does not see"),
        ({}, ("--task", "text-generation", "--model-type", "image-classification"), 2, "two tasks"),
        ({"mtk_cloud_path": "/nowhere"}, (), 7, "no such folder"),
        ({"group_size": 512}, ("--calibration", "IDS"), 3, "no whole groups"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(
    settings: dict[str, object], options: tuple[str, ...], code: int, words: str, llama: Path, ids: Path,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    said = [str(ids) if word == "IDS" else word for word in options]
    assert mtk(llama, tmp_path / "out", *said, **settings) == code
    assert words in capsys.readouterr().err
    assert left(tmp_path) == set()


@pytest.mark.usefixtures("cloud")
def test_a_size_is_worked_out_and_a_chip_known(
    llama: Path, coded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["-o", str(tmp_path / "out"), "--quantization-config"]
    assert main(["convert", str(llama), "mtk", "--platform", "MT6991", *told, "{}"]) == 3
    assert "no size that mtk_cloud knows" in capsys.readouterr().err
    assert mtk(llama, tmp_path / "out", chip="MT6993") == 2
    bits = mtk(llama, tmp_path / "out", gptq_path=str(coded), weight_bit=8)
    assert (bits, left(tmp_path)) == (3, set())
    assert "other bits" in capsys.readouterr().err


def test_a_model_that_sees(coded: Path, cloud: Path, tmp_path: Path) -> None:
    llava = hf.save(hf.tiny("llava")[1], tmp_path / "llava")
    settings = {"gptq_path": str(coded), "mtk_cloud_path": str(cloud)}
    assert mtk(llava, tmp_path / "out", "--model-type", "image-classification", **settings) == 0
    assert len(manifest.checked(tmp_path / "out")["evidence"]["parts"]) == 3
    assert variables(tmp_path / "out" / "0_5B_vision.tflite")["MODEL_KIND"] == "multimodal"


def test_parts_that_another_tool_had_compiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in ("decoder_1of2.tflite", "decoder_2of2.tflite"):
        (theirs / name).write_bytes(b"\x1c\0\0\0TFL3" + bytes(24))
    told = ["mtk", "-o", str(tmp_path / "out"), "--quiet"]
    assert main(["convert", str(theirs), *told]) == 2
    assert "compiles for one chip" in capsys.readouterr().err
    assert main(["convert", str(theirs), *told, "--platform", "MT6989"]) == 0
    said = manifest.checked(tmp_path / "out")
    assert (said["platform"], len(said["files"])) == ("MT6989", 2)
    assert main(["check", str(tmp_path / "out")]) == 0
    (theirs / "decoder_2of2.tflite").write_bytes(b"")
    assert main(["convert", str(theirs), *told, "--platform", "MT6989", "--overwrite"]) == 6
    assert manifest.checked(tmp_path / "out") == said


def by_litert(model: Path, out: Path, **more: object) -> int:
    told = json.dumps({"toolkit": "litert", "sequence": 8, **more})
    settings = ["--quantization-config", told]
    return main(["convert", str(model), "mtk", "--platform", "MT6991", "-o", str(out), "--quiet", *settings])


@pytest.mark.skipif(not LITERT.exists(), reason="no LiteRT: bash scripts/toolchains.sh litert")
def test_no_npu_code_without_its_sdk(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert by_litert(llama, tmp_path / "out") == 7
    assert "MT6991" in (said := capsys.readouterr().err) and '"aot": false' in said
    assert left(tmp_path) == set()


@pytest.mark.long
@pytest.mark.skipif(not LITERT.exists(), reason="no LiteRT: bash scripts/toolchains.sh litert")
def test_a_tflite_in_public(llama: Path, tmp_path: Path) -> None:
    assert by_litert(llama, tmp_path / "out", aot=False) == 0
    found = manifest.checked(tmp_path / "out")
    assert found["evidence"]["compiled_for"] == "no NPU"
    assert found["evidence"]["agreement"]["serving_default"]["difference"] < 1e-4
    assert main(["check", str(tmp_path / "out")]) == 0
