"""FP8 sources and outputs against the code that reads and writes them elsewhere: what a scale means is shown here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dconv.arch.registry import by_name
from dconv.errors import Damaged, DconvError, Refused
from dconv.pipeline import Request, convert, prepare
from dconv.sharding.coords import Parallel
from tests.fp8 import BLOCK, write_fp8
from tests.oracles import hf
from tests.quant.models import write_normal

E4M3 = torch.float8_e4m3fn
QUANTIZER: Any = SimpleNamespace(
    quantization_config=SimpleNamespace(weight_block_size=(BLOCK, BLOCK), scale_fmt="float", dequantize=True)
)


def random_codes(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Codes of every kind, both zeros and denormals among them; NaN is not (it has no value to compare)."""
    codes = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x80
    return torch.from_numpy(codes).view(E4M3)


def fp8_source(folder: Path, family: str = "minimax_m2", **sizes: Any) -> dict[str, torch.Tensor]:
    """A block FP8 checkpoint of all codes, and its tensors."""
    write_fp8(folder, family, **sizes)
    tensors = load_file(folder / "model.safetensors")
    for seed, (name, value) in enumerate(tensors.items()):
        if value.dtype == E4M3:
            tensors[name] = random_codes(tuple(value.shape), seed)
        elif not name.endswith("_scale_inv"):
            tensors[name] = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)).to(value.dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(kind), b.view(kind))


