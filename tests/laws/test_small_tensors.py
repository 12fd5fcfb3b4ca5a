"""Tensors of no axis and of no element go through the engine like any other."""

from __future__ import annotations

from pathlib import Path

import pytest

from dconv.checkpoint import huggingface_target, safetensors
from dconv.checkpoint.files import stamp
from dconv.codec.kernels import apply
from dconv.sharding.commit import run_rank
from dconv.sharding.plan import build_plan, check_pieces
from dconv.sharding.rank import Settings
from dconv.sharding.tensor import Logical, Piece, TensorSpec
from tests.models import tensors


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_scalars_and_empty_tensors(tmp_path: Path, dtype: str) -> None:
    specs = [TensorSpec("scalar", (), "f32"), TensorSpec("empty", (0, 3), "f32"), TensorSpec("row", (2,), "f32")]
    size, first, _ = safetensors.lay_out(specs)
    source = tmp_path / "model.safetensors"
    source.write_bytes(first + bytes.fromhex("0000f0400000803f00000040"))
    assert source.stat().st_size == size
    found = {
        name: [Piece(name, e.region, e.file, e.offset, e.strides, stored.spec.dtype) for e in stored.extents]
        for name, stored in safetensors.read_header(source).items()
    }
    named = {spec.name: spec for spec in specs}
    logical = Logical(tmp_path, named, check_pieces(named, found)[0], {source.name: stamp(source)})
    wanted = [TensorSpec(spec.name, spec.shape, dtype) for spec in specs]
    target = huggingface_target.lay_out(wanted, config={}, side={}, shard_size=10**9, left_out={})
    run_rank(build_plan(logical, target), tmp_path / "out", apply, Settings())
    written = tensors(tmp_path / "out")
    if dtype == "f32":
        assert written == tensors(tmp_path)
    else:
        assert written["scalar"] == ("F64", (), bytes.fromhex("0000000000001e40"))  # 7.5
        assert written["empty"] == ("F64", (0, 3), b"")
