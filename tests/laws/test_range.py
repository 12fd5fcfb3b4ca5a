"""fp16 ends at 65504, bf16 and fp32 further on: a weight beyond is refused by name, whatever made it, and nothing is
left behind.
"""

from __future__ import annotations

import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dconv.arch.registry import by_name
from dconv.checkpoint import safetensors
from dconv.errors import Refused
from dconv.pipeline import Request, convert, prepare, run
from dconv.sharding.coords import Parallel
from dconv.sharding.rank import Settings
from dconv.sharding.tensor import TensorSpec
from tests.quant.models import values_of, write_normal

NAME = "model.layers.2.mlp.down_proj.weight"


def source_with(folder: Path, value: float, **sizes: float) -> Path:
    """A Llama, one weight of which is ``value``."""
    write_normal(folder, by_name("llama"), **sizes)
    path = folder / "model.safetensors"
    extent = safetensors.read_header(path)[NAME].extents[0]
    data = bytearray(path.read_bytes())
    data[extent.offset + 10 : extent.offset + 12] = np.array([value]).astype(ml_dtypes.bfloat16).tobytes()
    path.write_bytes(data)
    return folder


@pytest.mark.parametrize("value", [65536.0, -3e38])
@pytest.mark.parametrize("target", ["hf", "megatron"])
def test_a_weight_beyond_is_refused(tmp_path: Path, target: str, value: float) -> None:
    source = source_with(tmp_path / "source", value)
    with pytest.raises(Refused, match="past the range of fp16") as caught:
        convert(Request(source, target, tmp_path / "out", dtype="f16", parallel=Parallel(tp=1 + (target != "hf"))))
    assert caught.value.where == NAME
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("value", [1e5, 1e39, -1e300])
def test_of_fp64_too(tmp_path: Path, value: float) -> None:
    """Also where fp32 has no such number."""
    source = source_with(tmp_path / "source", 1.0)
    held = values_of(source)
    held[NAME].reshape(-1)[5] = value
    _, first, _ = safetensors.lay_out([TensorSpec(name, values.shape, "f64") for name, values in held.items()])
    (source / "model.safetensors").write_bytes(first + b"".join(values.tobytes() for values in held.values()))
    with pytest.raises(Refused, match="past the range of fp16") as caught:
        convert(Request(source, "hf", tmp_path / "out", dtype="f16"))
    assert caught.value.where == NAME


@pytest.mark.parametrize(
    ("stored", "value", "dtype", "words"),
    [("f32", 3.4e38, "bf16", "bf16"), ("f64", -3.4e38, "bf16", "bf16"), ("f64", 1e39, "f32", "fp32")],
)
def test_the_wider_ones_end_too(tmp_path: Path, stored: str, value: float, dtype: str, words: str) -> None:
    source = source_with(tmp_path / "source", 1.0)
    held = values_of(source)
    held[NAME].reshape(-1)[5] = value
    _, first, _ = safetensors.lay_out([TensorSpec(name, values.shape, stored) for name, values in held.items()])
    carried = {"f32": np.float32, "f64": np.float64}[stored]
    data = b"".join(values.astype(carried).tobytes() for values in held.values())
    (source / "model.safetensors").write_bytes(first + data)
    with pytest.raises(Refused, match=f"past the range of {words}") as caught:
        convert(Request(source, "hf", tmp_path / "out", dtype=dtype))
    assert caught.value.where == NAME
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_scaled_ones_too(tmp_path: Path) -> None:
    """A factor of muP takes a weight of bf16 past bf16."""
    write_normal(tmp_path / "source", by_name("minicpm"), scale_emb=12, scale_depth=1.4, dim_model_base=32)
    path = tmp_path / "source" / "model.safetensors"
    extent = safetensors.read_header(path)["model.embed_tokens.weight"].extents[0]
    data = bytearray(path.read_bytes())
    data[extent.offset : extent.offset + 2] = np.array([1e38]).astype(ml_dtypes.bfloat16).tobytes()
    path.write_bytes(data)
    with pytest.raises(Refused, match="past the range of bf16") as caught:
        convert(Request(tmp_path / "source", "hf", tmp_path / "out", mup2llama="hf"))
    assert caught.value.where == "model.embed_tokens.weight"


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_infinity_that_is_stored_stays(tmp_path: Path, dtype: str) -> None:
    source = source_with(tmp_path / "source", float("-inf"))
    convert(Request(source, "hf", tmp_path / "f32", dtype="f32"))
    convert(Request(tmp_path / "f32", "hf", tmp_path / "out", dtype=dtype))
    assert values_of(tmp_path / "out")[NAME].reshape(-1)[5] == -np.inf


def test_decoded_ones_too(tmp_path: Path) -> None:
    source = source_with(tmp_path / "source", 1e6)
    convert(Request(source, "fp8", tmp_path / "fp8", block_size=(16, 16)))
    with pytest.raises(Refused, match="past the range of fp16") as caught:
        convert(Request(tmp_path / "fp8", "hf", tmp_path / "out", dtype="f16"))
    assert caught.value.where == NAME
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp8", "source"]


def test_any_of_several_ranks(tmp_path: Path) -> None:
    """The rank that has it says so; the others do not commit without it."""
    source = source_with(tmp_path / "source", 1e5)
    launched, refused = time.time(), 0
    for rank in range(3):
        job = prepare(Request(source, "hf", tmp_path / "out", dtype="f16"))
        try:
            assert not run(job, Settings(rank=rank, world=3, launched=launched)).committed
        except Refused:
            refused += 1
    assert refused == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [65504.0, float("inf"), float("-inf"), float("nan")])
def test_what_is_as_large_or_infinite_already_goes_through(tmp_path: Path, value: float) -> None:
    """65504 is no bf16: 65280 is the largest below it."""
    source = source_with(tmp_path / "source", 65280.0 if value == 65504.0 else value)
    convert(Request(source, "hf", tmp_path / "out", dtype="f16"))
    before, after = values_of(source)[NAME], values_of(tmp_path / "out")[NAME]
    assert np.array_equal(after.reshape(-1)[5], before.reshape(-1)[5], equal_nan=True)
