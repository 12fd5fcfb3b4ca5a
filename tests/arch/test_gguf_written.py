"""Metadata of a GGUF from a config.json: what others wrote in it is read by its type, and under each of its names."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest

from dconv.arch.family import Family
from dconv.arch.gguf import ARCHS
from dconv.arch.gguf_written import written
from dconv.arch.registry import by_name
from dconv.errors import DconvError
from tests.models import config_of

FAMILIES = sorted({name for arch in ARCHS.values() for name in arch.families})
ROPES: tuple[dict[str, Any], ...] = (
    {"rope_type": "longrope", "short_factor": ["a"] * 4, "long_factor": ["a"] * 4},
    {"rope_type": "longrope", "short_factor": [1.0], "long_factor": 2, "original_max_position_embeddings": "x"},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": "x"},
    {"rope_type": "llama3", "factor": 0, "high_freq_factor": 0},
    {"rope_type": "yarn", "factor": 2.0, "beta_fast": "x"},
    {"full_attention": {"rope_type": "default"}, "sliding_attention": 3},
)
STRANGE: tuple[object, ...] = ("x", -1, 0, 1e400, [], ["a"], {}, {"a": 1}, True, 3.5, None)


@pytest.mark.parametrize("name", FAMILIES)
def test_values_of_the_wrong_type(name: str) -> None:
    """Each ends in an answer or a refusal, never in an error of Python's."""
    family = by_name(name)
    config = config_of(family)
    said: list[tuple[str, object]] = [("rope_scaling", rope) for rope in ROPES]
    said += [("rope_parameters", rope) for rope in ROPES]
    said += [(key, value) for key in (*family.config.defaults, *config) for value in STRANGE]  # type: ignore[attr-defined]
    for key, value in said:
        with suppress(DconvError):
            written(family, {**config, key: value})


def says(family: Family, config: dict[str, Any], key: str) -> object:
    made = written(family, config)
    return made.values[f"{made.arch}.{key}"]


def test_the_rotated_part_of_minimax_m2_under_either_key() -> None:
    """transformers 5 saves the part of a head, MiniMax's own config the number of its elements."""
    family = by_name("minimax_m2")
    config = {key: value for key, value in config_of(family, head_dim=16).items() if not key.startswith("rot")}
    assert says(family, {**config, "rotary_dim": 8}, "rope.dimension_count") == 8
    newer = {**config, "rope_parameters": {"rope_theta": 5e6, "partial_rotary_factor": 0.5, "rope_type": "default"}}
    assert says(family, newer, "rope.dimension_count") == 8


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_experts_under_either_key(name: str, key: str) -> None:
    """As the shapes have it, whose number it is: by the alias that the config gives, not by the class's default."""
    family = by_name(name)
    keys = ("num_experts", "num_local_experts", "n_routed_experts")
    config = {one: value for one, value in config_of(family).items() if one not in keys}
    said = {**config, key: 8}
    assert family.facts(said)["experts"] == says(family, said, "expert_count") == 8
