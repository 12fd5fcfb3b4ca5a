"""torch.save's containers: tensors are found where torch finds them, torch loads ours."""

from __future__ import annotations

import os
import struct
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dconv.checkpoint import torchzip
from dconv.checkpoint.pickled import DTypeRef
from dconv.checkpoint.pickling import namespace
from dconv.checkpoint.torchframe import Frame, Tensor, frame, tensor
from dconv.checkpoint.torchzip import Located, read
from dconv.errors import Damaged, Refused
from dconv.sharding.dtypes import ITEMSIZE, TO_TORCH
from tests.processes import call

dtypes = st.sampled_from(sorted(ITEMSIZE))
in_tmp = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


def torch_dtype(name: str) -> torch.dtype:
    return getattr(torch, TO_TORCH[name])


def random_tensor(dtype: str, shape: Sequence[int], seed: int) -> torch.Tensor:
    size = int(np.prod(shape, dtype=np.int64)) * ITEMSIZE[dtype]
    raw = np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 256, size, dtype=np.uint8)
    made = torch.empty(tuple(shape), dtype=torch_dtype(dtype))
    if size:
        made.untyped_storage().copy_(torch.from_numpy(raw).untyped_storage())
    return made


def raw(value: torch.Tensor) -> bytes:
    """The elements in row-major order, whatever the strides."""
    return bytes(value.clone(memory_format=torch.contiguous_format).untyped_storage().tolist())


def gather(path: Path, at: Located) -> bytes:
    """The elements of a located tensor, by numpy."""
    size = ITEMSIZE[at.dtype]
    if 0 in at.shape:
        return b""
    data = np.fromfile(path, np.uint8)[at.offset :]
    view = np.lib.stride_tricks.as_strided(data, (*at.shape, size), (*at.strides, 1))
    return view.tobytes()


def write(path: Path, made: Frame, storages: dict[str, bytes], base: int = 0) -> None:
    with open(path, "wb") as file:
        file.truncate(base + made.size)
        for offset, data in made.literals:
            file.seek(offset)
            file.write(data)
        for key, data in storages.items():
            file.seek(made.data[key])
            file.write(data)


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whole": lambda t: t,
    "transposed": lambda t: t.mT if t.ndim >= 2 else t,
    "sliced": lambda t: t[1:, ...] if t.ndim and t.shape[0] else t,
    "stepped": lambda t: t[..., ::2] if t.ndim else t,
    "expanded": lambda t: t.unsqueeze(0).expand(3, *t.shape),
}
shapes = st.lists(st.integers(0, 5), max_size=4)


@in_tmp
@given(
    st.lists(st.tuples(dtypes, shapes, st.sampled_from(sorted(VIEWS))), max_size=5),
    st.booleans(),
    st.integers(0, 99),
)
def test_located_bytes_equal_what_torch_saved(
    tmp_path: Path, parts: list[tuple[str, list[int], str]], zipped: bool, seed: int
) -> None:
    whole = [random_tensor(dtype, shape, seed + i) for i, (dtype, shape, _) in enumerate(parts)]
    tree: dict[str, object] = {
        str(i): VIEWS[view](t) for i, (t, (_, _, view)) in enumerate(zip(whole, parts, strict=True))
    }
    tree |= {f"shared{i}": t for i, t in enumerate(whole)}
    path = tmp_path / "x.pt"
    torch.save(tree, path, _use_new_zipfile_serialization=zipped)
    file = read(path)
    assert list(file.tree) == list(tree)
    for name, expected in tree.items():
        assert isinstance(expected, torch.Tensor)
        at = file.locate(file.tree[name])
        assert (at.shape, TO_TORCH[at.dtype]) == (
            tuple(expected.shape),
            str(expected.dtype).removeprefix("torch."),
        )
        assert gather(path, at) == raw(expected)


@in_tmp
@given(st.lists(st.tuples(dtypes, shapes), max_size=5), st.booleans(), st.integers(0, 99))
def test_framed_tensors_are_loaded_by_torch(
    tmp_path: Path, parts: list[tuple[str, list[int]]], mapped: bool, seed: int
) -> None:
    values = {f"k{i}": random_tensor(dtype, shape, seed + i) for i, (dtype, shape) in enumerate(parts)}
    nodes = {name: tensor(dtype, v.shape, name) for (name, v), (dtype, _) in zip(values.items(), parts, strict=True)}
    made = frame({"model": nodes, "n": 3}, [(name, v.nbytes) for name, v in values.items()])
    path = tmp_path / "x.pt"
    write(path, made, {name: raw(v) for name, v in values.items()})
    assert all(offset % 64 == 0 for offset in made.data.values())
    loaded = torch.load(path, weights_only=True, mmap=mapped)
    assert loaded["n"] == 3
    for name, value in values.items():
        assert loaded["model"][name].dtype == value.dtype
        assert loaded["model"][name].shape == value.shape
        assert raw(loaded["model"][name]) == raw(value)
    file = read(path)
    assert {name: file.locate(ref).offset for name, ref in file.tree["model"].items()} == made.data


def test_views_into_one_storage_are_framed(tmp_path: Path) -> None:
    storage = torch.arange(24, dtype=torch.int32)
    tree = [tensor("i32", (3, 4), "0", offset=2), tensor("i32", (4, 3), "0", 12, (1, 4)), DTypeRef("bf16")]
    path = tmp_path / "x.pt"
    write(path, frame(tree, [("0", 96)]), {"0": raw(storage)})
    first, second, dtype = torch.load(path, weights_only=True)
    assert torch.equal(first, storage[2:14].view(3, 4))
    assert torch.equal(second, storage[12:24].view(3, 4).T)
    assert dtype == torch.bfloat16


