"""What mtk_cloud is told and what it has to write; its stand-ins check the first and spoil the second in each way."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dconv.errors import DconvError, Refused, StorageFault, ToolMissing, UsageError, VerifyFailed
from dconv.hw import mtk_contract, process
from tests.hw.conftest import STAND_INS

GPTQ = Path(__file__).parents[1] / "quant" / "recorded" / "gptq"  # as GPTQModel wrote it
PART = b"\x1c\0\0\0TFL3" + b"x" * 24


def write_hf(folder: Path, config: Mapping[str, Any]) -> Path:
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"model.norm.weight": np.ones(4, np.float32)}, folder / "model.safetensors")
    return folder


@dataclass
class Bench:
    """A copy of the stand-in repository, and models for it."""

    repository: Path
    model: Path
    gptq: Path
    out: Path

    def told(self, given: Mapping[str, object] = {}, **other: Any) -> dict[str, str]:
        how = {"platform": "MT6991", "size": "0_5B", "multimodal": False, "model": self.model, "gptq": self.gptq}
        settled = mtk_contract.settled(given, "the test")
        return mtk_contract.environment(settled, **{**how, "out": self.out, **other})

    def run(self, told: Mapping[str, str], script: str = mtk_contract.LLM, timeout: float = 60, fails: str = "") -> str:
        return process.run(
            ["bash", str(self.repository / script)],
            self.out.with_name("compile.log"),
            cwd=self.repository,
            environment={**told, "STAND_IN_FAILS": fails},
            timeout=timeout,
            told=lambda line: None,
            stopped=lambda: False,
            words="mtk_cloud",
        ).log


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    repository, gptq = tmp_path / "mtk_cloud", tmp_path / "work" / "gptq"
    shutil.copytree(STAND_INS / "mtk_cloud", repository)
    shutil.copytree(GPTQ, gptq)
    config = json.loads((gptq / "config.json").read_text())
    (gptq / "quantize_config.json").write_text(json.dumps(mtk_contract.quantize_config(config)))
    (tmp_path / "work" / "out").mkdir()
    return Bench(
        repository, write_hf(tmp_path / "work" / "hf", {"model_type": "llama"}), gptq, tmp_path / "work" / "out"
    )


def test_all_that_is_told() -> None:
    """Names and values of the public wrapper's ``_setup_mtk_environment``, paths aside."""
    settled = mtk_contract.settled({}, "nowhere")
    told = mtk_contract.environment(
        settled, platform="MT6991", size="1_2B", multimodal=False, model=Path("/m"), gptq=Path("/g"), out=Path("/o")
    )
    assert told == {
        "MODEL_PATH": "/m", "GPTQ_MODELPATH": "/g", "OUTPUT_DIR": "/o", "PLATFORM": "MT6991", "MODEL_KIND": "word",
        "MODEL_SIZE": "1_2B", "WEIGHT_BIT": "4", "CLEN": "512", "PLEN": "128", "CLOUD_WEIGHT_NUM": "1024",
        "CLOUD_ACT_NUM": "256", "MTK_BATCH_SIZE": "2", "DISABLE_PGPTQ": "false", "IS_LLAMA": "false", "RATE": "0",
        "SKIP_ENV_SETUP": "true", "USE_OPTIMIZED_CONVERT": "true", "CONDA_ENV": "SKIP_CONDA_ACTIVATION",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"clen": 1024, "plen": 1024}, "PLEN", "1024"),
        ({"disable_pgptq": True}, "DISABLE_PGPTQ", "true"),
        ({"rate": 0.25}, "RATE", "0.25"),
        ({"weight_bit": 8}, "WEIGHT_BIT", "8"),
        ({"conda_env": "np8"}, "CONDA_ENV", "np8"),
        ({}, "CONDA_ENV", "from outside"),
    ],
)
def test_settings_become_variables(bench: Bench, given: dict[str, object], name: str, value: str) -> None:
    assert bench.told(given, inherited={"CONDA_ENV": "from outside", "CLEN": "7"})[name] == value


