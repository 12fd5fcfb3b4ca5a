"""A family's table names exactly the tensors that transformers' own class saves, with their shapes."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: the oracle cannot run")
pytest.importorskip("transformers", reason="transformers is not installed: the oracle cannot run")

from dconv.arch.registry import families  # noqa: E402
from dconv.checkpoint.source import expected_specs  # noqa: E402
from tests.models import tensors  # noqa: E402
from tests.oracles import hf  # noqa: E402

SIZES = [
    {},
    {"tie_word_embeddings": True, "vocab_size": 301},
    {"num_key_value_heads": 8},
    {"num_key_value_heads": 1, "head_dim": 24},
    {"attention_bias": True, "mlp_bias": True},
]
#: Keys that a class insists on, or has never looked at, or that dconv refuses by name.
BOUND = {
    "mamba2": {"head_dim": 16},
    "olmoe": {"head_dim": 16},
    "nemotron_h": {"tie_word_embeddings": False, "mlp_bias": False},
    "deepseek_v2": {"attention_bias": False, "mlp_bias": False},
    "deepseek_v3": {"attention_bias": False, "mlp_bias": False},
}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", sorted(families().keys() & hf.FAMILIES.keys()))
def test_the_table_is_the_model(name: str, sizes: dict[str, object], tmp_path: Path) -> None:
    """A key that a class does not know changes nothing on either side."""
    config, model = hf.tiny(name, **{**sizes, **BOUND.get(name, {})})
    saved = {key: shape for key, (_, shape, _) in tensors(hf.save(model, tmp_path)).items()}
    family = families()[name]
    specs = expected_specs(family, family.config.facts(config.to_dict()))
    assert {key: spec.file_shape for key, spec in specs.items()} == saved
