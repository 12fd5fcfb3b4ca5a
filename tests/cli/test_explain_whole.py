"""``inspect --explain`` of whole numbers: a weight by hand, taken from the words once more by the test's own shifts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dconv
from tests.cli.conftest import Dconv
from tests.cli.explained import said
from tests.quant import compressed
from tests.quant.whole import Model, draw, tensors_of, write_awq, write_gptq, write_packed

LESS_ONE, AS_IT_IS = "stored less one, zero = stored + 1", "stored as it is: GPTQ's second format"


def make(bits: int, *, ordered: bool = False) -> Any:
    return lambda _, shape, seed: draw(shape, bits, 32, seed, ordered=ordered)


FORMS: dict[str, Any] = {
    "gptq": lambda folder: write_gptq(folder, 1),
    "gptq_v2": lambda folder: write_gptq(folder, 2, make=lambda _, s, seed: draw(s, 4, 32, seed, least=0)),
    "ordered": lambda folder: write_gptq(folder, 1, config={"desc_act": True}, make=make(4, ordered=True)),
    "3 bits": lambda folder: write_gptq(folder, 2, config={"bits": 3}, make=make(3)),
    "8 bits": lambda folder: write_gptq(folder, 1, config={"bits": 8}, make=make(8), g_idx=False),
    "awq": lambda folder: write_awq(folder),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_example_is_what_the_words_hold(tmp_path: Path, form: str) -> None:
    model: Model = FORMS[form](tmp_path / "model")
    stored, explained = tensors_of(model.folder), said(model.folder)
    found = explained["example"]
    layer = model.layers[found["tensor"].removesuffix(".weight")]
    row, column = found["index"]
    group = int(layer.groups[column])
    less = 1 if form in ("gptq", "ordered", "8 bits") else 0
    for part, value, added in (("code", layer.codes[row, column], 0), ("zero", layer.zeros[row, group], less)):
        field = found[part]
        assert field["word"] == int(stored[field["tensor"]].view(np.uint32)[tuple(field["at"])])
        assert field["stored"] == field["word"] >> field["low"] & ((1 << layer.bits) - 1)
        assert field["value"] == field["stored"] + added == value
    if found["listed"]:
        assert int(stored[found["listed"]][column]) == group
    assert bool(found["listed"]) == (form not in ("awq", "8 bits"))
    assert found["group"] == group and tuple(found["scale_at"]) == (group, row)
    assert found["scale"] == float(stored[found["scale_tensor"]][group, row]) == float(layer.scales[row, group])
    assert found["weight"] == layer.weight[row, column]
    top, zero = (1 << layer.bits) - 1, int(layer.zeros[row, group])
    assert (found["lowest"], found["highest"]) == (-zero * found["scale"], (top - zero) * found["scale"])
    (scheme,) = explained["schemes"]
    parts = ["qweight", "scales", "qzeros"] + ["g_idx"] * (form not in ("awq", "8 bits"))
    assert [part["tensor"].rpartition(".")[2] for part in scheme["parts"]] == parts
    assert all(part["words"] for part in scheme["parts"])
    told = " ".join(scheme["sentences"])
    assert (LESS_ONE in told, AS_IT_IS in told) == (bool(less), form in ("gptq_v2", "3 bits"))
    assert ("0, 2, 4, 6, 1, 3, 5, 7" in told) == (form == "awq")


INT = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32}
PACKED: dict[str, dict[str, Any]] = {
    "pack": INT,
    "pack with zeros": {**INT, "symmetric": False},
    "pack, one scale": {"type": "int", "num_bits": 4, "strategy": "tensor"},
    "int8": {"type": "int", "num_bits": 8, "strategy": "channel"},
    "int8 with zeros": {"type": "int", "num_bits": 8, "strategy": "channel", "symmetric": False},
}


@pytest.mark.parametrize("form", PACKED)
def test_signed_codes(tmp_path: Path, form: str) -> None:
    """compressed-tensors' own files, and its own decoding."""
    style = "pack-quantized" if form.startswith("pack") else "int-quantized"
    groups = {"group_0": {"targets": ["Linear"], "weights": PACKED[form], "format": style}}
    folder = compressed.write(tmp_path / "model", groups, torch.float32, form=style)
    stored, explained = tensors_of(folder), said(folder, f"int{PACKED[form]['num_bits']}")
    found = explained["example"]
    dense = compressed.decompressed(folder)[found["tensor"]]
    assert found["weight"] == pytest.approx(float(dense[tuple(found["index"])]), rel=1e-6)
    code, zero = found["code"], found["zero"]
    half = 8 if style == "pack-quantized" else 0
    assert (zero is not None) == form.endswith("zeros")
    for field in (code, zero) if zero else (code,):
        held = stored[field["tensor"]][tuple(field["at"])]
        wide = int(held.view(np.uint32) if half else held.view(np.uint8))
        assert field["word"] == wide and field["stored"] == (wide >> field["low"] & 15 if half else int(held))
        assert field["value"] == field["stored"] - half
    assert found["weight"] == (code["value"] - (zero["value"] if zero else 0)) * found["scale"]
    least, less = -8 if half else -128, zero["value"] if zero else 0
    assert (found["lowest"], found["highest"]) == tuple((at - less) * found["scale"] for at in (least, ~least))
    text = dconv.inspect(folder, explain=True).text()
    assert ("raised by 8" in text) == bool(half)
    assert all(len(line) <= 80 for line in text.splitlines()), text


@pytest.mark.parametrize("ordered", [False, True])
def test_packed_words_of_a_known_model(tmp_path: Path, ordered: bool) -> None:
    """Groups by ``weight_g_idx`` as well; scales lie as rows and groups, of which the place is told."""
    pack = make(4, ordered=ordered)
    model = write_packed(tmp_path / "model", g_idx=ordered, make=pack, config={"actorder": "group"} if ordered else {})
    stored, found = tensors_of(model.folder), said(model.folder)["example"]
    layer = model.layers[found["tensor"].removesuffix(".weight")]
    row, column = found["index"]
    group = int(layer.groups[column])
    assert found["group"] == group and tuple(found["scale_at"]) == (row, group)
    assert found["listed"].endswith("weight_g_idx") == ordered
    assert found["scale"] == float(stored[found["scale_tensor"]][row, group])
    assert found["code"]["stored"] == layer.codes[row, column] and found["zero"]["stored"] == layer.zeros[row, group]
    assert found["weight"] == layer.weight[row, column]


def test_on_a_terminal(dconv: Dconv, tmp_path: Path) -> None:
    """In words, the first format's zero less one; under the method's name and the codes'."""
    model = write_gptq(tmp_path / "model", 1)
    zero = said(model.folder)["example"]["zero"]
    for words in ([], ["gptq"], ["int4"]):
        ran = dconv("inspect", model.folder, "--explain", *words)
        assert ran.code == 0 and all(len(line) <= 80 for line in ran.out.splitlines())
        assert f"they are {zero['stored']}, stored less one: {zero['value']}" in ran.out
        assert f"0x{zero['word']:08x}" in ran.out
    assert dconv("inspect", model.folder, "--explain", "awq").code == 2
    for words in (["--scale-rule", "even"], ["--explain", "--scale-rule", "up"]):
        assert dconv("inspect", model.folder, *words).code == 2
    ran = dconv("inspect", model.folder, "--explain", "--scale-rule", "even")
    assert ran.code == 0 and "MX scales by the even rule." in ran.out