@pytest.mark.parametrize(
    "given",
    [
        {"clenn": 512},
        {"clen": "512"},
        {"clen": 0},
        {"clen": True},
        {"clen": 64, "plen": 65},
        {"weight_bit": 3},
        {"disable_pgptq": "no"},
        {"model_size": "7B"},
        {"rate": -1},
        {"conda_env": ""},
        {"output_dir": "/elsewhere"},
        {"parts": 0},
    ],
)
def test_settings_that_cannot_be(given: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="nothing was written"):
        mtk_contract.settled(given, "--quantization-config")


@pytest.mark.parametrize(
    "other",
    [
        {"platform": "MT6993"},
        {"platform": "mt6991"},
        {"size": "7B"},
        {"model": Path("relative")},
        {"out": Path("/a\nPLATFORM=MT6989")},
        {"gptq": Path("/one"), "model": Path("/one")},
    ],
)
def test_terms_that_cannot_be(bench: Bench, other: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="nothing was written"):
        bench.told(**other)


@pytest.mark.parametrize(
    ("billions", "size"),
    [(0.434, "0_5B"), (0.494, "0_5B"), (0.58, "0_58B"), (0.9, "0_9B"), (1.36, "1_2B"), (1.24, "1_2B"), (1.54, "1_6B"),
     (8.03, "8B"), (8.19, "8B")],
)  # fmt: skip
def test_size_by_parameters(billions: float, size: str) -> None:
    assert mtk_contract.model_size(int(billions * 1e9)) == size


@pytest.mark.parametrize("parameters", [0, 135_000_000, 720_000_000, 3_000_000_000, 6_740_000_000, 13_000_000_000])
def test_no_size_is_guessed(parameters: int) -> None:
    with pytest.raises(Refused, match="no size") as refusal:
        mtk_contract.model_size(parameters)
    assert "model_size" in refusal.value.do
    assert mtk_contract.model_size(parameters, "8B") == "8B"


def test_an_unknown_size_is_not_taken() -> None:
    with pytest.raises(UsageError, match="no such size"):
        mtk_contract.model_size(500_000_000, "0.5B")


@pytest.mark.parametrize(
    ("config", "task", "sees"),
    [
        ({"model_type": "llama"}, None, False),
        ({"model_type": "llava", "vision_config": {"hidden_size": 8}}, None, True),
        ({"model_type": "minicpmv", "vision_encoder": "siglip"}, None, True),
        ({"model_type": "llama", "vision_config": None}, None, False),
        ({"model_type": "llava", "vision_config": {"hidden_size": 8}}, "text-generation", False),
        ({"model_type": "llava", "vision_config": {"hidden_size": 8}}, "image-text-to-text", True),
    ],
)
def test_word_or_multimodal(config: dict[str, Any], task: str | None, sees: bool) -> None:
    assert mtk_contract.is_multimodal(config, task) is sees


def test_tasks_that_cannot_be() -> None:
    with pytest.raises(Refused, match="does not see"):
        mtk_contract.is_multimodal({"model_type": "llama"}, "image-text-to-text")
    with pytest.raises(UsageError, match="no such task"):
        mtk_contract.is_multimodal({}, "image-classification")


def test_the_option_is_before_the_variable(bench: Bench) -> None:
    environment = {**os.environ, mtk_contract.VARIABLE: "/nowhere"}
    found = mtk_contract.repository(str(bench.repository), environment, multimodal=False)
    assert (found.path, found.script.name) == (bench.repository, mtk_contract.LLM)
    environment[mtk_contract.VARIABLE] = str(bench.repository)
    assert mtk_contract.repository(None, environment, multimodal=True).script.name == mtk_contract.VLM


def test_an_option_that_leads_nowhere_is_not_replaced_by_the_variable(bench: Bench) -> None:
    with pytest.raises(ToolMissing, match="not mtk_cloud"):
        mtk_contract.repository(
            "/nowhere", {**os.environ, mtk_contract.VARIABLE: str(bench.repository)}, multimodal=False
        )


