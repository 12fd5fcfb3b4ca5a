"""``inspect --explain``: what codes mean, taken from the files' bytes once more by torch and ml_dtypes."""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dconv
from dconv.arch.registry import by_name
from dconv.checkpoint import safetensors
from dconv.checkpoint.source import expected_specs
from dconv.coded.places import place_of
from dconv.errors import Refused, UsageError
from dconv.pipeline import Request, convert
from dconv.report import explain as explaining
from dconv.report import sample
from dconv.report.cost import Cost, Part
from dconv.sharding.tensor import TensorSpec
from tests.cli.conftest import Dconv
from tests.cli.explained import BLOCK, E4M3, linear, plain, said, stored_in
from tests.models import config_of


def odd_codes(folder: Path) -> None:
    """Some codes of every kind, NaN among them, where an encoder would not have put them."""
    tensors, draw = load_file(folder / "model.safetensors"), np.random.default_rng(5)
    for name, value in tensors.items():
        if value.dtype == E4M3:
            codes = value.view(torch.uint8).numpy().copy()
            where = draw.random(codes.shape) < 0.1
            codes[where] = draw.integers(0, 256, where.sum(), np.uint8)
            tensors[name] = torch.from_numpy(codes).view(E4M3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def inverted(folder: Path) -> None:
    """As GPTQModel stores it."""
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: 1 / value for name, value in tensors.items() if name.endswith("_scale_inv")}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= {"weight_scale_method": "block", "weight_scale_semantics": "inverse"}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain(tmp_path_factory.mktemp("plain") / "source")


@pytest.fixture(scope="module")
def coded(source: Path) -> Path:
    convert(Request(source, "fp8", source.with_name("fp8"), block_size=BLOCK))
    return source.with_name("fp8")


# ---------------------------------------------------------------------------------------------------- what codes mean


