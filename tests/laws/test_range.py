"""fp16 ends at 65504: a weight beyond is refused by name, whatever made it, and nothing is left behind."""

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