@pytest.mark.parametrize("spoil", ["none", "folder", "script", "empty", "grammar", "unreadable"])
def test_a_repository_is_known_by_its_content(bench: Bench, spoil: str) -> None:
    script = bench.repository / mtk_contract.LLM
    if spoil == "folder":
        shutil.rmtree(bench.repository)
    elif spoil == "script":
        script.unlink()
    elif spoil == "empty":
        script.write_text("\n")
    elif spoil == "grammar":
        script.write_text("if true; then\n")  # half of a download
    elif spoil == "unreadable":
        if os.geteuid() == 0:
            pytest.skip("root reads everything")
        script.chmod(stat.S_IWUSR)
    with pytest.raises(ToolMissing, match="nothing was written"):
        mtk_contract.repository(None if spoil == "none" else str(bench.repository), {"PATH": os.environ["PATH"]},
                                multimodal=False)  # fmt: skip


def test_gptq_folders(bench: Bench) -> None:
    mtk_contract.require_gptq(bench.gptq, 4)
    with pytest.raises(Refused, match="other bits"):
        mtk_contract.require_gptq(bench.gptq, 8)
    with pytest.raises(Refused, match="no GPTQ model"):
        mtk_contract.require_gptq(bench.model, 4)
    for config in ({}, {"quantization_config": {"quant_method": "awq", "bits": 4}}):
        with pytest.raises(Refused, match="no GPTQ model"):
            mtk_contract.quantize_config(config)


def test_the_whole_way(bench: Bench) -> None:
    told = bench.told({"clen": 256})
    log = bench.run(told)
    evidence = mtk_contract.judge(bench.out, log=log)
    parts = sorted(bench.out.iterdir())
    assert list(evidence["parts"]) == [path.name for path in parts] and len(parts) == 2
    assert all(f"{name}={value}\n".encode() in parts[0].read_bytes() for name, value in told.items())


def test_the_whole_way_of_a_model_that_sees(bench: Bench) -> None:
    config = json.loads((bench.model / "config.json").read_text())
    told = bench.told(multimodal=True)
    with pytest.raises(ToolMissing, match=r"exit code 2"):
        bench.run(told, mtk_contract.VLM)
    (bench.model / "config.json").write_text(json.dumps({**config, "vision_config": {"hidden_size": 8}}))
    log = bench.run(told, mtk_contract.VLM)
    assert len(mtk_contract.judge(bench.out, parts=3, log=log)["parts"]) == 3


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("MODEL_PATH", "/nowhere"),
        ("GPTQ_MODELPATH", "relative"),
        ("OUTPUT_DIR", "/nowhere"),
        ("PLATFORM", "MT6993"),
        ("MODEL_KIND", "multimodal"),
        ("MODEL_SIZE", "7B"),
        ("CLEN", "64"),
        ("MTK_BATCH_SIZE", "0"),
        ("IS_LLAMA", "False"),
        ("RATE", ""),
        ("CONDA_ENV", ""),
    ],
)
def test_the_stand_in_holds_callers_to_each_variable(bench: Bench, name: str, wrong: str) -> None:
    with pytest.raises(ToolMissing, match="exit code 2") as failed:
        bench.run({**bench.told(), name: wrong})
    assert name in failed.value.found
    assert not any(bench.out.iterdir())


def test_the_stand_in_holds_callers_to_its_models(bench: Bench) -> None:
    for name in ("quantize_config.json", "model.safetensors"):
        (bench.gptq / name).rename(bench.gptq / "away")
        with pytest.raises(ToolMissing, match="exit code 2") as failed:
            bench.run(bench.told())
        assert "GPTQ_MODELPATH" in failed.value.found or "no weights" in failed.value.found
        (bench.gptq / "away").rename(bench.gptq / name)
    with pytest.raises(ToolMissing, match="exit code 2"):
        bench.run(bench.told({"weight_bit": 8}))


