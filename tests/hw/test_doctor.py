"""``dconv doctor`` and ``dconv check``: what is here, and whether a hand-off is still what it was."""

from __future__ import annotations

import json
import re
import subprocess
import sys
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


def test_formats_lists_every_compiler_with_its_chips(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["formats", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["compile"]
    assert said.keys() == adapters().keys()
    assert "w4a16" in said["rk"]["platforms"]["RK3576"]
    assert main(["formats"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("hands over")]
    for name, adapter in adapters().items():
        for chip, what in adapter.platforms.items():
            (line,) = (one for one in lines if f" {name} --platform " in one and chip in re.split(r"[ ,]+", one))
            assert line.endswith(f"{adapter.title}: {what}")


def test_listing_formats_waits_for_no_framework() -> None:
    code = "import sys; from dconv.cli import main; main(['formats']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("kind", ["compiled", "bundle"])
def test_check_reads_a_hand_off_back(
    kind: str, llama: Path, rkllm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    told = ["--platform", "RK3576", "--toolchain-python", str(rkllm), *(["--bundle"] if kind == "bundle" else [])]
    assert main(["convert", str(llama), "rk", "-o", str(out), "--quiet", *told]) == 0
    assert main(["check", str(out)]) == 0
    assert f"{kind} for RK3576" in capsys.readouterr().out
    for option in (["--strict"], ["--drop", "*"], ["--from", "hf"], ["--max-memory", "1GB"]):
        assert main(["check", str(out), *option]) == 2
        assert option[0] in capsys.readouterr().err
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
