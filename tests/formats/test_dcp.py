"""torch.distributed.checkpoint: its directories are read, ours are loaded by it and by megatron-core."""

from __future__ import annotations

import io
import pickle
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from dconv.checkpoint import dcp
from dconv.checkpoint.dcp import DcpChunk, DcpTensor
from dconv.checkpoint.torchframe import frame, tensor
from dconv.errors import Damaged, DconvError, Refused
from dconv.sharding.dtypes import ITEMSIZE, TO_TORCH
from tests.formats.test_torchzip import gather, random_tensor, raw

DTYPES = ("bf16", "f32", "f16", "f8_e4m3", "i64", "u8", "bool")


def save_real(folder: Path, state: dict[str, Any]) -> None:
    save(state, storage_writer=FileSystemWriter(folder), no_dist=True)


def save_ours(folder: Path, tensors: dict[str, torch.Tensor], cuts: int, objects: dict[str, object]) -> None:
    """Cut along axis 0 into ``cuts`` chunks, all in one file."""
    short = {v: k for k, v in TO_TORCH.items()}
    content = bytearray()
    described = {}
    places = {}
    for key, value in tensors.items():
        dtype = short[str(value.dtype).removeprefix("torch.")]
        chunks = []
        row = 0
        for part in value.chunk(cuts) if value.ndim else [value]:
            made = frame(tensor(dtype, part.shape, "0"), [("0", part.nbytes)], base=len(content))
            start = len(content)
            content += bytes(made.size)
            for at, data in [*made.literals, (made.data["0"], raw(part))]:
                content[at : at + len(data)] = data
            offsets = (row,) + (0,) * (part.ndim - 1) if part.ndim else ()
            chunks.append(DcpChunk(offsets, tuple(part.shape), "__0_0.distcp", start, made.size))
            row += part.shape[0] if part.ndim else 0
        described[key] = DcpTensor(dtype, tuple(value.shape), tuple(chunks))
    for key, tree in objects.items():
        blob = dcp.object_blob(tree)
        places[key] = ("__0_0.distcp", len(content), len(blob))
        content += blob
    (folder / "__0_0.distcp").write_bytes(content)
    (folder / ".metadata").write_bytes(dcp.dump_metadata(described, places))


def test_a_directory_of_torch_is_located(tmp_path: Path) -> None:
    state = {f"w.{d}": random_tensor(d, (3, 5), i) for i, d in enumerate(DTYPES)}
    state |= {
        "scalar": torch.tensor(2.5),
        "turned": torch.arange(6.0).view(2, 3).T,
        "empty": torch.zeros(0, 4),
    }
    save_real(tmp_path, {**state, "x/shard_0_1": [None], "args": {"n": 3}})
    found = dcp.read_metadata(tmp_path)
    assert set(found.tensors) == set(state)
    for key, value in state.items():
        described = found.tensors[key]
        assert (described.shape, TO_TORCH[described.dtype]) == (
            tuple(value.shape),
            str(value.dtype).split(".")[1],
        )
        (chunk,) = described.chunks
        at = dcp.locate_chunk(tmp_path, chunk, described.dtype)
        assert gather(tmp_path / chunk.file, at) == raw(value)
    assert {key: dcp.read_object(tmp_path, place) for key, place in found.objects.items()} == {
        "x/shard_0_1": [None],
        "args.n": 3,
    }


@pytest.mark.parametrize("cuts", [1, 3])
def test_our_directory_is_loaded_by_torch(tmp_path: Path, cuts: int) -> None:
    state = {f"w.{d}": random_tensor(d, (5, 3), i) for i, d in enumerate(DTYPES)} | {"s": torch.tensor(7)}
    save_ours(tmp_path, state, cuts, {"x._extra_state/shard_0_1": [None]})
    empty: dict[str, Any] = {key: torch.zeros_like(value) for key, value in state.items()}
    empty["x._extra_state/shard_0_1"] = 0
    load(empty, storage_reader=FileSystemReader(tmp_path), no_dist=True)
    assert empty.pop("x._extra_state/shard_0_1") == [None]
    for key, value in state.items():
        assert raw(empty[key]) == raw(value)


def test_metadata_is_what_torch_itself_would_pickle(tmp_path: Path) -> None:
    state = {"w": torch.zeros(4, 2), "s": torch.tensor(1, dtype=torch.int64)}
    save_real(tmp_path, {**state, "x": [None]})
    theirs = FileSystemReader(tmp_path).read_metadata()
    found = dcp.read_metadata(tmp_path)
    (tmp_path / ".metadata").write_bytes(dcp.dump_metadata(found.tensors, found.objects))
    ours = FileSystemReader(tmp_path).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    assert [i.index for i in ours.storage_data if i.fqn == "w"] == [0]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if torch.distributed.is_initialized():
        yield
        return
    store = tmp_path_factory.mktemp("store") / "file"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("world")
