"""Law 4: the real megatron-core and the real transformers compute the same logits from the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed: the oracle cannot run")
pytest.importorskip("megatron.core", reason="megatron-core is not installed: the oracle cannot run")

from dconv.pipeline import Request, convert
from dconv.sharding.coords import Parallel
from tests.oracles.function import (
    Check,
    Sources,
    close,
    differing,
    loaded,
    sources_of,
    unlike_what_was_saved,
)

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip

#: name -> (family, config keys). Together: tied and untied, padded and odd vocabulary, bias, q/k norm, scaled RoPE,
#: head_dim of its own, one query group for all heads, a sliding window, half of a head rotated, a stated softmax scale.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-odd": ("llama", {"tie_word_embeddings": True, "vocab_size": 301}),
    "llama3-scaled": ("llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 131072, "vocab_size": 256}),
    "llama-mha": ("llama", {"num_key_value_heads": 8}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "mistral-window": ("mistral", {"sliding_window": 8}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-odd": ("qwen2", {"vocab_size": 301}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "phi3": ("phi3", {"sliding_window": 8, "num_key_value_heads": 2}),
    "glm": ("glm", {}),
    "granite": ("granite", {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}),
    "gpt2": ("gpt2", {"vocab_size": 301}),
    "gpt2-erf-untied": ("gpt2", {"activation_function": "gelu", "tie_word_embeddings": False, "n_inner": 344}),
}

#: tp, pp, vpp, ep, etp. Four layers in all models. Each model meets every layout in one container, with --long in all.
LAYOUTS = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (2, 2, 1), (1, 2, 2), (1, 4, 1)]
SAVED = ("llama-tied-odd", "llama3-scaled", "llama-mha", "qwen2-odd", "qwen3", "gpt2")


def _name(layout: tuple[int, int, int]) -> str:
    return "tp{}pp{}vpp{}".format(*layout)


def _whole(layout: tuple[int, int, int]) -> tuple[int, ...]:
    """With ep and etp, as megatron-core lays a dense model out."""
    return (*layout, 1, layout[0])


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return sources_of(MODELS, tmp_path_factory.mktemp("hf"))


@pytest.mark.parametrize("turn", range(len(LAYOUTS)), ids=[_name(layout) for layout in LAYOUTS])
def test_megatron_core_computes_what_transformers_does(
    turn: int, sources: Sources, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    every = request.config.getoption("--long")
    assert not differing(sources, _whole(LAYOUTS[turn]), tmp_path, None if every else turn)


def test_torch_dist_loads_in_another_layout(sources: Sources, tmp_path: Path) -> None:
    """Written for tp 4 x pp 2, loaded by megatron-core as tp 2 x pp 1: the padding differs, too."""
    names = ("llama-tied-odd", "qwen2-odd", "qwen3")
    for name in names:
        convert(Request(sources[name][0], "megatron", tmp_path / name, parallel=Parallel(tp=4, pp=2, etp=4)))
    computed = loaded((2, 1, 1, 1, 2), [Check(tmp_path / name, "torch_dist") for name in names])
    for name, ours in zip(names, computed, strict=True):
        assert close(ours, sources[name][1])


@pytest.mark.parametrize(
    "turn",
    [
        pytest.param(turn, id=_name(LAYOUTS[at]), marks=[pytest.mark.long] * (at == 0))
        for turn, at in enumerate((0, 3, 4))
    ],
)
def test_checkpoints_that_megatron_core_wrote_convert(
    turn: int, sources: Sources, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Args alone describe the model: no HuggingFace config comes along."""
    layout = _whole(LAYOUTS[(0, 3, 4)[turn]])
    every = request.config.getoption("--long")
    saved = {name: sources[name] for name in SAVED}
    assert not unlike_what_was_saved(saved, layout, tmp_path, None if every else turn)
