"""Two checkpoints as logical tensors: equal across formats and layouts, and differences with name, size and place."""

from __future__ import annotations

import json
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from dconv.arch.llama import LLAMA
from dconv.checkpoint import safetensors
from dconv.compare import diff
from dconv.pipeline import Request, convert
from dconv.sharding.coords import Parallel
from tests.cli.conftest import Dconv, flip
from tests.models import config_of, tensors, write_random

NAME = "model.layers.2.mlp.up_proj.weight"


def place(folder: Path, name: str) -> tuple[Path, int]:
    """The file and byte offset of a tensor of a HuggingFace directory."""
    for path in folder.glob("*.safetensors"):
        stored = safetensors.read_header(path).get(name)
        if stored is not None:
            return path, stored.extents[0].offset
    raise KeyError(name)


def put(folder: Path, name: str, index: int, value: float) -> None:
    """Set element ``index`` of a bf16 tensor."""
    path, offset = place(folder, name)
    with path.open("r+b") as file:
        file.seek(offset + 2 * index)
        file.write(struct.pack("<f", value)[2:])


@pytest.mark.parametrize("other", ["hf", "legacy", "torch_dist"])
def test_equal_across_formats(dconv: Dconv, hf: Path, made: Callable[[str], Path], other: str) -> None:
    out = made(other)
    for a, b in ((hf, out), (out, hf)):
        ran = dconv("diff", a, b)
        assert ran.code == 0, ran.out
        assert ran.out.startswith(f"equal: {len(tensors(hf))} tensors")


def test_legacy_equals_torch_dist(made: Callable[[str], Path]) -> None:
    assert diff(made("legacy"), made("torch_dist")).equal


@pytest.mark.parametrize("format", ["legacy", "torch_dist"])
def test_one_element(dconv: Dconv, hf: Path, made: Callable[[str], Path], format: str) -> None:
    put(hf, NAME, 37, 1.0)
    out = made(format)
    put(hf, NAME, 37, 1.5)
    ran = dconv("diff", hf, out, "--json")
    assert ran.code == 1
    [found] = ran.json["differences"]
    assert (found["name"], found["elements"], found["largest"], found["at"]) == (NAME, 1, 0.5, [1, 5])
    shown = dconv("diff", hf, out)
    assert shown.code == 1
    assert NAME in shown.out
    assert "largest difference 0.5 at [1, 5]" in shown.out


def test_an_element_past_the_first_tile(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 1, "head_dim": 128}
    a = write_random(tmp_path / "a", LLAMA, config_of(LLAMA, **sizes))
    b = tmp_path / "b"
    name, last = "model.layers.0.mlp.down_proj.weight", 512 * 2048 - 1
    put(a, name, last, 2.0)
    shutil.copytree(a, b)
    put(b, name, last, -2.0)
    [found] = diff(a, b).differences
    assert (found.name, found.elements, found.largest, found.at) == (name, 1, 4.0, (511, 2047))


def test_bits_that_mean_the_same(tmp_path: Path, hf: Path) -> None:
    copy = tmp_path / "copy"
    put(hf, NAME, 0, 0.0)
    put(hf, NAME, 1, float("nan"))
    shutil.copytree(hf, copy)
    put(copy, NAME, 0, -0.0)
    path, offset = place(copy, NAME)
    flip(path, offset + 2)  # another payload of the NaN
    [found] = diff(hf, copy).differences
    assert (found.elements, found.largest) == (2, 0.0)
    put(copy, NAME, 1, 1.0)
    [found] = diff(hf, copy).differences
    assert found.largest == float("inf")
    assert json.loads(json.dumps(diff(hf, copy).to_dict()))["differences"][0]["largest"] == "inf"


def test_other_dtype_is_compared_by_value(dconv: Dconv, hf: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    convert(Request(hf, "megatron", wide, dtype="f32", parallel=Parallel(tp=2, etp=2)))
    found = diff(hf, wide)
    assert not found.equal
    assert len(found.differences) == len(tensors(hf))
    assert all(d.elements == 0 and d.largest == 0.0 for d in found.differences)
    shown = dconv("diff", hf, wide)
    assert shown.code == 1
    assert "bf16[48, 32] against f32[48, 32], the same values" in shown.out


def test_names_and_shapes(tmp_path: Path, hf: Path) -> None:
    tied = write_random(tmp_path / "tied", LLAMA, config_of(LLAMA, tie_word_embeddings=True, num_hidden_layers=5))
    found = diff(hf, tied)
    assert found.only_a == ("lm_head.weight",)
    assert all(name.startswith("model.layers.4.") for name in found.only_b)
    wider = write_random(tmp_path / "wider", LLAMA, config_of(LLAMA, intermediate_size=64))
    shapes = {d.name: (d.a, d.b) for d in diff(hf, wider).differences if d.elements is None}
    assert shapes[NAME] == ("bf16[48, 32]", "bf16[64, 32]")
    assert "only in" in diff(hf, tied).text()


def test_memory_and_holes(tmp_path: Path) -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 2, "vocab_size": 50000}
    config = config_of(LLAMA, **sizes)
    folders = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        specs = [s for entry in LLAMA.entries(LLAMA.config.facts(config)) for s in entry.fused.specs]
        size, first, _ = safetensors.lay_out(specs)
        with (folder / "model.safetensors").open("wb") as file:
            file.write(first)
            file.truncate(size)
        (folder / "config.json").write_text(json.dumps(config))
        folders.append(folder)
    put(folders[1], "lm_head.weight", 4096 * 49_999, 3.0)
    diff(*folders)  # what is imported on first use
    tracemalloc.start()
    [found] = diff(*folders).differences
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found.name, found.largest, found.at) == ("lm_head.weight", 3.0, (49_999, 0))
    assert peak < 32 << 20


def test_house_spellings_and_one_of_two_models_are_compared_on_the_side_that_has_them(
    dconv: Dconv, hf: Path, tmp_path: Path
) -> None:
    patterns = tmp_path / "names.json"
    house = tmp_path / "house"
    shutil.copytree(hf, house)
    for file in house.glob("*.safetensors"):
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = opened.read(length)
        changed = header.replace(b'"model.', b'"house.')
        file.write_bytes(file.read_bytes().replace(header, changed))
    for file in house.glob("*.index.json"):
        file.write_text(file.read_text().replace('"model.', '"house.'))
    patterns.write_text(json.dumps({"house.*": "model.*"}))
    both = tmp_path / "both"
    teacher = write_random(tmp_path / "teacher", LLAMA, config_of(LLAMA, num_hidden_layers=2))
    assert dconv("convert", hf, "megatron", "--teacher", teacher, "-o", both, "--tp", 2).code == 0
    for a, b, words in (
        (house, hf, ("--rename", patterns)),
        (hf, house, ("--rename", patterns)),
        (both, hf, ("--submodel", "student")),
        (teacher, both, ("--submodel", "teacher")),
        (house, both, ("--submodel", "student", "--rename", patterns)),
    ):
        ran = dconv("diff", a, b, *words)
        assert ran.code == 0, ran.err
    assert dconv("diff", hf, both, "--submodel", "teacher").code == 1
    for words in (("--rename", patterns), ("--submodel", "teacher")):
        ran = dconv("diff", hf, hf, *words)
        assert ran.code == 3
        assert f"{words[0]} fits neither side" in ran.err