def test_megatron_core_loads_our_directory(tmp_path: Path) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

    layers = torch.arange(2 * 4 * 3, dtype=torch.float32).view(2, 4, 3)
    save_ours(tmp_path, {"layers.weight": layers}, 2, {"layers.x._extra_state/shard_0_1": [None]})
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (tmp_path / "common.pt").write_bytes(dcp.object_blob({"iteration": 7}))
    asked: dict[str, Any] = {
        f"{i}": ShardedTensor.from_rank_offsets(
            "layers.weight", torch.zeros(4, 3), (0, i, 2), replica_id=0, prepend_axis_num=1
        )
        for i in range(2)
    }
    asked["extra"] = ShardedObject("layers.x._extra_state", 1, (1,), (0,))
    loaded: Any = dist_checkpointing.load(asked, str(tmp_path))
    assert loaded["iteration"] == 7
    assert loaded["extra"] is None
    assert torch.equal(torch.stack([loaded["0"], loaded["1"]]), layers)


@pytest.mark.usefixtures("world")
def test_a_directory_of_megatron_core_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # what its writer asks of psutil, for a log line, and of CUDA: without them it waits forever
    monkeypatch.setattr(filesystem_async, "_process_memory", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    layers = [random_tensor("bf16", (4, 3), i) for i in range(2)]
    state: dict[str, Any] = {
        f"{i}": ShardedTensor.from_rank_offsets("layers.weight", w, (0, i, 2), replica_id=0, prepend_axis_num=1)
        for i, w in enumerate(layers)
    }
    state["extra"] = ShardedObject("layers.x._extra_state", None, (1,), (0,))
    dist_checkpointing.save({**state, "iteration": 7}, str(tmp_path))
    found = dcp.read_metadata(tmp_path / ".metadata")
    weight = found.tensors["layers.weight"]
    assert (weight.dtype, weight.shape) == ("bf16", (2, 4, 3))
    for chunk in weight.chunks:
        assert chunk.sizes == (1, 4, 3)
        at = dcp.locate_chunk(tmp_path, chunk, "bf16")
        assert gather(tmp_path / chunk.file, at) == raw(layers[chunk.offsets[0]])
    assert dcp.read_object(tmp_path, found.objects["layers.x._extra_state/shard_0_1"]) == [None]


def _write(folder: Path, **changes: Any) -> Path:
    """Metadata of one 2 x 3 tensor ``w`` and one object, pickled by torch's own classes."""
    spot = changes.get("spot", _StorageInfo("__0_0.distcp", 0, 10))
    chunk = ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((2, 3)))
    for name in ("offsets", "sizes"):
        if name in changes:
            setattr(chunk, name, changes[name])
    entry = TensorStorageMetadata(
        TensorProperties(changes.get("dtype", torch.float32)),
        changes.get("size", torch.Size((2, 3))),
        [chunk],
    )
    index = changes.get("index", MetadataIndex("w", (0, 0), 0))
    metadata = Metadata(
        {"w": entry, "x": BytesStorageMetadata()},
        storage_data={
            index: spot,
            MetadataIndex(changes.get("object", "x")): _StorageInfo("__0_0.distcp", 0, 1),
        },
    )
    (folder / ".metadata").write_bytes(pickle.dumps(changes.get("metadata", metadata)))
    return folder


