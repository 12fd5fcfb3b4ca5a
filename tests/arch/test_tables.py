"""A family's table names exactly the parameters that transformers' own class makes, with their shapes."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: the oracle cannot run")
pytest.importorskip("transformers", reason="transformers is not installed: the oracle cannot run")

from dconv.arch.registry import families  # noqa: E402
from dconv.checkpoint.source import expected_specs  # noqa: E402
from tests.oracles import hf  # noqa: E402

SIZES = [
    {},
    {"tie_word_embeddings": True, "vocab_size": 301},
    {"num_key_value_heads": 8},
    {"num_key_value_heads": 1, "head_dim": 24},
    {"attention_bias": True, "mlp_bias": True},
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", sorted(families().keys() & hf.FAMILIES.keys()))
def test_the_table_is_the_model(name: str, sizes: dict[str, object]) -> None:
    """A key that a class does not know changes nothing on either side."""
    config, model = hf.tiny(name, **sizes)
    family = families()[name]
    if any(key in line for line in family.config.unsayable(config.to_dict()) for key in sizes):
        pytest.skip("refused by name, so that there is no table for it")
    expected = {key: tuple(value.shape) for key, value in model.named_parameters()}
    specs = expected_specs(family, family.config.facts(config.to_dict()))
    assert {key: spec.shape for key, spec in specs.items()} == expected