def test_decoding_is_what_transformers_does(tmp_path: Path) -> None:
    """Its own operation, bit by bit: the scale multiplies. From any container, and in one rounding."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    tensors = fp8_source(tmp_path / "source")
    theirs = Fp8Dequantize(QUANTIZER)
    convert(Request(tmp_path / "source", "hf", tmp_path / "f32", dtype="f32"))
    convert(Request(tmp_path / "source", "megatron", tmp_path / "megatron", parallel=Parallel(tp=2, pp=2, ep=2)))
    convert(Request(tmp_path / "megatron", "hf", tmp_path / "back"))
    ours, back = (load_file(tmp_path / name / "model.safetensors") for name in ("f32", "back"))
    checked = 0
    for name, codes in tensors.items():
        if codes.dtype != E4M3:
            continue
        scale = tensors[f"{name}_scale_inv"]
        rows, columns = (-(-n // BLOCK) * BLOCK for n in codes.shape)
        whole = torch.zeros(rows, columns, dtype=torch.uint8)  # transformers takes whole blocks only
        whole[: codes.shape[0], : codes.shape[1]] = codes.view(torch.uint8)
        wanted = theirs._dequantize_one(whole.view(E4M3), scale, torch.float32)[: codes.shape[0], : codes.shape[1]]
        assert same_bits(ours[name], wanted), name
        grid = scale.double().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        exact = (whole.view(E4M3).double() * grid)[: codes.shape[0], : codes.shape[1]].numpy()
        assert np.array_equal(back[name].view(torch.int16).numpy(), once(exact).view(np.int16)), name
        checked += 1
    assert checked > 40


def once(exact: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """fp64 to bf16 in one rounding: the nearer of the two neighbours, to the even one in a tie."""
    low = (exact.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    low = np.where(np.abs(low) > np.abs(exact), (low.view(np.uint32) - 0x10000).view(np.float32), low)
    high = (low.view(np.uint32) + 0x10000).view(np.float32)
    down, up = np.abs(exact - low.astype(np.float64)), np.abs(high.astype(np.float64) - exact)
    odd = (low.view(np.uint32) >> 16) & 1 == 1
    nearest = np.where((up < down) | ((up == down) & odd), high, low)
    return np.where(exact == 0, exact.astype(np.float32), nearest).astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_encoding_is_what_transformers_does(tmp_path: Path, family: str, power_of_two: bool) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    source = write_normal(tmp_path / "source", by_name(family))
    kind = "ue8m0" if power_of_two else "float"
    convert(Request(source, "fp8", tmp_path / "out", block_size=(BLOCK, BLOCK), scale_format=kind))
    said = SimpleNamespace(weight_block_size=(BLOCK, BLOCK), scale_fmt=kind)
    theirs: Any = Fp8Quantize(SimpleNamespace(quantization_config=said))
    ours, given = load_file(tmp_path / "out" / "model.safetensors"), load_file(source / "model.safetensors")
    whole = 0
    for name, value in given.items():
        if ours[name].dtype != E4M3:
            assert same_bits(ours[name], value)
            continue
        wanted = theirs._quantize_one(name, value)
        if len(wanted) == 2:  # it leaves what does not divide as it is; ours are checked by the codec's own tests
            whole += 1
            assert all(same_bits(ours[key], tensor) for key, tensor in wanted.items()), name
    assert whole > 10


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "mixtral", "deepseek_v3", "minimax_m2"])
def test_transformers_loads_it_and_computes_the_same(tmp_path: Path, family: str) -> None:
    """The FP8 directory as transformers decodes it, against the one that we decode.

    Blocks divide every matrix here: on a CPU transformers 5.23 decodes no others (DeepSeek-V3's own 576 rows neither).
    """
    _, model = hf.tiny(family, intermediate_size=384, moe_intermediate_size=64)
    hf.save(model.to(torch.bfloat16), tmp_path / "source")
    convert(Request(tmp_path / "source", "fp8", tmp_path / "fp8", block_size=(8, 4)))
    convert(Request(tmp_path / "fp8", "hf", tmp_path / "dense", dtype="f32"))
    tokens = torch.arange(3, 35).reshape(2, 16)
    theirs = hf.load(tmp_path / "fp8").float()  # it leaves what is not in FP8 in bf16
    assert torch.equal(hf.logits(theirs, tokens), hf.logits(tmp_path / "dense", tokens))


@pytest.mark.parametrize("method", ["row", "tensor", "block"])
def test_gptqmodel_divides(tmp_path: Path, method: str) -> None:
    """Its FP8 has 448 / absmax under the name of ``weight_scale_inv`` (nn_modules/qlinear/fp8.py of 7.7: w / scale)."""
    write_normal(tmp_path / "source", by_name("llama"))
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    wanted = {}
    for name, value in list(tensors.items()):
        if "_proj" not in name:
            continue
        rows, columns = value.shape
        blocks = value.float().reshape(rows // 16, 16, columns // 16, 16).abs()
        largest = {
            "row": value.float().abs().amax(1),
            "tensor": value.float().abs().amax(),
            "block": blocks.amax((1, 3)),
        }
        stored = 448 / largest[method]
        grid = {"row": stored.reshape(-1, 1), "tensor": stored}.get(method)
        if grid is None:
            grid = stored.repeat_interleave(16, 0).repeat_interleave(16, 1)
        tensors[name] = (value.float() * grid).clamp(-448, 448).to(E4M3)
        tensors[f"{name}_scale_inv"] = stored
        wanted[name] = (tensors[name].double() / grid.double()).float()
    save_file(tensors, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    said = {"quant_method": "fp8", "weight_scale_method": method, "weight_scale_semantics": "inverse"}
    said["weight_block_size"] = [16, 16] if method == "block" else None  # type: ignore[assignment]
    configure(tmp_path / "source", said)
    convert(Request(tmp_path / "source", "hf", tmp_path / "out", dtype="f32"))
    ours = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in wanted.items():
        assert same_bits(ours[name], value), name
    del said["weight_scale_semantics"]  # it has no other meaning
    configure(tmp_path / "source", said)
    convert(Request(tmp_path / "source", "hf", tmp_path / "again", dtype="f32"))
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()
    configure(tmp_path / "source", {**said, "weight_scale_semantics": "sideways"})
    with pytest.raises(Refused, match="meaning that is not known"):
        prepare(Request(tmp_path / "source", "hf", tmp_path / "third"))


@pytest.mark.parametrize("kind", [torch.uint8, torch.float8_e8m0fnu])
def test_exponents_under_the_same_name(tmp_path: Path, kind: torch.dtype) -> None:
    """MiniMax-M3 has MXFP8: ``weight_scale_inv`` is E8M0, one for 32 columns, whatever block the config names."""
    write_normal(tmp_path / "source", by_name("llama"))
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    wanted = {}
    for seed, (name, value) in enumerate(list(tensors.items())):
        if "_proj" in name:
            codes = random_codes(tuple(value.shape), seed)
            bytes_of = np.random.default_rng(seed).integers(100, 140, (value.shape[0], value.shape[1] // 32), np.uint8)
            tensors[name] = codes
            tensors[f"{name}_scale_inv"] = torch.from_numpy(bytes_of).view(kind)
            scale = torch.from_numpy(2.0 ** (bytes_of.astype(np.float64) - 127)).repeat_interleave(32, 1)
            wanted[name] = (codes.double() * scale).float()
    save_file(tensors, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    configure(tmp_path / "source", {"quant_method": "fp8", "weight_block_size": [128, 128]})
    convert(Request(tmp_path / "source", "hf", tmp_path / "out", dtype="f32"))
    ours = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in wanted.items():
        assert same_bits(ours[name], value), name


def configure(folder: Path, quantization: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


def test_a_static_scale_of_activations_is_named(tmp_path: Path) -> None:
    tensors = fp8_source(tmp_path / "source", "llama")
    name = "model.layers.0.self_attn.q_proj.activation_scale"
    save_file({**tensors, name: torch.tensor(2.0)}, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    job = prepare(Request(tmp_path / "source", "hf", tmp_path / "out"))
    assert "activations" in job.logical.left_out[name]


WRONG: dict[str, tuple[dict[str, Any], type[DconvError], str]] = {
    "another method": ({"quant_method": "bitsandbytes"}, Refused, "does not decode"),
    "no method": ({"bits": 4}, Refused, "does not decode"),
    "blocks of another size": ({"quant_method": "fp8", "weight_block_size": [8, 8]}, Damaged, "another shape"),
    "no blocks": ({"quant_method": "fp8", "weight_block_size": None}, Damaged, "another shape"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_config_that_does_not_fit(tmp_path: Path, what: str) -> None:
    said, error, words = WRONG[what]
    fp8_source(tmp_path / "source")
    configure(tmp_path / "source", said)
    for target in ("hf", "megatron", "fp8"):
        with pytest.raises(error, match=words):
            convert(Request(tmp_path / "source", target, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_cast_without_scales_is_damaged(tmp_path: Path) -> None:
    """Also where the config says nothing at all of it."""
    tensors = fp8_source(tmp_path / "source", "llama")
    plain = {name: value for name, value in tensors.items() if not name.endswith("_scale_inv")}
    save_file(plain, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    silent = {key: value for key, value in config.items() if key != "quantization_config"}
    for said in (config, silent, {**silent, "quantization_config": None}, {**silent, "quantization_config": {}}):
        (tmp_path / "source" / "config.json").write_text(json.dumps(said))
        with pytest.raises(Damaged, match="codes mean nothing"):
            convert(Request(tmp_path / "source", "hf", tmp_path / "out"))


@pytest.mark.parametrize("said", ["float8_e4m3fn", "int8", "torch.float16"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_config_whose_dtype_is_that_of_the_codes(tmp_path: Path, key: str, said: str) -> None:
    """The values come out all the same: as bf16 where the config names no dtype that weights may have."""
    fp8_source(tmp_path / "source", "llama")
    path = tmp_path / "source" / "config.json"
    config = {name: value for name, value in json.loads(path.read_text()).items() if "dtype" not in name}
    wanted = "float16" if "16" in said else "bfloat16"
    path.write_text(json.dumps({**config, key: wanted}))
    convert(Request(tmp_path / "source", "hf", tmp_path / "wanted"))
    path.write_text(json.dumps({**config, key: said}))
    convert(Request(tmp_path / "source", "hf", tmp_path / "out"))
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "wanted"))
    assert all(same_bits(ours[name], theirs[name]) for name in theirs)
    assert json.loads((tmp_path / "out" / "config.json").read_text())[key].removeprefix("torch.") == wanted


def test_a_config_that_names_fp8_where_there_is_none(tmp_path: Path) -> None:
    source = write_normal(tmp_path / "source", by_name("llama"))
    shutil.copytree(source, tmp_path / "plain")
    configure(source, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    job = prepare(Request(source, "hf", tmp_path / "out"))
    assert job.logical.left_out["quantization_config of config.json"] == "no weight is in codes"
    convert(Request(source, "hf", tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (tmp_path / "plain" / "config.json").read_text()
    )