def test_the_unchanged_metadata_below_is_fine(tmp_path: Path) -> None:
    assert set(dcp.read_metadata(_write(tmp_path)).tensors) == {"w"}


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        *(({"spot": _StorageInfo(name, 0, 10)}, Damaged) for name in ("../x", "/etc/passwd", "a/b", "", "..", "a\0b")),
        ({"spot": _StorageInfo(["x"], 0, 10)}, Damaged),  # type: ignore[arg-type]
        ({"spot": _StorageInfo("x", -1, 10)}, Damaged),
        ({"spot": _StorageInfo("x", 0, -10)}, Damaged),
        ({"spot": _StorageInfo("x", 0.5, 10)}, Damaged),  # type: ignore[arg-type]
        ({"spot": _StorageInfo("x", 0, 10, ["zstd"])}, Refused),
        ({"spot": None}, Damaged),
        ({"offsets": torch.Size((1, 0))}, Damaged),
        ({"offsets": (0, -1)}, Damaged),
        ({"offsets": (0,)}, Damaged),
        ({"sizes": torch.Size((2, 4))}, Damaged),
        ({"sizes": [2, 3]}, Damaged),
        ({"size": torch.Size((2,))}, Damaged),
        ({"dtype": torch.complex128}, Refused),
        ({"dtype": "float32"}, Refused),
        ({"index": MetadataIndex("w", (1, 0), 0)}, Damaged),
        ({"index": MetadataIndex("v", (0, 0), 0)}, Damaged),
        ({"index": "w"}, Damaged),
        ({"object": "y"}, Damaged),
        ({"metadata": {"state_dict_metadata": {}}}, Damaged),
        ({"metadata": Metadata({}, storage_data=None)}, Damaged),
        ({"metadata": Metadata({"w": [1]}, storage_data={})}, Damaged),  # type: ignore[dict-item]
        ({"metadata": zlib.crc32}, Damaged),
    ],
)
def test_wrong_metadata(tmp_path: Path, changes: dict[str, Any], error: type[DconvError]) -> None:
    with pytest.raises(error) as caught:
        dcp.read_metadata(_write(tmp_path, **changes))
    assert str(tmp_path) in caught.value.where


def test_two_places_for_one_chunk(tmp_path: Path) -> None:
    chunk = DcpChunk((0,), (2,), "__0_0.distcp", 0, 400)
    twice = DcpTensor("f32", (2,), (chunk, replace(chunk, offset=400)))
    (tmp_path / ".metadata").write_bytes(dcp.dump_metadata({"w": twice}, {}))
    with pytest.raises(Damaged, match="repeated"):
        dcp.read_metadata(tmp_path)


def test_truncated_metadata(tmp_path: Path) -> None:
    path = _write(tmp_path) / ".metadata"
    data = path.read_bytes()
    for size in range(0, len(data), 11):
        path.write_bytes(data[:size])
        with pytest.raises(Damaged):
            dcp.read_metadata(path)
    path.unlink()
    with pytest.raises(Damaged, match="missing"):
        dcp.read_metadata(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: replace(c, sizes=(3, 2)),
        lambda c: replace(c, sizes=(2, 4)),
        lambda c: replace(c, offset=c.offset + 1),
        lambda c: replace(c, length=c.length - 1),
        lambda c: replace(c, length=c.length + 10**6),
        lambda c: replace(c, file="gone"),
    ],
)
def test_chunks_that_are_not_what_metadata_says(tmp_path: Path, change: Callable[[DcpChunk], DcpChunk]) -> None:
    save_real(tmp_path, {"w": torch.zeros(2, 3), "x": [1]})
    found = dcp.read_metadata(tmp_path)
    (chunk,) = found.tensors["w"].chunks
    assert dcp.locate_chunk(tmp_path, chunk, "f32").shape == (2, 3)
    with pytest.raises(Damaged):
        dcp.locate_chunk(tmp_path, change(chunk), "f32")
    with pytest.raises(Damaged):
        dcp.locate_chunk(tmp_path, chunk, "f16")
    name, offset, length = found.objects["x"]
    with pytest.raises(Damaged, match="no tensor"):
        dcp.locate_chunk(tmp_path, replace(chunk, file=name, offset=offset, length=length), "f32")


def test_objects_are_loaded_by_torch_as_safe() -> None:
    blob = dcp.object_blob([{"iteration": 3, "name": "x"}])
    assert blob == dcp.object_blob([{"iteration": 3, "name": "x"}])
    assert torch.load(io.BytesIO(blob), weights_only=True) == [{"iteration": 3, "name": "x"}]
    assert len(frame([None], []).literals) == 1


def test_metadata_of_a_large_model_is_fast_and_exact(tmp_path: Path) -> None:
    layers, shards = 80, 42
    tensors = {
        f"decoder.layers.{i}.weight": DcpTensor(
            "bf16",
            (shards, 64, ITEMSIZE["bf16"]),
            tuple(DcpChunk((r, 0, 0), (1, 64, 2), f"__{r}_0.distcp", i * 1000, 900) for r in range(shards)),
        )
        for i in range(layers)
    }
    objects = {f"x._extra_state/shard_{i}_{layers}": ("__0_0.distcp", i, 400) for i in range(layers)}
    start = time.process_time()
    data = dcp.dump_metadata(tensors, objects)
    written = time.process_time()
    (tmp_path / ".metadata").write_bytes(data)
    found = dcp.read_metadata(tmp_path)
    read = time.process_time()
    assert (found.tensors, found.objects) == (tensors, objects)
    # measured 0.04 s and 0.06 s; a slip to quadratic time costs minutes
    assert written - start < 2
    assert read - written < 2
