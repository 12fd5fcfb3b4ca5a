"""Somebody else's checkpoint that torch saved has a checksum of each storage: a bit that flips in a weight is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from dconv.cli import main
from tests.damage import truth
from tests.damage.containers import Made, content_of, make
from tests.damage.test_damage import Check, check

__all__ = ["check"]

NAMES = ("torch_dist", "legacy", "model_pt", "pt", "bmtrain")


def _again(made: Made) -> Made:
    """The same content, saved by torch and without a receipt."""
    if made.name == "torch_dist":
        _save_dcp(made.folder / "release")
    for path in [*made.folder.rglob("*.pt"), *made.folder.rglob("*.bin")]:
        torch.save(torch.load(path, weights_only=False), path)
    (made.folder / made.kind.seal).unlink()
    return replace(made, content=content_of(made.folder), tensors=tuple(made.kind.read(made.folder)))


def _save_dcp(iteration: Path) -> None:
    entries = FileSystemReader(iteration).read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        key: torch.empty(one.size, dtype=one.properties.dtype) if isinstance(one, TensorStorageMetadata) else None
        for key, one in entries.items()
    }
    load(state, storage_reader=FileSystemReader(iteration), no_dist=True)
    for path in [*iteration.glob("*.distcp"), iteration / ".metadata"]:
        path.unlink()
    optimizer = {"optimizer.state.exp_avg.output_layer.weight": torch.ones(8, 8)}
    save({**state, **optimizer}, storage_writer=FileSystemWriter(iteration), no_dist=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    root = tmp_path_factory.mktemp("saved")
    known: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in known:
            known[name] = _again(make(name, root))
        return known[name]

    return get


@pytest.mark.parametrize("name", NAMES)
def test_one_bit_of_any_weight(saved: Callable[[str], Made], check: Check, name: str) -> None:
    made = saved(name)
    code, said = check(made.folder)
    weights = [tensor for tensor in made.tensors if not tensor.name.startswith("optimizer.")]
    nbytes = sum(tensor.end - tensor.begin for tensor in weights)
    assert (code, f"checksums    {len(weights)} storages ({nbytes:,} bytes) are as torch saved" in said) == (0, True), (
        said
    )
    draw = np.random.default_rng(3)
    for tensor in weights:
        _flip(made, tensor, int(draw.integers(tensor.begin, tensor.end)), 1 << int(draw.integers(8)))
        code, said = check(made.folder)
        stored = tensor.name.rpartition(":")[2]
        if name == "torch_dist":  # one tensor has all layers
            stored = stored.partition("@")[0].replace("decoder.layers.0.", "decoder.layers.")
        assert code == 4, (tensor, said)
        assert "tensor is not as torch saved it" in said
        assert f"{stored} in {tensor.file.removeprefix('release/')}\n" in said, tensor
        made.restore()


def _flip(made: Made, tensor: truth.Tensor, at: int, bit: int) -> None:
    data = bytearray(made.content[tensor.file])
    data[at] ^= bit
    (made.folder / tensor.file).write_bytes(data)


def test_what_is_not_weights_is_not_read(saved: Callable[[str], Made], check: Check) -> None:
    """An optimizer's state is many times as large; nothing is made of it."""
    made = saved("torch_dist")
    (state,) = (tensor for tensor in made.tensors if tensor.name.startswith("optimizer."))
    _flip(made, state, state.begin, 1)
    assert check(made.folder)[0] == 0
    made.restore()


def test_without_checksums_nothing_is_said(saved: Callable[[str], Made], check: Check, tmp_path: Path) -> None:
    """As ``torch.serialization.set_crc32_options(False)`` saves, and torch before 1.6 did."""
    folder = Path(shutil.copytree(saved("pt").folder, tmp_path / "pt"))
    (path,) = folder.glob("*.bin")
    tree = torch.load(path)
    before = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        torch.save(tree, path)
    finally:
        torch.serialization.set_crc32_options(before)
    code, said = check(folder)
    assert (code, "checksums" in said) == (0, False), said
    torch.save(tree, path, _use_new_zipfile_serialization=False)
    code, said = check(folder)
    assert (code, "checksums" in said) == (0, False), said


@pytest.mark.parametrize("kind", ["torchscript", "torch_export"])
def test_one_bit_of_a_graph(check: Check, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """Also of one that dconv did not write: its weights have no names, the records have."""
    module = torch.nn.Linear(16, 16)
    path = tmp_path / ("model.pt" if kind == "torchscript" else "model.pt2")
    if kind == "torchscript":
        torch.jit.script(module).save(str(path))
    else:
        torch.export.save(torch.export.export(module, (torch.ones(1, 16),)), path)
    code, said = check(tmp_path)
    assert (code, "checksums    2 storages (1,088 bytes) are as torch saved them" in said) == (0, True), said
    assert main(["check", str(path), "--no-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checksums"] == {"storages": 2, "nbytes": 1088}
    data = bytearray(path.read_bytes())
    raw = module.weight.detach().numpy().tobytes()
    data[data.index(raw) + 100] ^= 16
    path.write_bytes(data)
    code, said = check(tmp_path)
    assert code == 4, said
    assert said.startswith("damaged (4)  1 tensor is not as torch saved it"), said
