"""FORMAT ax: Pulsar2's contract held by a stand-in, and each way in which it fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dconv.cli import main
from dconv.hw import manifest
from dconv.hw.ax import EMBEDDING
from tests.hw.conftest import STAND_INS
from tests.models import tensors


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """pulsar2 on PATH."""
    monkeypatch.setenv("PATH", f"{STAND_INS / 'bin'}:{os.environ['PATH']}")


def ax(model: Path, out: Path, *options: str, chip: str = "AX650") -> int:
    return main(["convert", str(model), "ax", "--platform", chip, "-o", str(out), "--quiet", *options])


@pytest.mark.usefixtures("here")
def test_layers_the_output_layer_and_the_embedding_are_there(llama: Path, tmp_path: Path) -> None:
    assert ax(llama, tmp_path / "out", "--quant", "s4") == 0
    said = manifest.checked(tmp_path / "out")
    assert said["settings"]["weight_type"] == "s4"
    assert said["evidence"]["layers"] == 2
    assert sum(name.endswith(".axmodel") for name in said["files"]) == 3
    assert main(["convert", str(llama), "hf", "--dtype", "bf16", "-o", str(tmp_path / "hf"), "--quiet"]) == 0
    dtype, _, rows = tensors(tmp_path / "hf")["model.embed_tokens.weight"]
    assert dtype == "BF16"
    assert (tmp_path / "out" / EMBEDDING).read_bytes() == rows
    assert main(["check", str(tmp_path / "out")]) == 0


@pytest.mark.usefixtures("here")
def test_mup_is_folded_and_its_fields_are_gone(minicpm: Path, tmp_path: Path) -> None:
    assert ax(minicpm, tmp_path / "out") == 0
    assert manifest.read(tmp_path / "out")["facts"]["mup"] == "folded"
    assert "scale_emb" not in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize(
    ("fails", "code", "words"),
    [
        ("type", 7, "model_type error llama"),
        ("memory", 7, "memory ran out"),
        ("hang", 7, "longer than it may"),
        ("few", 6, "parts of the model are missing"),
        ("post", 6, "no output layer"),
        ("empty", 6, "are empty"),
        ("silent", 6, "build llm model done!"),
        ("unchecked", 6, "check llm model done!"),
    ],
)
@pytest.mark.usefixtures("here")
def test_a_failure_leaves_its_log_alone(
    fails: str, code: int, words: str, llama: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("STAND_IN_FAILS", fails)
    assert ax(llama, tmp_path / "out", "--toolchain-timeout", "3" if fails == "hang" else "60") == code
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out.compile.log"]


@pytest.mark.parametrize(
    ("images", "named", "found"),
    [
        ("pulsar2:6.0", None, "pulsar2:6.0"),
        ("ubuntu:22.04", None, None),
        ("pulsar2:5.1 pulsar2:6.0", None, None),
        ("pulsar2:5.1 vendor/pulsar2:6.0", "vendor/pulsar2:6.0", "vendor/pulsar2:6.0"),
        ("pulsar2:6.0", "pulsar2:7.0", None),
    ],
)
def test_the_image_that_is_meant(
    images: str, named: str | None, found: str | None, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    lines = "".join(f"echo {image}; " for image in images.split())
    run = 'while [ "$1" != pulsar2 ]; do shift; done; shift; export FLOAT_MATMUL_USE_CONV_EU=1'
    stand_in = f'{run}; exec "{STAND_INS / "bin" / "pulsar2"}" "$@"'
    docker.write_text(f'#!/bin/bash\nif [ "$1" = image ]; then {lines}true; else {stand_in}; fi\n')
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{docker.parent}:{os.environ['PATH']}")
    if named is not None:
        monkeypatch.setenv("PULSAR2_IMAGE", named)
    assert ax(llama, tmp_path / "out") == (7 if found is None else 0)
    if found is None:
        assert "docker has" in capsys.readouterr().err
        assert {path.name for path in tmp_path.iterdir()} == {"bin"}
    else:
        assert manifest.read(tmp_path / "out")["toolchain"]["image"] == found


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--quant", "s2"], 2, "weight_type cannot be this"),
        (["--quantization-config", '{"prefill_len": 2048}'], 3, "no longer than the context"),
        (["--dtype", "f16"], 2, "in bf16"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(
    options: list[str], code: int, words: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ax(llama, tmp_path / "out", "--bundle", *options) == code
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("docker", "words"), [("", "neither pulsar2 nor docker"), ("exit 1", "does not answer")])
def test_without_the_compiler_nothing_is_left(
    docker: str, words: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "bin").mkdir()
    if docker:
        (tmp_path / "bin" / "docker").write_text(f"#!/bin/sh\n{docker}\n")
        (tmp_path / "bin" / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert ax(llama, tmp_path / "out") == 7
    assert words in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"bin"}
