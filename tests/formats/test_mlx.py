"""FORMAT mlx against what mlx-lm made of the same models (recorded by tests/formats/record_mlx.py), and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dconv.arch.registry import families
from dconv.checkpoint import safetensors
from dconv.cli import main
from dconv.codec import bitpack
from dconv.codec.cast import cast
from dconv.compare import diff
from dconv.describe import describe_model
from dconv.errors import Damaged, Refused, UsageError
from dconv.pipeline import Request, convert, prepare, run
from dconv.sharding.coords import Parallel
from dconv.sharding.rank import Settings
from tests.formats.mlx_models import MODELS, SMALL, write_model
from tests.models import config_of, tensors, tree_digest, write_random

RECORDED = Path(__file__).parent / "recorded" / "mlx"
#: Families with something that mlx-lm has no place for, or has twice.
UNEVEN = ("minicpm", "minicpm3", "deepseek_v3")


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_are_those_of_mlx_lm_s_class_and_go_back(tmp_path: Path, name: str) -> None:
    convert(Request(write_model(tmp_path / "model", name), "mlx", tmp_path / "mlx"))
    found = {key: list(shape) for key, (_, shape, _) in tensors(tmp_path / "mlx").items()}
    assert found == json.loads((RECORDED / "names.json").read_text())[name]
    assert safetensors.framework(tmp_path / "mlx" / "model.safetensors") == "mlx"
    compared = diff(tmp_path / "model", tmp_path / "mlx")
    assert not compared.differences
    assert compared.equal is (name not in UNEVEN)
    if name == "deepseek_v3":
        assert all(".layers.2." in key for key in compared.only_a)
    elif name in UNEVEN:
        assert compared.only_b == ("lm_head.weight",)


@pytest.mark.parametrize("small", SMALL)
def test_codes_are_mlx_lm_s_own(tmp_path: Path, small: tuple[str, int, int]) -> None:
    name, bits, group = small
    write_model(tmp_path / "model", name, **SMALL[small])
    convert(Request(tmp_path / "model", "mlx", tmp_path / "mlx", quant=f"{bits}bit_g{group}"))
    theirs = RECORDED / f"{name}_{bits}bit_g{group}"
    assert tensors(tmp_path / "mlx") == tensors(theirs)
    ours, said = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "mlx", theirs))
    assert ours["quantization"] == ours["quantization_config"] == said["quantization"]
    for folder in (tmp_path / "mlx", theirs):
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(tensors(folder))


def test_what_mlx_lm_wrote_is_a_source_decoded_with_one_rounding(tmp_path: Path) -> None:
    theirs = RECORDED / "qwen2_3bit_g32"
    convert(Request(theirs, "hf", tmp_path / "hf"))
    stored, found = tensors(theirs), tensors(tmp_path / "hf")
    module = "model.layers.0.mlp.down_proj"
    words = np.frombuffer(stored[f"{module}.weight"][2], "<u4").reshape(stored[f"{module}.weight"][1])
    scales, biases = (
        cast(np.frombuffer(stored[f"{module}.{part}"][2], "<u2").reshape(64, 2), "bf16", "f64").view("<f8")
        for part in ("scales", "biases")
    )
    codes = bitpack.unpack(words, 3, 64)
    exact = codes * np.repeat(scales, 32, -1) + np.repeat(biases, 32, -1)
    assert found[f"{module}.weight"][:2] == ("BF16", (64, 64))
    assert found[f"{module}.weight"][2] == cast(exact, "f64", "bf16").tobytes()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert not {"quantization", "quantization_config"} & config.keys()


def test_codes_of_the_same_grid_are_kept(tmp_path: Path) -> None:
    theirs = RECORDED / "qwen3_moe_6bit_g32"
    convert(Request(theirs, "mlx", tmp_path / "again", quant="6bit_g32"))
    assert tensors(tmp_path / "again") == tensors(theirs)


def test_ranks_memory_and_the_way_through_megatron_change_no_byte(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "mixtral")
    asked = Request(tmp_path / "model", "mlx", tmp_path / "one", quant="4bit", shard_size=100_000)
    convert(asked)
    for rank in (0, 1):
        run(prepare(replace(asked, out=tmp_path / "two")), Settings(rank=rank, world=2, max_memory=1 << 20))
    assert tree_digest(tmp_path / "one") == tree_digest(tmp_path / "two")
    assert len(list((tmp_path / "one").glob("model-*.safetensors"))) > 1
    convert(Request(tmp_path / "model", "megatron", tmp_path / "megatron", parallel=Parallel(tp=2, pp=2, ep=2, etp=1)))
    convert(Request(tmp_path / "megatron", "mlx", tmp_path / "three", quant="4bit", shard_size=100_000))
    assert tensors(tmp_path / "one") == tensors(tmp_path / "three")


def test_commands_understand_the_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = str(write_model(tmp_path / "model", "qwen2")), str(tmp_path / "out")
    assert main(["convert", model, "mlx", "-o", out, "--quant", "8bit", "--verify", "digest"]) == 0
    assert main(["inspect", out]) == 0
    assert "MLX int8 code" in capsys.readouterr().out
    assert main(["diff", model, out]) == 1
    assert main(["check", out]) == 0
    again = ["convert", model, "mlx", "-o", f"{out}2", "--quant", "8bit"]
    assert main([*again, "--verify", "logits"]) == 3
    assert "not held to a bound" in capsys.readouterr().err


def test_config_says_what_mlx_lm_would_take_for_something_else(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    write_model(
        tmp_path / "model", "llama", tie_word_embeddings=False, rope_theta=None, rope_scaling=None, rope_parameters=rope
    )
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps({key: value for key, value in config.items() if value is not None and key != "tie_word_embeddings"})
    )
    convert(Request(tmp_path / "model", "mlx", tmp_path / "out"))
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["tie_word_embeddings"] is False
    assert said["rope_theta"] == 5e5
    assert (said["rope_scaling"]["type"], said["rope_scaling"]["factor"]) == ("linear", 2.0)


@pytest.mark.parametrize(
    ("name", "more", "why"),
    [
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob True"),
        ("mixtral", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type linear"),
        ("qwen2", {"head_dim": 64}, "head_dim 64"),
        ("qwen3", {"attention_bias": True}, "no place for"),
        ("gemma", {"tie_word_embeddings": False}, "no output layer of its own"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func 'softmax'"),
    ],
)
def test_what_mlx_lm_does_not_compute_is_refused(tmp_path: Path, name: str, more: dict[str, Any], why: str) -> None:
    write_model(tmp_path / "model", name, **more)
    with pytest.raises(Refused, match=why):
        prepare(Request(tmp_path / "model", "mlx", tmp_path / "out"))


def test_other_families_and_codes_are_refused(tmp_path: Path) -> None:
    family = families()["glm"]
    write_random(tmp_path / "glm", family, config_of(family))
    with pytest.raises(Refused, match=r"no model that is known to compute glm(?s:.)*one of llama"):
        prepare(Request(tmp_path / "glm", "mlx", tmp_path / "out"))
    write_model(tmp_path / "model", "qwen3_moe", hidden_size=96)
    with pytest.raises(UsageError, match="no such variant"):
        prepare(Request(tmp_path / "model", "mlx", tmp_path / "out", quant="7bit"))
    with pytest.raises(Refused, match="8 bits by groups of 64"):
        prepare(Request(tmp_path / "model", "mlx", tmp_path / "out", quant="4bit_g32"))


def test_broken_codes_are_named(tmp_path: Path) -> None:
    convert(Request(write_model(tmp_path / "model", "llama"), "mlx", tmp_path / "mlx", quant="4bit"))
    path, config = tmp_path / "mlx" / "model.safetensors", tmp_path / "mlx" / "config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps({**said, "quantization": {**said["quantization"], "mode": "mxfp4"}}))
    with pytest.raises(Refused, match="mode"):
        describe_model(tmp_path / "mlx")
    config.write_text(json.dumps(said))
    data = path.read_bytes()
    (tmp_path / "mlx" / "model.safetensors.index.json").unlink()
    path.write_bytes(data.replace(b"model.layers.0.mlp.up_proj.biases", b"model.layers.0.mlp.up_proj.biasse"))
    with pytest.raises(Damaged, match="a part of a weight in MLX's codes is missing"):
        describe_model(tmp_path / "mlx")
