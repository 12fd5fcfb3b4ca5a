"""Law 4 for families with experts and latent attention: the real megatron-core computes what transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed: the oracle cannot run")
pytest.importorskip("megatron.core", reason="megatron-core is not installed: the oracle cannot run")

from tests.oracles.function import Sources, differing, sources_of, unlike_what_was_saved

#: name -> (family, config keys). megatron-core 0.16.1 chooses groups of experts as these do where topk / groups is 2.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"sliding_window": None}),
    "mixtral-tied": ("mixtral", {"tie_word_embeddings": True, "sliding_window": 8, "vocab_size": 301}),
    "qwen2-moe": ("qwen2_moe", {"mlp_only_layers": [1], "layer_types": ["full_attention"] * 4}),
    "qwen3-moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3-moe-every-second": ("qwen3_moe", {"decoder_sparse_step": 2}),
    "deepseek-v2": ("deepseek_v2", {"topk_method": "greedy", "q_lora_rank": None}),
    "deepseek-v3": ("deepseek_v3", {}),
    "gpt-oss": ("gpt_oss", {}),
    "glm4-moe": ("glm4_moe", {"use_qk_norm": True, "attention_bias": True}),
}

#: tp, pp, vpp, ep, etp. Each model meets every layout in one container, with --long in all.
LAYOUTS = [(1, 1, 1, 1, 1), (2, 1, 1, 2, 1), (1, 2, 2, 2, 1), (2, 1, 1, 2, 2), (2, 2, 1, 1, 2)]
#: At etp > 1 megatron-core adds the bias of an expert once a rank.
NOT_CUT = ("gpt-oss",)


def _name(layout: tuple[int, ...]) -> str:
    return "tp{}pp{}vpp{}ep{}etp{}".format(*layout)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return sources_of(MODELS, tmp_path_factory.mktemp("hf"))


def _cut(sources: Sources, etp: int) -> Sources:
    """Those that megatron-core computes rightly at this etp."""
    return {name: source for name, source in sources.items() if etp == 1 or name not in NOT_CUT}


@pytest.mark.parametrize("turn", range(len(LAYOUTS)), ids=[_name(layout) for layout in LAYOUTS])
def test_megatron_core_computes_what_transformers_does(
    turn: int, sources: Sources, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    layout = LAYOUTS[turn]
    every = request.config.getoption("--long")
    assert not differing(_cut(sources, layout[-1]), layout, tmp_path, None if every else turn)


WROTE = [pytest.param(turn, id=_name(LAYOUTS[turn]), marks=[pytest.mark.long] * (turn != 2)) for turn in range(1, 4)]


@pytest.mark.parametrize("turn", WROTE)
def test_checkpoints_that_megatron_core_wrote_convert(
    turn: int, sources: Sources, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Args alone describe the model: no HuggingFace config comes along."""
    layout = LAYOUTS[turn]
    every = request.config.getoption("--long")
    assert not unlike_what_was_saved(_cut(sources, layout[-1]), layout, tmp_path, None if every else turn)
