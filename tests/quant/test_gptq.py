"""GPTQ checkpoints as a source: the weights that their numbers make, rounded once, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dconv.errors import Damaged, DconvError, Refused
from dconv.pipeline import Request, convert, prepare
from dconv.sharding.coords import Parallel
from tests.quant.whole import Layer, Model, draw, gptq_config, same, tensors_of, write, write_gptq


def check(model: Model, out: Path) -> None:
    """Every weight in fp32, which has room for the exact product of a code and a scale of fp16."""
    convert(Request(model.folder, "hf", out, dtype="f32"))
    ours, given = tensors_of(out), tensors_of(model.folder)
    for module, layer in model.layers.items():
        assert same(ours[f"{module}.weight"], layer.weight.astype(np.float32)), module
    plain = {name for name in given if name.rpartition(".")[2] not in ("qweight", "qzeros", "scales", "g_idx")}
    dense = plain | {f"{module}.weight" for module in model.layers}
    assert dense == {name for name in ours if name in dense or ".4." not in name}  # DeepSeek-V3 writes some twice
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert not (out / "quantize_config.json").exists()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("group", [-1, 16, 32, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights(tmp_path: Path, bits: int, group: int, version: int) -> None:
    model = write_gptq(
        tmp_path / "source",
        version,
        config={"bits": bits, "group_size": group},
        make=lambda _, shape, seed: draw(shape, bits, group, seed, least=2 - version),
        g_idx=group != 16,
        num_hidden_layers=1,
    )
    check(model, tmp_path / "out")


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("ordered", [False, True])
def test_families_by_any_way(tmp_path: Path, family: str, ordered: bool) -> None:
    """In the order of activations, too; over tensor and expert parallel ranks and back."""
    layout = Parallel(tp=2, pp=2, etp=2)
    sizes = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 16}
    model = write_gptq(
        tmp_path / "source",
        family=family,
        config={"desc_act": ordered},
        make=lambda _, shape, seed: draw(shape, 4, 32, seed, ordered=ordered),
        **(sizes if family == "deepseek_v3" else {}),
    )
    check(model, tmp_path / "out")
    convert(Request(model.folder, "megatron", tmp_path / "megatron", parallel=layout))
    convert(Request(tmp_path / "megatron", "hf", tmp_path / "back"))
    ours = tensors_of(tmp_path / "back")
    for module, layer in model.layers.items():
        assert same(ours[f"{module}.weight"], layer.weight.astype(ml_dtypes.bfloat16)), module


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_scales_of_other_dtypes(tmp_path: Path, dtype: Any) -> None:
    """fp32 scales make products that fp32 rounds, once."""
    make = lambda _, shape, seed: draw(shape, 4, 32, seed, dtype=dtype)  # noqa: E731
    check(write_gptq(tmp_path / "source", make=make, num_hidden_layers=1), tmp_path / "out")


def test_single_modules_differ(tmp_path: Path) -> None:
    """``dynamic``: the first expression that fits the beginning of a name counts; ``-:`` leaves out."""
    dynamic = {
        r"-:.*\.o_proj": {},
        r"+:.*\.(?:gate|up)_proj$": {"bits": 8, "group_size": 16},
        r"model\.layers\.1\.": {"bits": 2},
        r".*\.up_proj": {"bits": 3},
    }

    def grid(module: str) -> tuple[int, int]:
        if "gate_proj" in module or "up_proj" in module:
            return 8, 16
        return (2 if "layers.1." in module else 4), 32

    model = write_gptq(
        tmp_path / "source",
        config={"dynamic": dynamic},
        make=lambda module, shape, seed: draw(shape, *grid(module), seed),
        quantised=lambda name: "_proj" in name and "o_proj" not in name,
        num_hidden_layers=2,
    )
    check(model, tmp_path / "out")
    said = json.loads((model.folder / "config.json").read_text())
    said["quantization_config"]["dynamic"] = {r"-:.*\.gate_proj": {}, **dynamic}
    (model.folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(Damaged, match="leaves out of quantisation"):
        prepare(Request(model.folder, "hf", tmp_path / "again"))


def test_the_config_may_lie_beside(tmp_path: Path) -> None:
    """AutoGPTQ's own file has no quant_method; where both are there they have to agree."""
    own = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": False}
    model = write(tmp_path / "source", own, lambda _, layer: layer.gptq(1), beside=True)
    check(model, tmp_path / "out")
    config = json.loads((model.folder / "config.json").read_text())
    said = {**config, "quantization_config": gptq_config(group_size=16)}
    (model.folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(Refused, match="do not agree"):
        prepare(Request(model.folder, "hf", tmp_path / "again"))


def test_v2_may_be_said_by_the_file_alone(tmp_path: Path) -> None:
    model = write_gptq(tmp_path / "source", 2, make=lambda _, shape, seed: draw(shape, 4, 32, seed, least=0))
    config = json.loads((model.folder / "config.json").read_text())
    (model.folder / "quantize_config.json").write_text(json.dumps(config["quantization_config"]))
    del config["quantization_config"]["checkpoint_format"]
    (model.folder / "config.json").write_text(json.dumps(config))
    check(model, tmp_path / "out")


@pytest.mark.parametrize("writer", ["gptqmodel:7.7.0", "auto_gptq:0.7.1", None])
def test_zeros_that_are_stored_as_all_ones(tmp_path: Path, writer: str | None) -> None:
    """GPTQModel's first format has zeros of 0 less one over whole words; of others nobody knows what they mean."""

    def pack(_: str, layer: Layer) -> dict[str, Any]:
        ones = 0x1111_1111
        found = layer.gptq(2)
        return {**found, "qzeros": (found["qzeros"].view(np.uint32) - np.uint32(ones)).view(np.int32)}

    meta = {"meta": {"quantizer": [writer]}} if writer else {}
    model = write(
        tmp_path / "source", gptq_config(**meta), pack, make=lambda _, shape, seed: draw(shape, 4, 32, seed, least=0)
    )
    if writer and writer.startswith("gptqmodel"):
        check(model, tmp_path / "out")
        return
    with pytest.raises(Refused, match="leaves open") as refused:
        convert(Request(model.folder, "hf", tmp_path / "out"))
    assert refused.value.where.endswith("qzeros")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


NAME = "model.layers.0.mlp.up_proj"
WRONG: dict[str, tuple[Any, type[DconvError], str, str]] = {
    "no zeros": (lambda t: t.pop(f"{NAME}.qzeros"), Damaged, "missing", f"{NAME}.qzeros"),
    "no codes": (lambda t: t.pop(f"{NAME}.qweight"), Damaged, "missing", f"{NAME}.qweight"),
    "twice": (lambda t: t.update({f"{NAME}.weight": np.zeros((96, 64), np.float16)}), Damaged, "twice", NAME),
    "fewer zeros": (
        lambda t: t.update({f"{NAME}.qzeros": t[f"{NAME}.qzeros"][:1].copy()}), Damaged, "not what", f"{NAME}.qzeros",
    ),
    "other scales": (
        lambda t: t.update({f"{NAME}.scales": t[f"{NAME}.scales"].T.copy()}), Damaged, "not what", f"{NAME}.scales",
    ),
    "a short order": (
        lambda t: t.update({f"{NAME}.g_idx": t[f"{NAME}.g_idx"][:-8].copy()}), Damaged, "not what", f"{NAME}.qweight",
    ),
    "codes that are none": (
        lambda t: t.update({f"{NAME}.qweight": t[f"{NAME}.qweight"].astype(np.float32)}), Damaged, "not what", NAME,
    ),
    "a group too many": (
        lambda t: t[f"{NAME}.g_idx"].__setitem__(5, 2), Damaged, "no scale", f"{NAME}.g_idx, column 5",
    ),
    "a group below": (
        lambda t: t[f"{NAME}.g_idx"].__setitem__(63, -1), Damaged, "no scale", f"{NAME}.g_idx, column 63",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_parts_that_do_not_fit(tmp_path: Path, what: str) -> None:
    edit, error, words, where = WRONG[what]
    model = write_gptq(tmp_path / "source")
    path = model.folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})
    for target in ("hf", "megatron"):
        with pytest.raises(error, match=words) as raised:
            convert(Request(model.folder, target, tmp_path / "out"))
        assert where in raised.value.where
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


SAID: dict[str, tuple[dict[str, Any], type[DconvError], str]] = {
    "another format": ({"checkpoint_format": "marlin"}, Refused, "format is not one"),
    "two formats": ({"format": "gptq_v2"}, Refused, "format is not one"),
    "a kernel's": ({"is_marlin_format": True}, Refused, "format is not one"),
    "words of 16 bits": ({"pack_dtype": "int16"}, Refused, "words that this version"),
    "five bits": ({"bits": 5}, Refused, "5 bits"),
    "no bits": ({"bits": None}, Damaged, "bits makes no sense"),
    "bits in words": ({"bits": "4"}, Damaged, "bits makes no sense"),
    "no group": ({"group_size": 0}, Damaged, "group_size makes no sense"),
    "groups of another size": ({"group_size": 16}, Damaged, "not what"),
    "other bits": ({"bits": 8}, Damaged, "not what"),
    "no expression": ({"dynamic": {"+:(": {"bits": 8}}}, Damaged, "no regular expression"),
    "forever": ({"dynamic": {"(a+)+b": {"bits": 8}}}, Refused, "too long a search"),
    "no table": ({"dynamic": ["up_proj"]}, Damaged, "no table"),
    "changes that make no sense": ({"dynamic": {".*up_proj": {"bits": True}}}, Damaged, "bits makes no sense"),
}


@pytest.mark.parametrize("what", SAID)
def test_a_config_that_does_not_fit(tmp_path: Path, what: str) -> None:
    said, error, words = SAID[what]
    model = write_gptq(tmp_path / "source", config={}, num_hidden_layers=1)
    config = json.loads((model.folder / "config.json").read_text())
    config["quantization_config"] |= said
    (model.folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=words):
        convert(Request(model.folder, "hf", tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_order_that_is_not_there(tmp_path: Path) -> None:
    model = write_gptq(tmp_path / "source", g_idx=False, config={"desc_act": True})
    with pytest.raises(Damaged, match="order of activations"):
        prepare(Request(model.folder, "hf", tmp_path / "out"))


def test_a_tied_output_layer_in_codes_is_not_the_embedding(tmp_path: Path) -> None:
    """The embedding is plain: its rounded copy is another matrix, and neither may be taken for the other."""
    quantised = lambda name: name == "lm_head.weight" or "_proj" in name  # noqa: E731
    model = write_gptq(tmp_path / "source", quantised=quantised, vocab_size=64)
    config = json.loads((model.folder / "config.json").read_text())
    (model.folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(Refused, match="ties the output"):
        prepare(Request(model.folder, "hf", tmp_path / "out"))
    (model.folder / "config.json").write_text(json.dumps(config))
    check(model, tmp_path / "out")
