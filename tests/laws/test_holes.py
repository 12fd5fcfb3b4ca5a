"""What is a hole in the source is a hole in the output: a sparse checkpoint stays as small as it was."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest

from dconv.arch.registry import by_name
from dconv.pipeline import Request, prepare, run
from dconv.sharding.coords import Parallel
from dconv.sharding.rank import Settings
from tests.models import config_of, tree_digest, write_random


def allocated(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def sparse_model(folder: Path) -> Path:
    """About 70 MB of which a few tensors have data, among them single rows and a part of a row."""
    family = by_name("llama")
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "head_dim": 128, "vocab_size": 4001}
    config = config_of(family, num_attention_heads=8, num_key_value_heads=4, **sizes)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        dense = write_random(Path(scratch) / "dense", family, config)
        data = (dense / "model.safetensors").read_bytes()
        (dense / "model.safetensors").unlink()
        source = Path(shutil.copytree(dense, folder / "sparse"))
    length = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:length])
    with open(source / "model.safetensors", "wb") as file:
        file.write(data[:length])
        for name, low, n in (
            ("model.layers.0.self_attn.q_proj.weight", 0, None),
            ("model.layers.1.input_layernorm.weight", 0, None),
            ("model.layers.2.mlp.down_proj.weight", 700_001, 5000),
            ("model.layers.3.mlp.up_proj.weight", 1_000_000, 3),
            ("lm_head.weight", 2048 * 4000, 2048),
        ):
            begin, end = header[name]["data_offsets"]
            at = length + begin + low
            file.seek(at)
            file.write(data[at : at + n] if n else data[at : length + end])
        file.truncate(len(data))
    return source


@pytest.mark.parametrize("container", ["torch_dist", "legacy"])
def test_holes_stay_holes(tmp_path: Path, container: str) -> None:
    """There and back: the bytes of a dense copy's output, in hardly more blocks than the source has."""
    source = sparse_model(tmp_path)
    size = (source / "model.safetensors").stat().st_size
    taken = allocated(source)
    if taken > size // 4:
        pytest.skip("no sparse files here")
    dense = tmp_path / "dense"
    shutil.copytree(source, dense)
    (dense / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    assert allocated(dense) >= size
    layout = Parallel(tp=2, pp=2, etp=2)
    done = {}
    for name, model in (("sparse", source), ("dense", dense)):
        there, back = tmp_path / f"{name}-megatron", tmp_path / f"{name}-hf"
        for rank in (1, 0):
            request = Request(model, "megatron", there, parallel=layout, megatron_format=container)
            run(prepare(request), Settings(rank=rank, world=2))
        run(prepare(Request(there, "hf", back)), Settings())
        done[name] = there, back
    for sparse, full in zip(done["sparse"], done["dense"], strict=True):
        assert tree_digest(sparse) == tree_digest(full)
        # headers and extra states besides, and a block at both ends of every run of data
        assert allocated(sparse) < taken + (1 << 19)
        assert allocated(full) > size
    assert tree_digest(done["sparse"][1])["model.safetensors"] == tree_digest(source)["model.safetensors"]
