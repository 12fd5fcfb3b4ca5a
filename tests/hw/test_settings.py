"""What a person says of a compiler is taken at its word, refused, or of no use and said to be: never forgotten."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from dconv.cli import main
from dconv.errors import UsageError
from dconv.hw import mtk_contract, settings

#: A target, its settings, its key of the precision, and two precisions of it.
PRECISIONS = [
    ("ax", "AX650", {}, "weight_type", "s4", "s8"),
    ("neuron", "trn2", {}, "dtype", "fp8", "bf16"),
    ("rk", "RK3588", {"toolkit": "rkllm"}, "dtype", "fp16", "w8a8"),
    ("rk", "RK3588", {"toolkit": "rknn"}, "dtype", "fp16", "w8a8"),
    ("qnn", "SM8750", {}, "dtype", "fp16", "w8a16"),
    ("qnn", "SM8750", {"toolkit": "qairt"}, "dtype", "fp16", "w8a16"),
    ("mtk", "MT6991", {"toolkit": "litert"}, "weights", "f32", "int8"),
]
#: A target, its settings, and options that would change nothing.
IDLE = [
    ("ax", "AX650", {}, ["--calibration", "samples.txt"]),
    ("ax", "AX650", {}, ["--toolchain-python", "python3"]),
    ("ax", "AX650", {}, ["--task", "image-text-to-text"]),
    ("neuron", "trn2", {}, ["--calibration", "samples.txt"]),
    ("rk", "RK3588", {"toolkit": "rkllm", "dtype": "fp16"}, ["--calibration", "samples.txt"]),
    ("rk", "RK3588", {"toolkit": "rknn"}, ["--calibration", "samples.txt"]),
    ("qnn", "SM8750", {}, ["--calibration", "samples.txt"]),
    ("qnn", "SM8750", {"toolkit": "qairt"}, ["--calibration", "samples.txt"]),
    ("mtk", "MT6991", {"toolkit": "litert"}, ["--calibration", "samples.txt"]),
    ("mtk", "MT6991", {}, ["--toolchain-python", "python3"]),
    ("mtk", "MT6991", {"gptq_path": "there"}, ["--calibration", "samples.txt"]),
]


def hand(model: Path, out: Path, target: str, chip: str, said: Mapping[str, object], *options: str) -> int:
    told = ["--platform", chip, "--quantization-config", json.dumps(said), "-o", str(out), "--quiet"]
    return main(["convert", str(model), target, *told, "--bundle", *options])


@pytest.mark.parametrize(("target", "chip", "said", "key", "first", "second"), PRECISIONS)
def test_two_precisions_are_refused(
    target: str, chip: str, said: dict[str, object], key: str, first: str, second: str, llama: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert hand(llama, tmp_path / "out", target, chip, {**said, key: second}, "--quant", first) == 2
    shown = capsys.readouterr().err
    assert "two precisions are named" in shown
    assert f"{key}: {second}" in shown
    assert not list(tmp_path.iterdir())


def test_one_precision_may_be_said_twice(llama: Path, tmp_path: Path) -> None:
    assert hand(llama, tmp_path / "out", "ax", "AX650", {"weight_type": "s4"}, "--quant", "s4") == 0


@pytest.mark.parametrize(("target", "chip", "said", "options"), IDLE)
def test_an_option_that_changes_nothing_is_refused(
    target: str, chip: str, said: dict[str, object], options: list[str], llama: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert hand(llama, tmp_path / "out", target, chip, said, *options) == 2
    shown = capsys.readouterr().err
    assert "has no use for this" in shown
    assert options[0] in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [True, 1.0, "1"])
def test_what_equals_a_number_is_not_always_it(value: object) -> None:
    """In a command line ``-c True`` is no ``-c 1``."""
    known = {"check": settings.among(1, 0, 1, 2)}
    assert settings.settled({"check": 1}, known, "") == {"check": 1}
    with pytest.raises(UsageError, match="check cannot be this"):
        settings.settled({"check": value}, known, "")


@pytest.mark.parametrize(("rate", "told"), [(0, "0"), (5.0, "5"), (0.25, "0.25"), (12.3456789, "12.3456789")])
def test_a_number_is_told_as_it_was_said(rate: float, told: str) -> None:
    where = [Path("/work", name) for name in ("model", "gptq", "out")]
    said = mtk_contract.environment(
        mtk_contract.settled({"rate": rate}, ""), platform="MT6991", size="8B", multimodal=False, model=where[0],
        gptq=where[1], out=where[2],
    )  # fmt: skip
    assert said["RATE"] == told
