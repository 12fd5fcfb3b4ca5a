"""A small model to hand over, and toolchains' interpreters that are stand-ins."""

from __future__ import annotations

from pathlib import Path

import pytest

from dconv.arch import registry
from tests.hw import stand_ins
from tests.models import config_of, write_random
from tests.oracles import hf

STAND_INS = stand_ins.HERE


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf.save(hf.tiny("llama", num_hidden_layers=2)[1], tmp_path_factory.mktemp("hw") / "llama")


@pytest.fixture(scope="session")
def minicpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With muP scalars."""
    family = registry.by_name("minicpm")
    return write_random(tmp_path_factory.mktemp("hw") / "minicpm", family, config_of(family), small=True)


@pytest.fixture
def rkllm(tmp_path: Path) -> Path:
    """An interpreter that has RKLLM's toolkit, as far as anyone can see."""
    return stand_ins.python("rkllm", tmp_path)


@pytest.fixture
def neuron(tmp_path: Path) -> Path:
    return neuron_in(tmp_path)


neuron_in = stand_ins.neuron
