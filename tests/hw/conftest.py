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
