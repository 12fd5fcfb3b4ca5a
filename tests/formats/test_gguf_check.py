"""`check` of a GGUF in llama-cpp-python: a module of the same interface shows what is asked of it."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from dconv.checking import check
from dconv.errors import Damaged, ToolMissing
from dconv.export import llama_cpp
from dconv.pipeline import Request, convert
from tests.formats.test_gguf_export import only, source


class Llama:
    """What is used of ``llama_cpp.Llama``, as its documentation has it."""

    fault: Exception | None = None
    value = 2.5

    def __init__(self, model_path: str, *, n_ctx: int, n_gpu_layers: int, logits_all: bool, verbose: bool) -> None:
        assert (n_gpu_layers, logits_all, verbose) == (0, True, False)
        if self.fault:
            raise self.fault
        with open(model_path, "rb") as file:
            assert file.read(4) == b"GGUF"
        self.metadata = {"general.architecture": "qwen2"}
        self.scores = np.zeros((n_ctx, 61), np.float32)
        self.n_tokens = 0

    def reset(self) -> None:
        self.n_tokens = 0

    def eval(self, tokens: list[int]) -> None:
        assert all(type(token) is int for token in tokens)
        self.scores[self.n_tokens : self.n_tokens + len(tokens)] = -self.value
        self.n_tokens += len(tokens)
        assert self.n_tokens <= len(self.scores)

    def create_completion(self, prompt: str, *, max_tokens: int, temperature: float) -> dict[str, Any]:
        assert (self.n_tokens, temperature) == (0, 0.0)
        return {"choices": [{"text": " end"}]}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> type[Llama]:
    module: Any = ModuleType("llama_cpp")
    module.Llama, module.__version__ = type("Llama", (Llama,), {}), "0.3.36"
    module.__spec__ = ModuleSpec("llama_cpp", None)
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    return module.Llama


@pytest.mark.parametrize("shard_size", [None, 20_000])
def test_run_in_it(tmp_path: Path, installed: type[Llama], shard_size: int | None) -> None:
    assert llama_cpp.installed()
    convert(Request(source(tmp_path / "before", "qwen2"), "gguf", tmp_path / "out", shard_size=shard_size))
    path = sorted((tmp_path / "out").glob("*.gguf"))[-1]
    found = check(path)
    assert found.run == {
        "runtime": "llama-cpp-python 0.3.36", "model": "qwen2", "largest_logit": 2.5,
        "continuation": "The capital of France is end",
    }  # fmt: skip


def test_what_it_says_counts(tmp_path: Path, installed: type[Llama]) -> None:
    convert(Request(source(tmp_path / "before", "qwen2"), "gguf", tmp_path / "out"))
    installed.value = float("nan")
    with pytest.raises(Damaged, match="no finite logits"):
        check(only(tmp_path / "out"))
    installed.fault = ValueError("Failed to load model from file")
    with pytest.raises(ToolMissing, match="does not load"):
        check(only(tmp_path / "out"))


def test_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    convert(Request(source(tmp_path / "before", "qwen2"), "gguf", tmp_path / "out"))
    found = check(only(tmp_path / "out"))
    assert found.run is not None
    assert "transformers" in str(found.run["runtime"])
