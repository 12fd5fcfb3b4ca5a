"""pack-quantized made of whole numbers that GPTQ or AWQ has, and the reverse, against compressed-tensors itself."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from dconv.codec.kernels import apply
from dconv.coded.awq_encode import AWQ
from dconv.coded.compressed_packed_encode import Packed
from dconv.coded.gptq_encode import GPTQ
from dconv.coded.integers import Grid, Integers
from dconv.coded.repack import Packer
from dconv.errors import Damaged
from dconv.pipeline import Request, convert, prepare
from dconv.sharding.derived import Array, Derived, open_reader
from dconv.sharding.dtypes import carrier
from dconv.sharding.ops import MOVE, How
from dconv.sharding.plan import Copy
from dconv.sharding.region import Region
from dconv.sharding.tensor import Logical
from tests.models import tree_digest
from tests.oracles import hf
from tests.quant import compressed
from tests.quant.whole import (
    Layer,
    draw,
    linear,
    packed_config,
    same,
    tensors_of,
    write,
    write_awq,
    write_gptq,
    write_packed,
)

PACKED = "pack-quantized"
TOKENS = torch.arange(3, 19)[None]
FORMS = [("gptq", "gptq"), ("gptq", "gptq_v2"), ("awq", "awq"), ("gptq", PACKED)]


def groups_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]


def as_compressed(layer: Layer, *, symmetric: bool) -> dict[str, torch.Tensor]:
    """What compressed-tensors makes of the weight, its scales and zeros."""
    columns, half = layer.codes.shape[1], 1 << (layer.bits - 1)
    size = columns // layer.scales.shape[1]
    by = {"strategy": "channel"} if size == columns else {"strategy": "group", "group_size": size}
    args = QuantizationArgs(num_bits=layer.bits, symmetric=symmetric, **by)
    given = {
        "weight": torch.from_numpy(layer.weight.astype(np.float32)),
        "weight_scale": torch.from_numpy(layer.scales.astype(np.float32)),
        "weight_zero_point": torch.from_numpy((layer.zeros - half).astype(np.int8)),
    }
    return PackedQuantizationCompressor.compress(given, QuantizationScheme(targets=["Linear"], weights=args))


def check_decompressed(folder: Path, source: Path) -> None:
    """compressed-tensors reads what was written as the source is decoded."""
    convert(Request(source, "hf", folder.parent / "dense", dtype="f32"))
    expected = tensors_of(folder.parent / "dense")
    found = compressed.decompressed(folder)
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not np.array_equal(found[name].float().numpy(), value)] == []


GRIDS = [(4, 32), (8, 32), (4, -1), (8, -1), (3, 32), (2, 16), (4, 128)]


def sampled() -> list[Any]:
    """Each grid with zero points or without, in turn; with both with ``--long``."""
    return [
        pytest.param(*grid, even, marks=() if even == bool(number % 2) else pytest.mark.long)
        for number, grid in enumerate(GRIDS)
        for even in (True, False)
    ]


@pytest.mark.parametrize(("bits", "group", "even"), sampled())
def test_what_compressed_tensors_writes(tmp_path: Path, bits: int, group: int, even: bool) -> None:
    """Of the same numbers, part by part; groups wider than a weight are its rows."""
    model = write_gptq(
        tmp_path / "source",
        2,
        config={"bits": bits, "group_size": group, "sym": even},
        make=lambda _, shape, seed: draw(shape, bits, group, seed, dtype=np.float32, even=even),
        num_hidden_layers=1,
    )
    convert(Request(model.folder, "gptq", tmp_path / "out", quant=PACKED))
    ours = tensors_of(tmp_path / "out")
    for module, layer in model.layers.items():
        wanted = as_compressed(layer, symmetric=even)
        assert {name.rpartition(".")[2] for name in ours if name.startswith(f"{module}.")} == wanted.keys()
        assert all(same(ours[f"{module}.{part}"], value.numpy()) for part, value in wanted.items()), module
    check_decompressed(tmp_path / "out", model.folder)
    convert(Request(model.folder, "awq", tmp_path / "by awq", quant=PACKED))
    assert tree_digest(tmp_path / "by awq") == tree_digest(tmp_path / "out")


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_zeros_that_are_half_the_range_are_left_out(tmp_path: Path, form: str) -> None:
    """Whatever the config says: so transformers takes them. In all weights of one grid or in none, which are fused."""

    def make(everywhere: bool) -> Any:
        return lambda module, shape, seed: draw(
            shape, 4, 32, seed, dtype=np.float32, even=everywhere or "q_proj" in module
        )

    writer = write_gptq if form == "gptq" else write_awq
    for everywhere in (True, False):
        model = writer(tmp_path / f"{everywhere}" / "source", make=make(everywhere), num_hidden_layers=1)
        out = tmp_path / f"{everywhere}" / "out"
        convert(Request(model.folder, "gptq", out, quant=PACKED))
        (group,) = groups_of(out).values()
        assert group["weights"]["symmetric"] == everywhere and group["targets"] == ["Linear"]
        with_zeros = {name for name in tensors_of(out) if name.endswith("zero_point")}
        assert len(with_zeros) == (0 if everywhere else len(model.layers))
        check_decompressed(out, model.folder)


def test_weights_of_several_grids(tmp_path: Path) -> None:
    """Each group names its modules, and compressed-tensors finds them."""
    grids = {"down_proj": (8, 16), "o_proj": (4, -1)}

    def grid(module: str) -> tuple[int, int]:
        return next((found for part, found in grids.items() if part in module), (4, 32))

    dynamic = {rf".*{part}": {"bits": bits, "group_size": group} for part, (bits, group) in grids.items()}
    model = write_gptq(
        tmp_path / "source",
        config={"dynamic": {**dynamic, r"-:.*\.v_proj": {}}},
        make=lambda module, shape, seed: draw(shape, *grid(module), seed, dtype=np.float32),
        quantised=lambda name: linear(name) and "v_proj" not in name,
        family="qwen3_moe",
    )
    convert(Request(model.folder, "gptq", tmp_path / "out", quant=PACKED))
    groups = groups_of(tmp_path / "out").values()
    assert sorted(module for group in groups for module in group["targets"]) == sorted(model.layers)
    for group in groups:
        bits, size = group["weights"]["num_bits"], group["weights"]["group_size"] or -1
        assert {grid(module) for module in group["targets"]} == {(bits, size)}
    check_decompressed(tmp_path / "out", model.folder)
    convert(Request(tmp_path / "out", "gptq", tmp_path / "back", quant="gptq_v2"))
    convert(Request(model.folder, "gptq", tmp_path / "directly", quant="gptq_v2"))
    ours, wanted = tensors_of(tmp_path / "back"), tensors_of(tmp_path / "directly")
    assert ours.keys() == wanted.keys() and all(same(ours[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(("target", "quant"), FORMS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_a_symmetric_source(tmp_path: Path, dtype: Any, target: str, quant: str) -> None:
    """Its zeros are nowhere and are written; scales keep their dtype and bits."""
    model = write_packed(
        tmp_path / "source",
        config={"symmetric": True},
        make=lambda _, shape, seed: draw(shape, 4, 32, seed, dtype=dtype, even=True),
        num_hidden_layers=1,
    )
    convert(Request(model.folder, target, tmp_path / "out", quant=quant, dtype="f16"))
    ours = tensors_of(tmp_path / "out")
    for module, layer in model.layers.items():
        forms = {"awq": layer.awq, PACKED: lambda one=layer: one.packed(symmetric=True)}
        wanted = forms.get(quant, lambda one=layer: one.gptq(1 if quant == "gptq" else 2))()
        assert all(same(ours[f"{module}.{part}"], value) for part, value in wanted.items()), module
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    if target == "gptq" and quant != PACKED:
        assert (config["sym"], config["desc_act"], config["bits"], config["group_size"]) == (True, False, 4, 32)


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_one_scale_for_a_row_or_for_all(tmp_path: Path, strategy: str, bits: int) -> None:
    """GPTQ has a scale for each row of it."""

    def make(_: str, shape: tuple[int, int], seed: int) -> Layer:
        found = draw(shape, bits, -1, seed, dtype=np.float32, even=True)
        if strategy == "tensor":
            found.scales[:] = found.scales[0]
        return found

    def pack(_: str, layer: Layer) -> dict[str, Any]:
        parts = layer.packed(symmetric=True)
        return {**parts, "weight_scale": layer.scales[0]} if strategy == "tensor" else parts

    said = packed_config(num_bits=bits, strategy=strategy, group_size=None, symmetric=True)
    model = write(tmp_path / "source", said, pack, make=make, num_hidden_layers=1)
    convert(Request(model.folder, "gptq", tmp_path / "out"))
    ours = tensors_of(tmp_path / "out")
    for module, layer in model.layers.items():
        assert all(same(ours[f"{module}.{part}"], value) for part, value in layer.gptq(1).items()), module
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"]) == (bits, -1)


def test_the_older_word_layout(tmp_path: Path) -> None:
    """Three bits, of which ten were in a word: packed anew for every reader, compressed-tensors itself too."""

    def pack(_: str, layer: Layer) -> dict[str, Any]:
        words = np.zeros((layer.codes.shape[0], -(-layer.codes.shape[1] // 10)), np.uint32)
        for (row, column), code in np.ndenumerate(layer.codes):
            words[row, column // 10] |= np.uint32(int(code) << (column % 10 * 3))
        return {**layer.packed(symmetric=True), "weight_packed": words.view(np.int32)}

    model = write(
        tmp_path / "source",
        packed_config(num_bits=3, symmetric=True),
        pack,
        make=lambda _, shape, seed: draw(shape, 3, 32, seed, even=True),
        num_hidden_layers=1,
    )
    for quant in ("gptq_v2", PACKED):
        convert(Request(model.folder, "gptq", tmp_path / quant, quant=quant))
        ours = tensors_of(tmp_path / quant)
        for module, layer in model.layers.items():
            wanted = layer.packed(symmetric=True) if quant == PACKED else layer.gptq(2)
            assert all(same(ours[f"{module}.{part}"], value) for part, value in wanted.items()), module


def test_an_order_goes_to_gptq(tmp_path: Path) -> None:
    """``weight_g_idx``, which compressed-tensors wrote before 0.20; a plan for AWQ finds a group that is not there."""
    model = write_packed(
        tmp_path / "source",
        g_idx=True,
        config={"actorder": "group"},
        make=lambda _, shape, seed: draw(shape, 4, 32, seed, ordered=True),
        num_hidden_layers=1,
    )
    convert(Request(model.folder, "gptq", tmp_path / "out"))
    ours = tensors_of(tmp_path / "out")
    for module, layer in model.layers.items():
        assert all(same(ours[f"{module}.{part}"], value) for part, value in layer.gptq(1).items()), module
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["desc_act"] is True
    broken = write_packed(
        tmp_path / "broken",
        g_idx=True,
        make=lambda _, shape, seed: Layer(**{**vars(it := draw(shape, 4, 32, seed)), "groups": it.groups + 1}),
        num_hidden_layers=1,
    )
    with pytest.raises(Damaged, match="a group that has no scale"):
        prepare(Request(broken.folder, "awq", tmp_path / "no"))


@dataclass(frozen=True)
class Drawn:
    """A recipe of numbers that are in no file."""

    values: Any

    def __call__(self, box: Region, dtype: str, factor: float, read: Any) -> Any:
        del dtype, factor, read
        return self.values[tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))]


@pytest.mark.parametrize("packer", [GPTQ("v1"), GPTQ("v2"), AWQ(), Packed()], ids=lambda it: it.words)
@pytest.mark.parametrize("even", [True, False])
def test_numbers_from_elsewhere(packer: Packer, even: bool) -> None:
    """A packer asks for no source: whoever has codes, scales and zeros has the tensors of any form."""
    layer = draw((48, 96), 4, 32, 7, even=even)
    derived = {
        name: Derived(values.shape, (), Drawn(values), How(name, True, 0))
        for name, values in (
            ("codes", layer.codes.astype(np.uint8)), ("zeros", layer.zeros.astype(np.uint8)), ("scales", layer.scales),
        )
    }  # fmt: skip
    codes, zeros, scales = (
        Array(made.shape, dtype, (made.piece(name, name, dtype),))
        for (name, made), dtype in zip(derived.items(), ("u8", "u8", "f16"), strict=True)
    )
    numbers = Integers((48, 96), Grid(4, 32, symmetric=even), codes, scales, 8 if even else zeros, None, least=1)
    made = packer.pack("layer.weight", numbers, {})
    logical = Logical(Path(), {}, {}, {}, derived={**derived, **made.derived})
    found = {}
    with closing(open_reader(logical, 1 << 20, apply)) as reader:
        for spec, (piece,) in made.parts:
            out = np.empty(spec.shape, carrier(spec.dtype))
            reader.read_box(Copy(piece.region, piece.file, piece.offset, piece.strides, spec.dtype, MOVE), out)
            found[spec.name.removeprefix("layer.")] = out
    wanted = {
        "GPTQ (gptq)": lambda: layer.gptq(1), "GPTQ (gptq_v2)": lambda: layer.gptq(2), "AWQ (gemm)": layer.awq,
    }.get(packer.words, lambda: layer.packed(symmetric=even))()  # fmt: skip
    assert found.keys() == wanted.keys()
    assert all(found[part].tobytes() == value.tobytes() for part, value in wanted.items())
    assert packer.config([], {"layer.weight": made})["quant_method"] in ("gptq", "awq", "compressed-tensors")


def load(folder: Path, *, dequantize: bool) -> torch.Tensor:
    config = CompressedTensorsConfig(dequantize=dequantize)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", quantization_config=config
    )
    return hf.logits(model.eval(), TOKENS)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize("bits", [4, 8])
def test_transformers_computes_the_same(tmp_path: Path, family: str, bits: int) -> None:
    """By either of its ways; scales are in fp32, since of experts in fp16 it rounds the weights to that."""
    model = write_gptq(
        tmp_path / "source",
        config={"bits": bits, "sym": True},
        make=lambda _, shape, seed: draw(shape, bits, 32, seed, dtype=np.float32, even=True),
        family=family,
        num_hidden_layers=2,
    )
    convert(Request(model.folder, "gptq", tmp_path / "out", quant=PACKED))
    convert(Request(model.folder, "hf", tmp_path / "dense", dtype="f32"))
    expected = hf.logits(tmp_path / "dense", TOKENS)
    assert torch.isfinite(expected).all() and expected.std() > 0
    for dequantize in (False, True):
        assert torch.equal(load(tmp_path / "out", dequantize=dequantize), expected)


def test_transformers_takes_few_zero_points(tmp_path: Path) -> None:
    """transformers 5.23: of linear layers while it decodes them, of experts none; to be seen when it learns."""
    for family in ("llama", "qwen3_moe"):
        folder = tmp_path / family
        model = write_awq(
            folder / "source",
            make=lambda _, shape, seed: draw(shape, 4, 32, seed, dtype=np.float32),
            family=family,
            num_hidden_layers=2,
        )
        job = prepare(Request(model.folder, "awq", folder / "out", quant=PACKED))
        assert any("zero points" in note for note in job.notes)
        convert(Request(model.folder, "awq", folder / "out", quant=PACKED))
        convert(Request(model.folder, "hf", folder / "dense", dtype="f32"))
        expected = hf.logits(folder / "dense", TOKENS)
        with pytest.raises(RuntimeError, match=r"ignore_mismatched_sizes|automatic conversion"):
            load(folder / "out", dequantize=False)
        if family == "llama":
            assert torch.equal(load(folder / "out", dequantize=True), expected)
        else:
            with pytest.raises(RuntimeError, match="automatic conversion"):
                load(folder / "out", dequantize=True)
