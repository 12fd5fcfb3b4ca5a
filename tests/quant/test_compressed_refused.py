"""compressed-tensors sources whose config or files are wrong: named, and nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dconv.arch.registry import by_name
from dconv.coded.compressed_config import config_of
from dconv.errors import Damaged, DconvError, Refused
from dconv.pipeline import Request, convert, prepare
from tests.quant.models import write_normal

Said = dict[str, Any]
Tensors = dict[str, torch.Tensor]
Q = "model.layers.0.self_attn.q_proj"


def group(said: Said) -> Said:
    return said["config_groups"]["group_0"]


def change(part: str, key: str, value: object) -> Callable[[Said, Tensors], object]:
    def apply(said: Said, tensors: Tensors) -> None:
        del tensors
        place = said
        for step in filter(None, part.split(".")):
            place = place[step]
        place[key] = value

    return apply


def put(name: str, value: torch.Tensor) -> Callable[[Said, Tensors], object]:
    return lambda _, tensors: tensors.__setitem__(name, value)


WEIGHTS = "config_groups.group_0.weights"
CASES: dict[str, tuple[str, Callable[[Said, Tensors], object], type[DconvError], str]] = {
    "no scale": ("fp8_channel", lambda _, t: t.pop(f"{Q}.weight_scale"), Damaged, f"{Q}.weight_scale"),
    "idle scale": ("fp8_channel", put("model.norm.weight_scale", torch.ones(1)), Damaged, "model.norm.weight_scale"),
    "shape": ("fp8_channel", put(f"{Q}.weight_scale", torch.ones(3, 1)), Damaged, f"{Q}.weight_scale"),
    "dtype": ("fp8_channel", put(f"{Q}.weight_scale", torch.ones(64, 1).to(torch.int64)), Damaged, "i64"),
    "zeros": ("fp8_channel", put(f"{Q}.weight_zero_point", torch.zeros(64, 1)), Damaged, "no use for"),
    "no global": ("nvfp4", lambda _, t: t.pop(f"{Q}.weight_global_scale"), Damaged, f"{Q}.weight_global_scale"),
    "short": ("mxfp4", put(f"{Q}.weight_packed", torch.zeros(64, 17, dtype=torch.uint8)), Damaged, "fill"),
    "axes": ("mxfp4", put(f"{Q}.weight_packed", torch.zeros(64, dtype=torch.uint8)), Damaged, "no matrix"),
    "twice": ("mxfp4", put(f"{Q}.weight", torch.zeros(64, 64)), Damaged, "stored twice"),
    "format": ("fp8_channel", change("config_groups.group_0", "format", "marlin-24"), Refused, "marlin-24"),
    "mixed": ("fp8_channel", change("config_groups.group_0", "format", "mixed-precision"), Refused, "mixed-precision"),
    "strategy": ("fp8_channel", change(WEIGHTS, "strategy", "token"), Refused, "token"),
    "bits": ("fp8_channel", change(WEIGHTS, "num_bits", 64), Damaged, "num_bits"),
    "kind": ("fp8_channel", change(WEIGHTS, "type", ["int"]), Damaged, "type"),
    "group": ("mxfp4", change(WEIGHTS, "group_size", 0), Damaged, "group_size"),
    "another group": ("mxfp4", change(WEIGHTS, "group_size", 16), Refused, "every 32 columns"),
    "asymmetric": ("mxfp8", change(WEIGHTS, "symmetric", False), Refused, "every 32 columns"),
    "groups": ("fp8_channel", change("", "config_groups", [1]), Damaged, "config_groups"),
    "preset": ("fp8_channel", change("", "config_groups", {"FP8": ["Linear"]}), Refused, "preset"),
    "targets": ("fp8_channel", change("config_groups.group_0", "targets", "Linear"), Damaged, "targets"),
    "no target": ("fp8_channel", change("config_groups.group_0", "targets", ["re:.*k_proj"]), Damaged, "no group"),
    "ignored": ("fp8_channel", change("", "ignore", [Q]), Damaged, "leaves out"),
    "ignore": ("fp8_channel", change("", "ignore", {"a": 1}), Damaged, "ignore"),
    "slow": ("fp8_channel", change("", "ignore", ["re:(.*a)*(.*b)*(.*c)*d"]), Refused, "not tried"),
    "broken": ("fp8_channel", change("", "ignore", ["re:(["]), Refused, "not tried"),
    "sparse": ("fp8_channel", change("", "sparsity_config", {"format": "sparse-24-bitmask"}), Refused, "sparse"),
    "rotated": ("fp8_channel", change("", "transform_config", {"config_groups": {"R1": {}}}), Refused, "rotated"),
}


def source_of(folder: Path, quant: str) -> Path:
    folder.mkdir(exist_ok=True)
    write_normal(folder / "plain", by_name("llama"))
    format = "fp8" if quant.startswith("fp8") else "mx"
    convert(Request(folder / "plain", format, folder / "source", quant=quant, quant_config="compressed-tensors"))
    return folder / "source"


def rewritten(source: Path, how: Callable[[Said, Tensors], object]) -> None:
    path = source / "config.json"
    config, tensors = json.loads(path.read_text()), load_file(source / "model.safetensors")
    how(config["quantization_config"], tensors)
    path.write_text(json.dumps(config))
    save_file(tensors, source / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_named(tmp_path: Path, case: str) -> None:
    quant, how, kind, words = CASES[case]
    source = source_of(tmp_path, quant)
    rewritten(source, how)
    with pytest.raises(kind) as error:
        prepare(Request(source, "hf", tmp_path / "out"))
    assert type(error.value) is kind
    assert words in str(error.value)
    assert not list(tmp_path.glob("out*"))


def test_scales_of_activations_and_caches_are_left_out_by_name(tmp_path: Path) -> None:
    source = source_of(tmp_path, "fp8_channel")
    names = [f"{Q}.input_scale", "model.layers.0.self_attn.k_scale", "model.layers.1.self_attn.v_scale"]
    rewritten(source, lambda _, tensors: tensors.update({name: torch.ones(1) for name in names}))
    left_out = prepare(Request(source, "hf", tmp_path / "out")).plan.target.left_out
    assert all("activations or of a cache" in left_out[name] for name in names)


def test_a_group_of_another_class_does_not_have_linear_layers() -> None:
    """Its name comes first in the alphabet, and no layer is known to be of it."""
    weights = {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": False}
    groups = {
        "group_0": {"targets": ["Linear"], "weights": {**weights, "symmetric": True}},
        "group_1": {"targets": ["FusedMoE"], "weights": weights},
    }
    for of in (groups, dict(reversed(groups.items()))):
        said = config_of({"format": "pack-quantized", "config_groups": of})
        assert said.group_of("model.layers.0.mlp.up_proj", "it").name == "group_0"
    alone = config_of({"format": "pack-quantized", "config_groups": {"group_1": groups["group_1"]}})
    assert alone.group_of("model.layers.0.mlp.up_proj", "it").name == "group_1"


def test_groups_of_several_formats(tmp_path: Path) -> None:
    """``mixed-precision``: whole names before expressions, these before classes."""
    source = source_of(tmp_path, "fp8_channel")
    first = load_file(source_of(tmp_path / "other", "mxfp4") / "model.safetensors")

    def mix(said: Said, tensors: Tensors) -> None:
        eight = said["config_groups"].pop("group_0")
        four = json.loads((tmp_path / "other" / "source" / "config.json").read_text())["quantization_config"]
        said["format"] = "mixed-precision"
        said["config_groups"] = {"a": eight, "b": {**group(four), "targets": [r"re:.*mlp\.(gate|up)_proj$", Q]}}
        for name in [name for name in tensors if ("gate_proj" in name or "up_proj" in name or Q in name)]:
            del tensors[name]
        tensors |= {name: it for name, it in first.items() if "gate_proj" in name or "up_proj" in name or Q in name}

    rewritten(source, mix)
    coded = prepare(Request(source, "hf", tmp_path / "out")).source.coded
    assert {words.split()[0] for name, words in coded.items() if "gate" in name or "up" in name or Q in name} == {
        "e2m1"
    }
    assert {words.split()[0] for name, words in coded.items() if "down" in name or "k_proj" in name} == {"e4m3"}
