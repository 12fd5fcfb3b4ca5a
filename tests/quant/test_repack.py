"""Whole numbers packed anew: GPTQ's two formats, AWQ and pack-quantized from each other without one rounding."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dconv.arch.registry import by_name
from dconv.errors import Refused
from dconv.pipeline import Request, convert, prepare, run
from dconv.quantise import VARIANTS
from dconv.sharding.coords import Parallel
from dconv.sharding.precision import numeric
from dconv.sharding.rank import Settings
from tests.models import tree_digest
from tests.quant.models import write_normal
from tests.quant.whole import Model, draw, linear, same, tensors_of, write_awq, write_gptq, write_packed

PACKED = "pack-quantized"
FORMS = [("gptq", "gptq"), ("gptq", "gptq_v2"), ("awq", "awq"), ("gptq", PACKED)]
SOURCES = ["gptq", "gptq_v2", "awq", PACKED]
PARTS = ("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
WIDE: dict[str, Any] = {"hidden_size": 320, "intermediate_size": 1056, "num_hidden_layers": 1, "head_dim": 80}


def packed(model: Model, form: str) -> dict[str, Any]:
    """The tensors of a form by the test's own packing, the plain ones as they are."""
    given = tensors_of(model.folder)
    found = {name: value for name, value in given.items() if name.rpartition(".")[2] not in PARTS}
    for module, layer in model.layers.items():
        if form == PACKED:
            parts = layer.packed(symmetric=layer.even)
        else:
            parts = layer.awq() if form == "awq" else layer.gptq(1 if form == "gptq" else 2)
        found |= {f"{module}.{part}": value for part, value in parts.items()}
    return found


def source(folder: Path, form: str, **options: Any) -> Model:
    if form == "awq":
        return write_awq(folder, **options)
    if form == PACKED:
        return write_packed(folder, **options)
    return write_gptq(folder, 1 if form == "gptq" else 2, **options)


