"""A small model to hand over, and toolchains' interpreters that are stand-ins."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from dconv.arch import registry
from tests.models import config_of, write_random
from tests.oracles import hf

STAND_INS = Path(__file__).with_name("stand_ins")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf.save(hf.tiny("llama", num_hidden_layers=2)[1], tmp_path_factory.mktemp("hw") / "llama")


@pytest.fixture(scope="session")
def minicpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With muP scalars."""
    family = registry.by_name("minicpm")
    return write_random(tmp_path_factory.mktemp("hw") / "minicpm", family, config_of(family))


@pytest.fixture
def rkllm(tmp_path: Path) -> Path:
    """An interpreter that has RKLLM's toolkit, as far as anyone can see."""
    packages = tmp_path / "toolchain"
    (packages / "rkllm").mkdir(parents=True)
    (packages / "rkllm" / "__init__.py").touch()
    shutil.copyfile(STAND_INS / "rkllm" / "api.py", packages / "rkllm" / "api.py")
    (packages / "rkllm" / "librkllm.so").write_bytes(b"\x7fELF stand-in")
    information = packages / "rkllm_toolkit-1.3.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: rkllm-toolkit\nVersion: 1.3.0\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{packages}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python


@pytest.fixture
def neuron(tmp_path: Path) -> Path:
    return neuron_in(tmp_path)


def neuron_in(folder: Path) -> Path:
    """An interpreter that has NxD Inference, as far as anyone can see."""
    packages, bins = folder / "toolchain", folder / "toolchain" / "bin"
    nxd = packages / "neuronx_distributed_inference"
    for package in (bins, nxd / "models", packages / "torch_neuronx", packages / "neuronx_distributed"):
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
    (nxd / "__init__.py").touch()
    shutil.copyfile(STAND_INS / "neuron" / "inference_demo.py", nxd / "inference_demo.py")
    shutil.copyfile(STAND_INS / "neuron" / "application_base.py", nxd / "models" / "application_base.py")
    for name, version in (
        ("neuronx-distributed-inference", "0.9.0"), ("neuronx-distributed", "0.18.0"),
        ("torch-neuronx", "2.9.0.2.12.0"), ("neuronx-cc", "2.23.1"),
    ):  # fmt: skip
        information = packages / f"{name.replace('-', '_')}-{version}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    compiler = bins / "neuronx-cc"
    compiler.write_text("#!/bin/sh\necho NeuronX Compiler version 2.23.1+stand-in\n")
    compiler.chmod(0o755)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPATH="{bins}:$PATH" PYTHONPATH="{packages}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python
