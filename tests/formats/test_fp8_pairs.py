"""Block FP8 sources: each weight has its scales, of the shape its blocks make, and is described as what both make."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dconv.arch.registry import by_name
from dconv.checkpoint import safetensors
from dconv.checkpoint.source import expected_specs
from dconv.errors import Damaged
from dconv.pipeline import describe_model
from dconv.sharding.tensor import TensorSpec
from tests.models import config_of

Edit = Callable[[dict[str, TensorSpec]], object]
WEIGHT = "model.layers.0.self_attn.q_proj.weight"
SCALE = f"{WEIGHT}_scale_inv"


def fp8(folder: Path, edit: Edit, block: Any = (16, 16)) -> Path:
    """A MiniMax-M2 whose linear layers are FP8, as released, after ``edit`` of its tensors."""
    family = by_name("minimax_m2")
    config = config_of(family, quantization_config={"quant_method": "fp8", "weight_block_size": block})
    specs = expected_specs(family, family.config.facts(config))
    for name, spec in list(specs.items()):
        if "_proj" in name or ".experts." in name:
            specs[name] = TensorSpec(name, spec.shape, "f8_e4m3")
            specs[f"{name}_scale_inv"] = TensorSpec(f"{name}_scale_inv", tuple(-(-n // 16) for n in spec.shape), "f32")
    edit(specs)
    folder.mkdir()
    size, first, _ = safetensors.lay_out(list(specs.values()))
    (folder / "model.safetensors").write_bytes(first + bytes(size - len(first)))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_pairs_are_described_as_weights(tmp_path: Path) -> None:
    model = describe_model(fp8(tmp_path / "model", lambda specs: None))
    assert model.logical.specs[WEIGHT] == TensorSpec(WEIGHT, (32, 32), "bf16")
    assert SCALE not in model.logical.specs
    assert "16 x 16 block" in model.source.coded[WEIGHT]
    assert "quantization_config" not in model.config


WRONG: dict[str, tuple[Edit, str]] = {
    "missing scale": (lambda specs: specs.pop(SCALE), "have no scale"),
    "scale of nothing": (lambda specs: specs.pop(WEIGHT), "belong to no FP8 weight"),
    "scale of a plain weight": (
        lambda specs: specs.update({WEIGHT: TensorSpec(WEIGHT, (32, 32), "bf16")}),
        "belong to",
    ),
    "scale of another shape": (lambda specs: specs.update({SCALE: TensorSpec(SCALE, (1, 1), "f32")}), "another shape"),
    "scale of another kind": (lambda specs: specs.update({SCALE: TensorSpec(SCALE, (2, 2), "i32")}), "another shape"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_pair_is_damaged(tmp_path: Path, what: str) -> None:
    edit, words = WRONG[what]
    source = fp8(tmp_path / "model", edit)
    with pytest.raises(Damaged, match=words) as caught:
        describe_model(source)
    assert "q_proj" in str(caught.value)


@pytest.mark.parametrize("block", [[0, 16], [16], "16", [16, True]])
def test_a_block_size_that_is_none(tmp_path: Path, block: Any) -> None:
    with pytest.raises(Damaged, match="weight_block_size"):
        describe_model(fp8(tmp_path / "model", lambda specs: None, block))