def said(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_the_forms_are_those_that_are_tested() -> None:
    known = {(form, name) for form, known in VARIANTS.items() for name, one in known.items() if one.repacks}
    assert known == {*FORMS, ("awq", PACKED)}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize(("target", "quant"), FORMS)
@pytest.mark.parametrize("form", SOURCES)
def test_each_into_each(tmp_path: Path, form: str, target: str, quant: str, family: str) -> None:
    """Every tensor as the test's own packing has it, and the weights that it decodes to are the source's."""
    model = source(tmp_path / "source", form, family=family)
    job = prepare(Request(model.folder, target, tmp_path / "out", quant=quant))
    assert numeric(job.plan) == {}, "no value changes"
    run(job, Settings())
    ours, wanted = tensors_of(tmp_path / "out"), packed(model, quant)
    assert ours.keys() == wanted.keys()
    assert [name for name in wanted if not same(ours[name], wanted[name])] == []
    for folder in (tmp_path / "out", model.folder):
        convert(Request(folder, "hf", folder / "dense", dtype="f32"))
    assert tree_digest(tmp_path / "out" / "dense") == tree_digest(model.folder / "dense")
    beside = tmp_path / "out" / "quantize_config.json"
    assert beside.exists() == (said(tmp_path / "out")["quant_method"] == "gptq") == quant.startswith("gptq")
    assert not beside.exists() or json.loads(beside.read_text()) == said(tmp_path / "out")


@pytest.mark.parametrize(("target", "quant"), FORMS)
@pytest.mark.parametrize("form", ["gptq", "awq", PACKED])
def test_there_and_back(tmp_path: Path, form: str, target: str, quant: str) -> None:
    model = source(tmp_path / "source", form)
    convert(Request(model.folder, target, tmp_path / "there", quant=quant))
    convert(Request(tmp_path / "there", form if form == "gptq" else "awq", tmp_path / "back", quant=form))
    given, back = tensors_of(model.folder), tensors_of(tmp_path / "back")
    assert given.keys() == back.keys()
    assert [name for name in given if not same(given[name], back[name])] == []


#: Every way to read and to pack; the other pairs with ``--long``.
WORLDS = [
    ("awq", "gptq", "gptq"), ("gptq", "awq", "awq"), ("gptq3", "gptq", "gptq_v2"), ("gptq", "megatron", None),
    ("ordered", "hf", None), ("gptq3", "gptq", PACKED), (PACKED, "megatron", None),
    *(pytest.param(*pair, marks=pytest.mark.long) for pair in (
        ("gptq", "gptq", "gptq_v2"), ("awq", "megatron", None), ("gptq3", "hf", None), (PACKED, "gptq", "gptq"),
        (PACKED, "awq", "awq"), ("awq", "awq", PACKED),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("form", "target", "quant"), WORLDS)
def test_any_world_gives_the_same_bytes(tmp_path: Path, form: str, target: str, quant: str | None) -> None:
    """Ranks one by one in any order, with threads and memory of every size; leaves that end inside of groups."""
    bits, ordered = 3 if form == "gptq3" else 4, form == "ordered"
    model = source(
        tmp_path / "source",
        form if form in SOURCES else "gptq",
        family="qwen2",
        **({} if form in ("awq", PACKED) else {"config": {"bits": bits, "desc_act": ordered}}),
        make=lambda _, shape, seed: draw(shape, bits, 32, seed, ordered=ordered),
        **WIDE,
    )
    layout = Parallel(tp=2, etp=2) if target == "megatron" else Parallel()
    asked = {"model": model.folder, "format": target, "quant": quant, "parallel": layout}
    convert(Request(**asked, out=tmp_path / "one"))
    expected = tree_digest(tmp_path / "one")
    shuffle = random.Random(f"{form} {target} {quant}")
    for world in (1, 3, 4):
        out = tmp_path / f"by {world}"
        launched = time.time()
        for rank in shuffle.sample(range(world), world):
            memory, threads = shuffle.choice((64 << 10, 300_000, 256 << 20)), shuffle.choice((1, 2))
            job = prepare(Request(**asked, out=out))
            run(job, Settings(rank=rank, world=world, threads=threads, max_memory=memory, launched=launched))
        assert tree_digest(out) == expected


def test_an_order_goes_along(tmp_path: Path) -> None:
    """Between GPTQ's two formats; scales keep their bits, of whatever dtype."""
    model = write_gptq(
        tmp_path / "source",
        config={"desc_act": True, "sym": True},
        make=lambda _, shape, seed: draw(shape, 4, 32, seed, ordered=True, dtype=np.float32),
    )
    convert(Request(model.folder, "gptq", tmp_path / "out", quant="gptq_v2", dtype="f16"))
    ours, wanted = tensors_of(tmp_path / "out"), packed(model, "gptq_v2")
    for module in model.layers:
        for part in PARTS[:4]:
            assert same(ours[f"{module}.{part}"], wanted[f"{module}.{part}"]), module
    assert ours["model.embed_tokens.weight"].dtype == np.float16
    config = said(tmp_path / "out")
    assert (config["desc_act"], config["sym"], config["bits"], config["group_size"]) == (True, True, 4, 32)


def test_grids_of_single_modules_are_said(tmp_path: Path) -> None:
    """And layers that the source left plain stay so, and are said to be."""

    def grid(module: str) -> tuple[int, int]:
        return (8, 16) if "down_proj" in module else (4, 32)

    model = write_gptq(
        tmp_path / "source",
        config={"dynamic": {r"-:.*\.o_proj": {}, r".*down_proj": {"bits": 8, "group_size": 16}}},
        make=lambda module, shape, seed: draw(shape, *grid(module), seed),
        quantised=lambda name: linear(name) and "o_proj" not in name,
        family="qwen3_moe",
    )
    convert(Request(model.folder, "gptq", tmp_path / "out", quant="gptq_v2"))
    ours, wanted = tensors_of(tmp_path / "out"), packed(model, "gptq_v2")
    assert ours.keys() == wanted.keys()
    assert all(same(ours[name], wanted[name]) for name in wanted)
    dynamic = said(tmp_path / "out")["dynamic"]
    assert _excluded(dynamic, "model.layers.3.self_attn.o_proj") and _excluded(dynamic, "model.layers.0.mlp.gate")
    assert not any(_excluded(dynamic, module) for module in model.layers)
    convert(Request(tmp_path / "out", "hf", tmp_path / "dense", dtype="f32"))
    convert(Request(model.folder, "hf", tmp_path / "directly", dtype="f32"))
    assert tree_digest(tmp_path / "dense") == tree_digest(tmp_path / "directly")
    with pytest.raises(Refused, match="8 bits") as refused:
        prepare(Request(model.folder, "awq", tmp_path / "awq"))
    assert "down_proj" in refused.value.where


def _excluded(dynamic: dict[str, Any], module: str) -> bool:
    import re

    return any(re.match(rule[2:], module) for rule in dynamic if rule.startswith("-:"))


def test_awq_says_what_is_plain(tmp_path: Path) -> None:
    model = write_awq(
        tmp_path / "source",
        config={"modules_to_not_convert": ["o_proj"]},
        quantised=lambda name: linear(name) and "o_proj" not in name,
        family="mixtral",
    )
    convert(Request(model.folder, "awq", tmp_path / "out"))
    listed = said(tmp_path / "out")["modules_to_not_convert"]
    assert any(entry in "model.layers.0.self_attn.o_proj" for entry in listed)
    assert any(entry in "model.layers.0.block_sparse_moe.gate" for entry in listed)
    assert not any(entry in module for entry in listed for module in model.layers)


def refused(request: Request, words: str) -> Refused:
    """While planning, before anything is written."""
    before = sorted(path.name for path in request.output.parent.iterdir())
    with pytest.raises(Refused, match=words) as found:
        prepare(request)
    assert sorted(path.name for path in request.output.parent.iterdir()) == before
    return found.value


@pytest.mark.parametrize("quant", [quant for target, quant in FORMS if target == "gptq"])
def test_plain_weights_are_calibrated(tmp_path: Path, quant: str) -> None:
    """Whatever the source, they are not rounded on the way; whole numbers that are there are not chosen again."""
    folder = write_normal(tmp_path / "source", by_name("llama"), num_hidden_layers=1)
    convert(Request(folder, "fp8", tmp_path / "fp8", block_size=(16, 16)))
    convert(Request(folder, "megatron", tmp_path / "megatron"))
    np.save(tmp_path / "ids.npy", np.arange(64) % 50)
    asked: dict[str, Any] = {
        "quant": quant, "calibration": str(tmp_path / "ids.npy"),
        "quantization_config": json.dumps({"group_size": 32, "nsamples": 2, "seqlen": 16}),
    }  # fmt: skip
    for model in (folder, tmp_path / "fp8", tmp_path / "megatron"):
        job = prepare(Request(model, "gptq", tmp_path / "out", **asked))
        assert job.calibrating and set(job.calibrating.recipes) == set(filter(linear, tensors_of(folder)))
    whole = write_gptq(tmp_path / "whole", num_hidden_layers=1).folder
    assert prepare(Request(whole, "gptq", tmp_path / "out", quant=quant)).calibrating is None
    refused(Request(whole, "gptq", tmp_path / "out", **asked), "in whole numbers already")


@pytest.mark.parametrize("told", [True, False])
def test_awq_has_no_order(tmp_path: Path, told: bool) -> None:
    """Whether the config tells it, or only g_idx does."""
    model = write_gptq(
        tmp_path / "source",
        config={"desc_act": told},
        make=lambda _, shape, seed: draw(shape, 4, 32, seed, ordered=True),
    )
    assert "_proj" in refused(Request(model.folder, "awq", tmp_path / "out"), "do not fit").where
    error = refused(Request(model.folder, "gptq", tmp_path / "out", quant=PACKED), "do not fit")
    assert "_proj" in error.where and "FORMAT gptq keeps the order" in error.do


@pytest.mark.parametrize(("target", "quant"), [("awq", "awq"), ("gptq", PACKED)])
def test_an_order_that_is_none(tmp_path: Path, target: str, quant: str) -> None:
    """The config speaks of one, and g_idx has the columns in their own."""
    model = write_gptq(tmp_path / "source", config={"desc_act": True})
    convert(Request(model.folder, target, tmp_path / "out", quant=quant))
    ours, wanted = tensors_of(tmp_path / "out"), packed(model, quant)
    assert ours.keys() == wanted.keys() and all(same(ours[name], wanted[name]) for name in wanted)


def test_a_zero_of_0_is_not_written_in_the_first_format(tmp_path: Path) -> None:
    model = write_awq(tmp_path / "source", make=lambda _, shape, seed: draw(shape, 4, 32, seed, least=0))
    error = refused(Request(model.folder, "gptq", tmp_path / "out"), "zero point of 0")
    assert error.where.endswith("_proj.qzeros") and "gptq_v2" in error.do
    convert(Request(model.folder, "gptq", tmp_path / "out", quant="gptq_v2"))
    assert same(tensors_of(tmp_path / "out")["lm_head.weight"], tensors_of(model.folder)["lm_head.weight"])


def test_an_output_layer_in_codes(tmp_path: Path) -> None:
    """GPTQ has a word for it, AWQ has none."""
    model = write_gptq(
        tmp_path / "source",
        quantised=lambda name: linear(name) or name == "lm_head.weight",
        config={"lm_head": True},
        vocab_size=64,
    )
    convert(Request(model.folder, "gptq", tmp_path / "out", quant="gptq_v2"))
    assert said(tmp_path / "out")["lm_head"] is True
    ours, wanted = tensors_of(tmp_path / "out"), packed(model, "gptq_v2")
    assert ours.keys() == wanted.keys() and all(same(ours[name], wanted[name]) for name in wanted)
    refused(Request(model.folder, "awq", tmp_path / "awq"), "do not fit")


def test_numbers_that_would_be_multiplied(tmp_path: Path) -> None:
    """A muP factor goes into dense weights; into codes it would need a rounding."""
    model = write_gptq(tmp_path / "source", family="minicpm", num_hidden_layers=2)
    convert(Request(model.folder, "gptq", tmp_path / "out"))
    error = refused(Request(model.folder, "gptq", tmp_path / "folded", mup2llama=True), "to be multiplied")
    assert "_proj" in error.where
    convert(Request(model.folder, "hf", tmp_path / "dense", mup2llama=True))


def test_groups_of_two_sizes_are_not_awq_s(tmp_path: Path) -> None:
    model = write_gptq(
        tmp_path / "source",
        config={"dynamic": {r".*up_proj": {"group_size": 16}}},
        make=lambda module, shape, seed: draw(shape, 4, 16 if "up_proj" in module else 32, seed),
    )
    assert "up_proj" in refused(Request(model.folder, "awq", tmp_path / "out"), "do not fit").where


def test_a_writer_s_own_zeros_are_understood_first(tmp_path: Path) -> None:
    """GPTQModel's first format with zeros of 0 becomes the second one; as the first it is refused."""
    model = write_gptq(
        tmp_path / "source",
        2,
        config={"checkpoint_format": "gptq", "meta": {"quantizer": ["gptqmodel:7.7.0"]}},
        make=lambda _, shape, seed: draw(shape, 4, 32, seed, least=0),
    )
    path = model.folder / "model.safetensors"
    tensors = load_file(path)
    for name, value in tensors.items():
        if name.endswith("qzeros"):
            tensors[name] = (value.view(np.uint32) - np.uint32(0x1111_1111)).view(np.int32)
    save_file(tensors, path, {"format": "pt"})
    convert(Request(model.folder, "gptq", tmp_path / "out", quant="gptq_v2"))
    ours, wanted = tensors_of(tmp_path / "out"), packed(model, "gptq_v2")
    assert all(same(ours[name], wanted[name]) for name in wanted)
    refused(Request(model.folder, "gptq", tmp_path / "first"), "zero point of 0")


def test_who_chose_the_numbers_is_told(tmp_path: Path) -> None:
    """GPTQModel loads zero points in the first format only where it is named; else a note says so."""
    by = {"meta": {"quantizer": ["gptqmodel:7.7.0", 5, "\n:x"]}}
    for name, form, more, noted in (
        ("its awq", "awq", by, False), ("its gptq", "gptq", by, False), ("awq", "awq", {}, True),
        ("symmetric", "gptq", {"sym": True}, False),
    ):  # fmt: skip
        model = source(tmp_path / name, form, config=more, num_hidden_layers=1)
        job = prepare(Request(model.folder, "gptq", tmp_path / "out"))
        assert any("gptq_v2" in note for note in job.notes) == noted, name
        second = prepare(Request(model.folder, "gptq", tmp_path / "out", quant="gptq_v2"))
        assert not any("gptq_v2 is for" in note for note in second.notes)
        convert(Request(model.folder, "gptq", tmp_path / f"{name} out"))
        programs = said(tmp_path / f"{name} out")["meta"]["quantizer"]
        assert programs[:-1] == (["gptqmodel:7.7.0"] if "meta" in more else []) and programs[-1].startswith("dconv:")