def test_blob_inside_a_larger_file(tmp_path: Path) -> None:
    value = random_tensor("bf16", (5, 7), 1)
    path = tmp_path / "x.distcp"
    made = frame(tensor("bf16", (5, 7), "0"), [("0", 70)], base=1001)
    write(path, made, {"0": raw(value)}, base=1001)
    with open(path, "ab") as file:
        file.write(b"another blob")
    assert made.data["0"] % 64 == 0
    found = read(path, 1001, made.size)
    assert found.locate(found.tree).offset == made.data["0"]
    blob = tmp_path / "blob"
    blob.write_bytes(path.read_bytes()[1001 : 1001 + made.size])
    assert torch.equal(torch.load(blob, weights_only=True), value)
    for offset, length in ((1001, None), (1000, made.size), (1001, made.size - 1), (1001, 10**9), (-1, 5)):
        with pytest.raises(Damaged):
            read(path, offset, length)


def test_args_are_loaded_as_safe_by_torch_and_megatron(tmp_path: Path) -> None:
    from megatron.core.safe_globals import register_safe_globals

    register_safe_globals()
    path = tmp_path / "x.pt"
    args = {
        "num_layers": 2,
        "params_dtype": DTypeRef("bf16"),
        "lr": 1e-4,
        "name": "ü",
        "tp": (1, 2, 3, 4),
        "none": None,
    }
    write(path, frame({"args": namespace(args), "raw": b"\x00\xff", "set": {1}}, []), {})
    loaded = torch.load(path, weights_only=True)
    assert vars(loaded["args"]) == {**args, "params_dtype": torch.bfloat16}
    assert (loaded["raw"], loaded["set"]) == (b"\x00\xff", {1})


def test_records_beyond_four_gib(tmp_path: Path) -> None:
    big = (1 << 32) + 4096
    path = tmp_path / "x.pt"
    made = frame([tensor("u8", (big,), "0"), tensor("i16", (3,), "1")], [("0", big), ("1", 6)])
    write(path, made, {"1": struct.pack("<3h", 1, -2, 3)})
    assert path.stat().st_blocks * 512 < 1 << 20
    file = read(path)
    assert file.locate(file.tree[0]) == Located(made.data["0"], (1,), (big,), "u8")
    assert file.locate(file.tree[1]).offset == made.data["1"] > big
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert loaded[0].shape == (big,)
    assert loaded[1].tolist() == [1, -2, 3]
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("archive/data/0").file_size == big


def test_torch_zip64_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    big = (1 << 32) + 64
    with torch.serialization.skip_data():
        torch.save([torch.empty(big, dtype=torch.uint8), torch.arange(3)], path)
    file = read(path)
    with torch.serialization.skip_data():
        assert file.locate(file.tree[0]).shape == (big,)
    assert file.locate(file.tree[1]).offset > big


#: Frames a tree with sets of several types, and says what came out and in which order this process walks a set.
FRAME = """
from dconv.checkpoint.torchframe import frame, tensor
words = {f"word{i}" for i in range(20)}
tree = {"a": tensor("f32", (2,), "0"), "s": {3, 1, 2}, "words": words, "mixed": [{"x", b"y", 7, (1, "z")}]}
print(frame(tree, [("0", 8)]))
print(list(words))
"""


def test_same_input_same_bytes() -> None:
    """Also in processes whose strings hash to other numbers, as those of two ranks do."""
    frames, orders = [], []
    for seed in range(3):
        code, out, err = call(sys.executable, "-c", FRAME, PYTHONHASHSEED=str(seed))
        assert code == 0, err
        framed, order = out.splitlines()
        assert "word19" in framed
        frames.append(framed)
        orders.append(order)
    assert frames[0] == frames[1] == frames[2]
    assert len(set(orders)) == 3, "the seeds made no difference, so this proves nothing"


@pytest.mark.parametrize(
    ("tree", "storages"),
    [
        (tensor("f32", (3,), "0"), [("0", 8)]),
        (tensor("f32", (1,), "0", offset=2), [("0", 8)]),
        (tensor("f32", (2,), "1"), [("0", 8)]),
        (tensor("f32", (2,), "0", 0, (1, 1)), [("0", 8)]),
        (tensor("f32", (1,), "0"), [("0", 7)]),
        (None, [("0", 8), ("0", 8)]),
        (None, [("../x", 8)]),
    ],
)
def test_frames_that_torch_could_not_load_are_not_made(tree: Tensor | None, storages: list[tuple[str, int]]) -> None:
    with pytest.raises(ValueError):
        frame(tree, storages)


def small(path: Path, *, zipped: bool = True) -> bytes:
    torch.save({"w": torch.arange(6.0).view(2, 3), "b": torch.zeros(2)}, path, _use_new_zipfile_serialization=zipped)
    return path.read_bytes()


def test_files_without_checksums_and_with_a_comment_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.serialization.set_crc32_options(False)
    try:
        small(path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert set(read(path).tree) == {"w", "b"}
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"c" * 5000
    assert set(read(path).tree) == {"w", "b"}


def test_unknown_dtypes_are_refused_only_when_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"c": torch.zeros(2, dtype=torch.complex128), "f": torch.zeros(2)}, path)
    file = read(path)
    assert file.locate(file.tree["f"]).dtype == "f32"
    with pytest.raises(Refused):
        file.locate(file.tree["c"])


def test_no_data_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pt"
    torch.save({"w": torch.zeros(1 << 20)}, path)
    seen = []
    pread = os.pread

    def counting(fd: int, size: int, offset: int) -> bytes:
        seen.append(size)
        return pread(fd, size, offset)

    monkeypatch.setattr(torchzip.os, "pread", counting)
    read(path)
    assert sum(seen) < 8192
