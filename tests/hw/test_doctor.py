"""``dconv doctor`` and ``dconv check``: what is here, and whether a hand-off is still what it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dconv.cli import main
from dconv.hw.registry import adapters


def test_doctor_names_every_compiler_and_how_to_get_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for name, adapter in adapters().items():
        assert f"{name}  {adapter.title}: " in said
        assert all(chip in said for chip in adapter.platforms)


def test_doctor_finds_a_toolchain_where_it_is_told_to_look(rkllm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def found(*options: str) -> object:
        assert main(["doctor", "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)["compilers"]["rk"]["found"]

    assert found() != "RKLLM 1.3.0"
    assert found("--toolchain-python", str(rkllm)) == "RKLLM 1.3.0"


@pytest.mark.parametrize("kind", ["compiled", "bundle"])
def test_check_reads_a_hand_off_back(
    kind: str, llama: Path, rkllm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    told = ["--platform", "RK3576", "--toolchain-python", str(rkllm), *(["--bundle"] if kind == "bundle" else [])]
    assert main(["convert", str(llama), "rk", "-o", str(out), "--quiet", *told]) == 0
    assert main(["check", str(out)]) == 0
    assert f"{kind} for RK3576" in capsys.readouterr().out
    (out / "more").touch()
    assert main(["check", str(out)]) == 4
    assert "more: not of it" in capsys.readouterr().err
    (out / "more").unlink()
    file = out / ("job.json" if kind == "bundle" else "model.rkllm")
    file.write_bytes(file.read_bytes() + b" ")
    assert main(["check", str(out)]) == 4
    assert file.name in capsys.readouterr().err


def test_plan_says_what_would_be_handed_over(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(llama), "rk", "--platform", "RK3588", "--quant", "w8a8_g128", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["settings"]["dtype"] == "w8a8_g128"
    assert said["artifacts"] == {"hf": "huggingface"}
    assert said["toolchain"] is None
    assert "rkllm-toolkit" in said["lacks"]
