"""AWQ checkpoints as a source: the weights that their numbers make, rounded once, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dconv.errors import Damaged, DconvError, Refused
from dconv.pipeline import Request, convert
from dconv.sharding.coords import Parallel
from tests.quant.whole import Model, draw, same, tensors_of, write, write_awq


def check(model: Model, out: Path) -> None:
    """Every weight in fp32, which has room for the exact product of a code and a scale of fp16."""
    convert(Request(model.folder, "hf", out, dtype="f32"))
    ours = tensors_of(out)
    for module, layer in model.layers.items():
        assert same(ours[f"{module}.weight"], layer.weight.astype(np.float32)), module
    assert not any(name.endswith(("qweight", "qzeros", "scales")) for name in ours)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("group", [-1, 16, 32])
def test_weights(tmp_path: Path, group: int) -> None:
    make = lambda _, shape, seed: draw(shape, 4, group, seed, least=0)  # noqa: E731
    model = write_awq(tmp_path / "source", config={"group_size": group}, make=make)
    check(model, tmp_path / "out")


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "mixtral"])
def test_families_by_any_way(tmp_path: Path, family: str) -> None:
    model = write_awq(tmp_path / "source", family=family)
    check(model, tmp_path / "out")
    layout = Parallel(tp=2, pp=2, etp=2)
    convert(Request(model.folder, "megatron", tmp_path / "megatron", parallel=layout))
    convert(Request(tmp_path / "megatron", "hf", tmp_path / "back"))
    ours = tensors_of(tmp_path / "back")
    for module, layer in model.layers.items():
        assert same(ours[f"{module}.weight"], layer.weight.astype(ml_dtypes.bfloat16)), module


@pytest.mark.parametrize("beside", [False, True])
def test_autoawq_s_own_spelling(tmp_path: Path, beside: bool) -> None:
    said = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    said = said if beside else {"quant_method": "awq", **said}
    model = write(tmp_path / "source", said, lambda _, layer: layer.awq(), beside=beside)
    if beside:
        (model.folder / "quantize_config.json").rename(model.folder / "quant_config.json")
    check(model, tmp_path / "out")


def test_as_the_converter_of_compressed_tensors_reads_it(tmp_path: Path) -> None:
    """A second opinion on every code and zero: its own unpacking of what its converter makes of the same files."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

    model = write_awq(tmp_path / "source", make=lambda _, shape, seed: draw(shape, 4, 32, seed, least=0))
    convert(Request(model.folder, "hf", tmp_path / "out", dtype="f32"))
    ours, given = tensors_of(tmp_path / "out"), tensors_of(model.folder)
    for module in model.layers:
        parts = {f"{module}.{part}": torch.from_numpy(given[f"{module}.{part}"].copy())
                 for part in ("qweight", "qzeros", "scales")}  # fmt: skip
        made = {
            name.rpartition(".")[2]: value for name, value in AutoAWQConverter(group_size=32).process(parts).items()
        }
        shape = ours[f"{module}.weight"].shape
        codes = unpack_from_int32(made["weight_packed"], 4, torch.Size(shape))
        groups = (shape[0], shape[1] // 32)
        zeros = unpack_from_int32(made["weight_zero_point"], 4, torch.Size(groups), packed_dim=0)
        scales = made["weight_scale"].double().repeat_interleave(32, 1)
        wanted = (codes.double() - zeros.double().repeat_interleave(32, 1)) * scales
        assert same(ours[f"{module}.weight"], wanted.float().numpy()), module


NAME = "model.layers.0.mlp.up_proj"
WRONG: dict[str, tuple[Any, type[DconvError], str, str]] = {
    "no scales": (lambda t: t.pop(f"{NAME}.scales"), Damaged, "missing", f"{NAME}.scales"),
    "twice": (lambda t: t.update({f"{NAME}.weight": np.zeros((96, 64), np.float16)}), Damaged, "twice", NAME),
    "packed along the input": (
        lambda t: t.update({f"{NAME}.qweight": t[f"{NAME}.qweight"].T.copy()}), Damaged, "not what", NAME,
    ),
    "other zeros": (
        lambda t: t.update({f"{NAME}.qzeros": t[f"{NAME}.qzeros"][:, :-1].copy()}), Damaged, "not what",
        f"{NAME}.qzeros",
    ),
    "scales of whole numbers": (
        lambda t: t.update({f"{NAME}.scales": t[f"{NAME}.scales"].astype(np.int16)}), Damaged, "not what", NAME,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_parts_that_do_not_fit(tmp_path: Path, what: str) -> None:
    edit, error, words, where = WRONG[what]
    model = write_awq(tmp_path / "source")
    path = model.folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(error, match=words) as raised:
        convert(Request(model.folder, "hf", tmp_path / "out"))
    assert where in raised.value.where
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


SAID: dict[str, tuple[dict[str, Any], type[DconvError], str]] = {
    "another layout": ({"version": "gemv"}, Refused, "layout is not one"),
    "another layout under its other name": ({"format": "gemv_fast"}, Refused, "layout is not one"),
    "llm-awq": ({"backend": "llm-awq"}, Refused, "layout is not one"),
    "three bits": ({"bits": 3}, Refused, "codes of 4 bits"),
    "no bits": ({"bits": None}, Refused, "codes of 4 bits"),
    "no group": ({"group_size": None}, Damaged, "group_size makes no sense"),
    "groups of another size": ({"group_size": 16}, Damaged, "not what"),
    "groups that columns do not fill": ({"group_size": 48}, Damaged, "not what"),
}


@pytest.mark.parametrize("what", SAID)
def test_a_config_that_does_not_fit(tmp_path: Path, what: str) -> None:
    said, error, words = SAID[what]
    model = write_awq(tmp_path / "source", config=said)
    with pytest.raises(error, match=words):
        convert(Request(model.folder, "hf", tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
