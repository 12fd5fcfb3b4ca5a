"""GGUF files that llama.cpp's own converter wrote (``record_gguf.py``), read back: all weights, all of the config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dconv.arch.gguf import ARCHS
from dconv.arch.registry import by_name
from dconv.pipeline import Request, convert, prepare
from tests.formats.gguf_files import recorded
from tests.formats.gguf_models import MODELS, write_model
from tests.models import tensors

#: No part of the function, or nothing that a GGUF says.
UNSAID = {"init_method_std", "attention_dropout"}


@pytest.mark.parametrize("name", MODELS)
def test_as_before_the_conversion(tmp_path: Path, name: str) -> None:
    before = write_model(tmp_path / "before", name)
    convert(Request(recorded(tmp_path, name), "hf", tmp_path / "after", dtype="bf16"))
    assert tensors(tmp_path / "after") == tensors(before)


@pytest.mark.parametrize("name", MODELS)
def test_the_config_says_the_same(tmp_path: Path, name: str) -> None:
    before = json.loads((write_model(tmp_path / "before", name) / "config.json").read_text())
    job = prepare(Request(recorded(tmp_path, name), "hf", tmp_path / "after"))
    family = by_name(name)
    # llama.cpp has no Mistral: without a window it computes the same as Llama
    assert job.family.name == ("llama" if name == "mistral" else name)
    expected, found = family.config.to_args(before, False), job.family.config.to_args(job.config, False)
    assert {arg: value for arg, value in found.items() if arg not in UNSAID} == {
        arg: value for arg, value in expected.items() if arg not in UNSAID
    }
    assert job.family.config.unsayable(job.config) == family.config.unsayable(before)
    assert (job.config["bos_token_id"], job.config["eos_token_id"]) == (1, 2)


def test_every_architecture_was_recorded(tmp_path: Path) -> None:
    from gguf import GGUFReader

    found = set()
    for name in MODELS:
        field = GGUFReader(recorded(tmp_path, name)).get_field("general.architecture")
        assert field is not None
        found.add(field.contents())
    assert found == set(ARCHS)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gpt_oss", "gemma2"])
def test_to_megatron_and_back(tmp_path: Path, name: str) -> None:
    """What is read is cut by tensor parallel rank as what any other source has."""
    from dconv.sharding.coords import Parallel

    before = write_model(tmp_path / "before", name)
    there = Request(recorded(tmp_path, name), "megatron", tmp_path / "cut", parallel=Parallel(tp=2), dtype="bf16")
    convert(there)
    convert(Request(tmp_path / "cut", "hf", tmp_path / "after"))
    assert tensors(tmp_path / "after") == tensors(before)