@pytest.mark.parametrize("kind", ["blocks", "divides", "powers", "tensor"])
def test_the_example_is_what_the_files_hold(tmp_path: Path, source: Path, kind: str) -> None:
    options: dict[str, Any] = {
        "blocks": {"block_size": BLOCK},
        "divides": {"block_size": BLOCK},
        "powers": {"block_size": BLOCK, "scale_format": "ue8m0"},
        "tensor": {"quant": "fp8_tensor"},
    }[kind]
    convert(Request(source, "fp8", tmp_path / "fp8", **options))
    if kind == "divides":
        inverted(tmp_path / "fp8")
    there = stored_in(tmp_path / "fp8", (1 << 20, 1 << 20) if kind == "tensor" else BLOCK, kind == "divides")
    found = said(tmp_path / "fp8", "fp8")["example"]
    name, at = found["tensor"], tuple(found["index"])
    assert found["code"] == int(there.codes[name].view(torch.uint8)[at])
    assert found["value"] == float(there.codes[name][at].double())
    block = (0, 0) if kind == "tensor" else (at[0] // 32, at[1] // 32)
    assert tuple(found["block"]) == block
    scale = there.scales[name].double().reshape(found["blocks"])[block]
    assert found["scale"] == float(scale) and found["scale_tensor"] == f"{name}_scale_inv"
    assert found["divides"] == (kind == "divides")
    assert found["weight"] == pytest.approx(there.weights()[name][at], rel=1e-15)
    by, size = float(there.each(name)[at]), np.abs(np.float64(found["value"]))
    above = np.uint8(found["code"] & 0x7F) + np.uint8(1)
    step = float(above.view(ml_dtypes.float8_e4m3fn)) - size
    assert (found["step"], found["holds"]) == pytest.approx((step * by, 448 * by), rel=1e-15)


def test_what_is_stored_is_told_by_its_own_names(tmp_path: Path, coded: Path) -> None:
    found = said(coded)
    (scheme,) = found["schemes"]
    there = stored_in(coded)
    assert (found["coded"], found["asked"], found["tensors"]) == (True, "fp8", len(there.codes))
    assert found["weights"] == sum(codes.numel() for codes in there.codes.values())
    codes, scales = scheme["parts"]
    assert (scales["tensor"], scheme["tensors"]) == (f"{codes['tensor']}_scale_inv", len(there.codes))
    assert scales["shape"] == list(there.scales[codes["tensor"]].shape)
    assert "multiplies" in scheme["sentences"][0] and "GPTQModel" in scheme["sentences"][0]
    inverted(shutil.copytree(coded, tmp_path / "fp8"))
    assert "divides" in said(tmp_path / "fp8")["schemes"][0]["sentences"][0]


@pytest.mark.parametrize(
    ("family", "quant", "reader"),
    [
        ("gpt_oss", "mxfp4", None), ("llama", "mxfp4", None), ("llama", "mxfp6_e3m2", None), ("llama", "mxfp8", None),
        ("llama", "mxfp4", "compressed-tensors"), ("llama", "nvfp4", None),
    ],
)  # fmt: skip
def test_other_schemes(tmp_path: Path, family: str, quant: str, reader: str | None) -> None:
    """The example's weight is what is decoded for anyone, and so is every sum; 4-bit codes are counted in the bytes."""
    convert(Request(plain(tmp_path / "source", family), "mx", tmp_path / "coded", quant=quant, quant_config=reader))
    convert(Request(tmp_path / "coded", "hf", tmp_path / "dense", dtype="f32"))
    found, dense = said(tmp_path / "coded", quant), load_file(tmp_path / "dense" / "model.safetensors")
    stored = load_file(tmp_path / "coded" / "model.safetensors")
    example = found["example"]
    name = example["tensor"].removesuffix("_blocks").replace("weight_packed", "weight")
    weight = dense[name].mT if family == "gpt_oss" else dense[name]
    assert example["weight"] == pytest.approx(float(weight[tuple(example["index"])]), rel=1e-6)
    assert example["value"] * example["scale"] == example["weight"]
    assert 0 < abs(example["weight"]) <= example["holds"]
    usage = found["usage"]
    costs = {cost["encoding"]: cost for cost in found["costs"]}
    assert sum(each["codes"] for each in usage) == found["weights"] == costs["fp8_tensor"]["weights"]
    if quant != "nvfp4":
        assert costs[quant]["relative_error"] == 0 or reader or quant == "mxfp8"
    if quant in ("mxfp4", "nvfp4"):
        packed = [v.numpy().reshape(-1) for n, v in stored.items() if n.endswith(("_blocks", "packed")) or (
            v.dtype == torch.uint8 and n.endswith(".weight")
        )]  # fmt: skip
        counts = np.bincount(np.concatenate([part for p in packed for part in (p & 15, p >> 4)]), minlength=16)
        zeros = sum(each["shares"]["zero"] * each["codes"] for each in usage)
        most = sum(each["shares"]["largest"] * each["codes"] for each in usage)
        assert (zeros, most) == pytest.approx((counts[0] + counts[8], counts[7] + counts[15]))


def test_neurons_codes_end_at_240(tmp_path: Path, coded: Path) -> None:
    convert(Request(coded, "neuron", tmp_path / "neuron"))
    found = said(tmp_path / "neuron", "neuron")
    assert said(tmp_path / "neuron", "fp8")["schemes"] == found["schemes"]
    example = found["example"]
    assert example["holds"] == pytest.approx(240 * example["scale"])
    assert all("multiplies" in scheme["sentences"][0] for scheme in found["schemes"])
    assert not any(cost["encoding"].startswith("neuron") for cost in found["costs"])
    rows = [each for each in found["usage"] if each["class"].startswith("self_attn")]
    assert rows and all(each["shares"]["largest"] > 0 and "8" not in each["exponents"] for each in rows)


def test_codes_are_counted(tmp_path: Path, coded: Path) -> None:
    """Shares and bounds of each class, from a table of e4m3 that ml_dtypes makes."""
    coded = shutil.copytree(coded, tmp_path / "fp8")
    odd_codes(coded)
    there = stored_in(coded)
    worth = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    size = np.abs(worth)
    half = np.array([max(np.exp2(np.floor(np.log2(v))), 2.0**-6) / 16 if v else 2.0**-10 for v in size])
    classes: dict[str, list[str]] = defaultdict(list)
    for name, codes in there.codes.items():
        classes[place_of(name, tuple(codes.shape)).kind].append(name)
    usage = {each["class"]: each for each in said(coded)["usage"]}
    assert set(usage) == set(classes)
    for kind, names in classes.items():
        found, counts = usage[kind], np.zeros(256)
        halves = squares = of_largest = 0.0
        for name in names:
            codes, by = there.codes[name].view(torch.uint8).numpy(), there.each(name)
            counts += np.bincount(codes.reshape(-1), minlength=256)
            known = np.isfinite(worth[codes])
            halves += np.square(half[codes] * by)[known].sum()
            squares += np.square(worth[codes] * by)[known].sum()
            for row in range(0, codes.shape[0], 32):
                for column in range(0, codes.shape[1], 32):
                    block = codes[row : row + 32, column : column + 32]
                    most = block.reshape(-1)[np.nanargmax(size[block])]
                    of_largest = max(of_largest, half[most] / size[most])
        shares = counts / counts.sum()
        assert (found["tensors"], found["looked_at"], found["codes"]) == (len(names), len(names), counts.sum())
        assert found["shares"] == pytest.approx({
            "zero": shares[size == 0].sum(),
            "subnormal": shares[(size > 0) & (size < 2.0**-6)].sum(),
            "largest": shares[size == 448].sum(),
            "no number": shares[np.isnan(size)].sum(),
        })  # fmt: skip
        powers = {str(e): shares[(size >= 2.0**e) & (size < 2.0 ** (e + 1))].sum() for e in range(8, -7, -1)}
        assert found["exponents"] == pytest.approx(powers)
        normal = (counts > 0) & (size >= 2.0**-6)
        assert found["bound_of_weight"] == (half[normal] / size[normal]).max()
        assert found["bound_of_largest"] == of_largest
        assert found["bound"] == pytest.approx(np.sqrt(halves / squares))
        assert found["expected"] == pytest.approx(np.sqrt(halves / squares / 3))


def test_bounds_hold_for_what_was_encoded(source: Path, coded: Path) -> None:
    """The error that encoding really made, the plain source being known, is within the bound and near what is told."""
    before, after = load_file(source / "model.safetensors"), stored_in(coded).weights()
    for each in said(coded)["usage"]:
        names = [name for name, value in after.items() if place_of(name, value.shape).kind == each["class"]]
        wrong = sum(np.square(after[name] - before[name].double().numpy()).sum() for name in names)
        real = np.sqrt(wrong / sum(np.square(after[name]).sum() for name in names))
        assert real <= each["bound"] and real == pytest.approx(each["expected"], rel=0.15)


# --------------------------------------------------------------------------------------------------- what is not known


def test_a_scheme_without_words_is_told_by_its_parts(coded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = said(coded)
    monkeypatch.setattr(explaining, "meaning_of", lambda derived, container: None)
    found = said(coded)
    assert (found["example"], found["usage"], found["kept"]) == (None, [], "")
    names = [[part["tensor"] for part in each["schemes"][0]["parts"]] for each in (found, known)]
    assert names[0] == names[1]
    assert found["costs"] == [cost for cost in known["costs"] if not cost["encoding"].startswith("neuron")]
    assert "What it would lose again" in dconv.inspect(coded, explain=True).text()


@pytest.mark.parametrize(
    ("which", "word"),
    [("coded", "mxfp4"), ("coded", "fp"), ("coded", "fp8_tensor"), ("source", "q4_0"), ("source", "")],
)
def test_a_word_that_does_not_fit(source: Path, coded: Path, which: str, word: str) -> None:
    with pytest.raises(UsageError) as caught:
        dconv.inspect(coded if which == "coded" else source, explain=word)
    assert "fp8" in caught.value.expected


def test_a_model_that_no_scheme_stores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="gpt2"):
        dconv.inspect(plain(tmp_path / "gpt2", "gpt2"), explain="fp8")


# ------------------------------------------------------------------------------------------------------ bounded reads


def sparse_fp8(folder: Path) -> int:
    """Two layers of a MiniMax-M2 twice as wide as released, whose file is one hole, and the bytes of its scales."""
    family = by_name("minimax_m2")
    sizes = {"hidden_size": 6144, "intermediate_size": 3072, "num_local_experts": 32, "head_dim": 128}
    config = config_of(family, **sizes, num_hidden_layers=2, num_attention_heads=48, num_key_value_heads=8)
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    specs: list[TensorSpec] = []
    for name, spec in expected_specs(family, family.facts(config)).items():
        if linear(name) and len(spec.shape) == 2:
            shape = tuple(-(-n // 128) for n in spec.shape)
            specs += [TensorSpec(name, spec.shape, "f8_e4m3"), TensorSpec(f"{name}_scale_inv", shape, "f32")]
        else:
            specs.append(spec)
    size, first, _ = safetensors.lay_out(specs)
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(first)
        file.truncate(size)
    (folder / "config.json").write_text(json.dumps(config))
    return sum(spec.nbytes for spec in specs if spec.dtype == "f32" and spec.name.endswith("_scale_inv"))


def test_reads_are_bounded_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3.7 GB at most a sample, and `inspect`'s own reading of all scales; each read is counted."""
    scales, count = sparse_fp8(tmp_path / "model"), 0
    real = os.preadv

    def counted(fd: int, buffers: Any, offset: int) -> int:
        nonlocal count
        got = real(fd, buffers, offset)
        count += got
        return got

    monkeypatch.setattr(os, "preadv", counted)
    found = said(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").stat().st_size > 3.5e9
    seen = found["sample"]
    assert not seen["whole"] and seen["weights"] <= sample.WEIGHTS
    assert seen["bytes_read"] == count - scales
    assert seen["bytes_read"] < 3 * sample.WEIGHTS and seen["reads"] < 20_000
    assert {each["class"] for each in found["usage"] if each["codes"]} == {each["class"] for each in found["usage"]}
    assert said(tmp_path / "model") == found


def test_a_sample_knows_the_largest_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tensor that is read in part: by the block with the largest scale."""
    source = plain(tmp_path / "source", hidden_size=256, intermediate_size=640)
    convert(Request(source, "fp8", tmp_path / "fp8", block_size=BLOCK))
    weights = stored_in(tmp_path / "fp8").weights()
    parts: list[Part] = []
    monkeypatch.setattr(sample, "WEIGHTS", 1 << 18)
    monkeypatch.setattr(sample, "BOX", (32, 64))
    monkeypatch.setattr(Cost, "take", lambda self, part: parts.append(part))
    found = said(tmp_path / "fp8")["sample"]
    assert not found["whole"] and found["weights"] <= 1 << 18 and found["boxes"] == len({*map(id, parts)})
    for part in parts:
        assert part.largest == np.abs(weights[part.name]).max()
        assert part.values.shape == (32, 64)


# -------------------------------------------------------------------------------------------------- the command's words


def test_on_a_terminal_and_as_json(dconv: Dconv, source: Path, coded: Path) -> None:
    for path, word in ((coded, []), (coded, ["fp8"]), (source, ["fp8"]), (source, ["mx"])):
        ran = dconv("inspect", path, "--explain", *word)
        assert ran.code == 0
        assert all(len(line) <= 80 for line in ran.out.splitlines()), ran.out
        assert dconv("inspect", path, "--explain", *word, "--json").json["explained"]["costs"]
    example = said(coded)["example"]
    text = dconv("inspect", coded, "--explain").out
    for words in (f"0x{example['code']:02x}", f"{example['scale']:.6g}", f"{example['weight']:.6g}", "multiplies"):
        assert words in text
    assert "nvfp4" in text and "neuron / 2" in text and "all weights" in text
    assert dconv("inspect", source, "--explain").code == 2
    assert dconv("inspect", coded, "--explain", "mxfp4", "--json").json["exit_code"] == 2
    assert dconv("inspect", coded, "--json").json["explained"] is None