def test_the_stand_in_wants_an_empty_folder(bench: Bench) -> None:
    (bench.out / "old.tflite").write_bytes(PART)
    with pytest.raises(ToolMissing, match="exit code 2"):
        bench.run(bench.told())


@pytest.mark.parametrize(
    ("fails", "error", "words"),
    [
        ("crash", ToolMissing, "GATHER_ND"),
        ("disk-full", StorageFault, "No space left"),
        ("exit-1", ToolMissing, "finished successfully"),
        ("exit-0-error", VerifyFailed, "NaN in layer 3"),
        ("nothing", VerifyFailed, "no .tflite"),
        ("zero-bytes", VerifyFailed, "part2of2.tflite: 0 bytes"),
        ("too-few-parts", VerifyFailed, "1 of 2 parts"),
        ("wrong-magic", VerifyFailed, "at byte 4"),
        ("beside", VerifyFailed, "no .tflite"),
    ],
)
def test_each_way_to_fail_is_told(bench: Bench, fails: str, error: type[DconvError], words: str) -> None:
    with pytest.raises(error) as failed:
        log = bench.run(bench.told(), fails=fails)
        mtk_contract.judge(bench.out, log=log)
    assert words in str(failed.value)


def test_a_compiler_that_hangs_is_ended_with_its_children(bench: Bench) -> None:
    with pytest.raises(ToolMissing, match="longer than it may"):
        bench.run(bench.told(), timeout=1, fails="hang")


def test_an_unknown_way_to_fail_is_no_success(bench: Bench) -> None:
    with pytest.raises(ToolMissing, match="exit code 64"):
        bench.run(bench.told(), fails="zero_bytes")


@pytest.mark.parametrize(
    ("files", "parts", "words"),
    [
        ({"model.tflite": PART}, None, ""),
        ({"model.tflite": PART, "embedding.bin": b"x", "compile.log": b""}, 1, ""),
        ({"deep/0of2.tflite": PART, "deep/1of2.tflite": PART}, None, ""),
        ({"model.tflite": PART}, 2, "1 of 2"),
        ({"a.tflite": PART, "b.tflite": PART}, 1, "2 of 1"),
        ({"00002-of-00002.tflite": PART}, None, "1 of 2"),
        ({"model.tflite": PART, "embedding.bin": b""}, None, "embedding.bin: 0 bytes"),
        ({"model.tflite": PART[:6]}, None, "at byte 4"),
        ({"model.bin": PART}, None, "no .tflite"),
        ({"model.tflite": b"TFL3" + PART[:4]}, None, "at byte 4"),
        ({}, None, "no .tflite"),
    ],
)
def test_parts(tmp_path: Path, files: dict[str, bytes], parts: int | None, words: str) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    if not words:
        found = mtk_contract.judge(tmp_path, parts=parts, own=("compile.log",))["parts"]
        assert found == {name: len(content) for name, content in files.items() if name.endswith(".tflite")}
        return
    with pytest.raises(VerifyFailed) as failed:
        mtk_contract.judge(tmp_path, parts=parts, own=("compile.log",))
    assert words in failed.value.found


def test_a_link_is_no_part(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.tflite").write_bytes(PART)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.tflite").symlink_to(tmp_path / "elsewhere.tflite")
    with pytest.raises(VerifyFailed, match="not whole"):
        mtk_contract.judge(tmp_path / "out")


@pytest.mark.parametrize("log", ["Killed", "run.sh: line 3: 77 Segmentation fault (core dumped) python convert.py",
                                 "x.sh: line 9: neuronc: command not found"])  # fmt: skip
def test_a_step_that_failed_is_no_success(tmp_path: Path, log: str) -> None:
    (tmp_path / "model.tflite").write_bytes(PART)
    mtk_contract.judge(tmp_path, log="W: error correction is off, 0 errors\nConversion finished")
    with pytest.raises(VerifyFailed, match="a step of it failed"):
        mtk_contract.judge(tmp_path, log=f"start\n{log}\nConversion finished successfully\n")
