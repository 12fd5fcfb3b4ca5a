"""Where dconv and compressed-tensors part, pinned: weights that are not finite, columns that are no whole groups."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dconv.arch.registry import by_name
from dconv.errors import Refused, UsageError
from dconv.pipeline import Request, convert, prepare
from tests.models import tree_digest
from tests.quant.models import write_normal

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("format", "quant", "lost"),
    [("fp8", "fp8_channel", 1), ("mx", "mxfp8", 32), ("mx", "mxfp4", 32), ("mx", "nvfp4", 16)],
)
def test_what_is_not_finite_ruins_no_more_than_its_block(
    tmp_path: Path, format: str, quant: str, lost: int, odd: float
) -> None:
    """There it makes NaN of all that shares a scale, with an infinity zeros; NVFP4's weights all share one."""
    source = write_normal(tmp_path / "source", by_name("llama"))
    convert(Request(source, format, tmp_path / "usual", quant=quant, quant_config="compressed-tensors"))
    tensors = load_file(source / "model.safetensors")
    tensors[Q][7, 40] = odd
    save_file(tensors, source / "model.safetensors")
    convert(Request(source, format, tmp_path / "odd", quant=quant, quant_config="compressed-tensors"))
    found = {}
    for name in ("usual", "odd"):
        convert(Request(tmp_path / name, "hf", tmp_path / f"{name} dense", dtype="f32"))
        found[name] = load_file(tmp_path / f"{name} dense" / "model.safetensors")[Q]
    nan = found["odd"].isnan()
    assert nan.sum() == lost
    assert nan[7, 40]
    assert torch.equal(found["odd"][~nan], found["usual"][~nan])


def test_columns_that_are_no_whole_groups_stay_as_they_are(tmp_path: Path) -> None:
    """A linear layer is left out by the config; of a layer's experts all are, since loaders take all or none."""
    family = by_name("qwen3_moe")
    source = write_normal(tmp_path / "source", family, moe_intermediate_size=48, hidden_size=64)
    job = prepare(Request(source, "mx", tmp_path / "out", quant_config="compressed-tensors"))
    specs = job.logical.specs
    plain = [name for name in specs if name.endswith("_proj.weight")]
    assert plain
    assert all(".experts." in name for name in plain)
    convert(Request(source, "mx", tmp_path / "out", quant_config="compressed-tensors"))
    ignore = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    patterns = [re.compile(entry.removeprefix("re:")) for entry in ignore]
    modules = {name.rpartition(".")[0] for name in specs}
    out = {module for module in modules if any(pattern.match(module) for pattern in patterns)}
    assert {name.removesuffix(".weight") for name in plain} <= out
    assert not out & {name.removesuffix(".weight_packed") for name in specs if name.endswith("_packed")}


def test_a_model_without_whole_groups_is_refused(tmp_path: Path) -> None:
    source = write_normal(tmp_path / "source", by_name("llama"), hidden_size=40, intermediate_size=72, head_dim=10)
    with pytest.raises(Refused, match="no linear layer has whole groups of 32 columns"):
        prepare(Request(source, "mx", tmp_path / "out", quant_config="compressed-tensors"))


def test_block_fp8_changes_readers_without_a_new_code(tmp_path: Path) -> None:
    """From transformers' names to compressed-tensors' and back, the codes and fp32 scales are kept."""
    source = write_normal(tmp_path / "source", by_name("llama"))
    convert(Request(source, "fp8", tmp_path / "one", block_size=(16, 24)))
    convert(Request(tmp_path / "one", "fp8", tmp_path / "two", block_size=(16, 24), quant_config="compressed-tensors"))
    convert(Request(tmp_path / "two", "fp8", tmp_path / "three", block_size=(16, 24)))
    assert "weight_scale_inv" not in (tmp_path / "two" / "model.safetensors").read_bytes()[:20_000].decode("latin1")
    assert tree_digest(tmp_path / "three") == tree_digest(tmp_path / "one")


def test_options_that_a_variant_lacks(tmp_path: Path) -> None:
    source = write_normal(tmp_path / "source", by_name("llama"))
    for request in (
        Request(source, "fp8", tmp_path / "out", scale_rule="ceil"),
        Request(source, "mx", tmp_path / "out", quant_config="transformers"),
        Request(source, "fp8", tmp_path / "out", quant_config="compressed-tensors", scale_format="ue8m0"),
    ):
        with pytest.raises(UsageError):
            prepare(request)
