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

SIZES: list[dict[str, object]] = [
    {},
    {"tie_word_embeddings": True, "vocab_size": 301},
    {"num_key_value_heads": 8},
    {"num_key_value_heads": 1, "head_dim": 24},
    {"attention_bias": True, "mlp_bias": True, "use_qk_norm": True},
]
#: Families whose class comes with their checkpoints only.
NO_CLASS = {"blockffn", "blockffn_mla", "deepseek", "minicpm", "minicpm_moe", "minicpm_blockffn", "minicpmv"}
#: What a family's class cannot be asked for: OLMoE's norms have the width of the hidden state, whatever a head's is.
IMPOSSIBLE = {"olmoe": {"head_dim"}}
#: Keys that a class insists on, or that dconv refuses by name.
BOUND = {"mamba2": {"head_dim": 16}, "nemotron_h": {"tie_word_embeddings": False, "mlp_bias": False}}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", sorted(families().keys() - NO_CLASS))
def test_the_table_is_the_model(name: str, sizes: dict[str, object], tmp_path: Path) -> None:
    """As it is saved: in memory, transformers joins the experts of a layer. A key that a class does not know changes
    nothing on either side."""
    keys = {key: value for key, value in sizes.items() if key not in IMPOSSIBLE.get(name, ())}
    config, model = hf.tiny(name, **({} if name == "llava" else {**keys, **BOUND.get(name, {})}))
    family = families()[name]
    saved = {family.published(key): shape for key, (_, shape, _) in tensors(hf.save(model, tmp_path)).items()}
    specs = expected_specs(family, family.config.facts(config.to_dict()))
    table = {key: spec.file_shape for key, spec in specs.items()}
    if table != saved:  # biases that this family is not known to have: its config is refused
        assert set(sizes) & {line.split()[0] for line in family.config.unsayable(config.to_dict())}
        assert all(name.endswith(".bias") for name in saved.keys() - table.keys())
        table |= {name: saved[name] for name in saved.keys() - table.keys()}
    assert table == saved
