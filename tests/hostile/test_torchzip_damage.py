"""Files of torch.save that are cut off, altered or forged: our errors, and no tensor outside its storage."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dconv.checkpoint.pickled import TensorRef
from dconv.checkpoint.pickling import Global, Persistent, Reduce, dumps
from dconv.checkpoint.torchzip import read
from dconv.errors import Damaged, DconvError, Refused
from dconv.sharding.dtypes import ITEMSIZE
from tests.formats.test_torchzip import gather, small


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_files_are_damaged(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "x.pt"
    data = small(path, zipped=zipped)
    for size in [*range(0, len(data), 7), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(Damaged) as caught:
            read(path)
        assert str(path) in caught.value.where


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.data(), st.booleans())
def test_flipped_bytes_raise_nothing_but_our_errors(tmp_path: Path, data: st.DataObject, zipped: bool) -> None:
    path = tmp_path / "x.pt"
    content = bytearray(small(path, zipped=zipped))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        file = read(path)
        for ref in file.tree.values() if isinstance(file.tree, dict) else ():
            if isinstance(ref, TensorRef):
                at = file.locate(ref)
                last = at.offset + sum((n - 1) * s for n, s in zip(at.shape, at.strides, strict=True))
                assert 0 in at.shape or last + ITEMSIZE[at.dtype] <= len(content)
    except DconvError as error:
        assert str(path) in error.where


def rezip(path: Path, change: Callable[[dict[str, bytes]], object], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    change(records)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def bad_tensor(key: str, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], numel: int) -> bytes:
    storage = Persistent(("storage", Global("torch", "FloatStorage"), key, "cpu", numel))
    return dumps(
        {"w": Reduce(Global("torch._utils", "_rebuild_tensor_v2"), (storage, offset, shape, stride, False, None))}
    )


@pytest.mark.parametrize(
    ("tree", "what"),
    [
        (bad_tensor("0", 0, (6,), (1,), 6), None),
        (bad_tensor("0", 1, (6,), (1,), 6), "larger"),
        (bad_tensor("0", 0, (3, 3), (2, 1), 6), "larger"),
        (bad_tensor("0", 0, (1,), (1, 1), 6), "larger"),
        (bad_tensor("0", 0, (1 << 62,), (1 << 62,), 6), "larger"),
        (bad_tensor("0", 0, (7,), (1,), 7), "wrong size"),
        (bad_tensor("9", 0, (6,), (1,), 6), "without a record"),
        (bad_tensor("../data/0", 0, (6,), (1,), 6), "without a record"),
    ],
)
def test_tensors_outside_their_storage(tmp_path: Path, tree: bytes, what: str | None) -> None:
    path = tmp_path / "x.pt"
    small(path)
    rezip(path, lambda records: records.update({"x/data.pkl": tree}))
    if what is None:
        file = read(path)
        assert gather(path, file.locate(file.tree["w"])) == np.arange(6, dtype=np.float32).tobytes()
        return
    with pytest.raises(Damaged, match=what):
        file = read(path)
        file.locate(file.tree["w"])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda r: r.pop("x/data.pkl"), Damaged),
        (lambda r: r.update({"y/data.pkl": b"N."}), Damaged),
        (lambda r: r.update({"x/data.pkl": b"\x80\x02cposix\nsystem\nX\x01\x00\x00\x00x\x85R."}), Damaged),
        (lambda r: r.update({"x/constants.pkl": b""}), Refused),
        (lambda r: r.update({"x/byteorder": b"big"}), Refused),
    ],
)
def test_foreign_records(tmp_path: Path, change: Callable[[dict[str, bytes]], object], error: type[DconvError]) -> None:
    path = tmp_path / "x.pt"
    small(path)
    rezip(path, change)
    with pytest.raises(error):
        read(path)


def test_compressed_repeated_overlapping_and_flipped_records(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    small(path)
    rezip(path, lambda records: None, zipfile.ZIP_DEFLATED)
    with pytest.raises(Damaged, match="does not write"):
        read(path)

    data = small(path)
    path.write_bytes(data.replace(b"x/data/1", b"x/data/0"))
    with pytest.raises(Damaged, match="two records"):
        read(path)

    at = data.rindex(b"x/data/1") - 4  # offset of the local header in the central directory
    first = data[data.rindex(b"x/data/0") - 4 :][:4]
    path.write_bytes(data[:at] + first + data[at + 4 :])
    with pytest.raises(Damaged, match="overlap"):
        read(path)

    at = data.rindex(b"x/version") - 46 + 20  # both sizes in the central directory, of a record that nobody reads
    path.write_bytes(data[:at] + struct.pack("<2L", 999, 999) + data[at + 8 :])
    with pytest.raises(Damaged, match="overlap"):
        read(path)

    at = data.index(b"x/data/1") - 2  # length of the extra field in the local header: moves the data
    path.write_bytes(data[:at] + struct.pack("<H", struct.unpack_from("<H", data, at)[0] + 100) + data[at + 2 :])
    with pytest.raises(Damaged, match="overlap"):
        read(path)

    at = data.index(b"\x80\x02}")
    path.write_bytes(data[: at + 10] + bytes([data[at + 10] ^ 1]) + data[at + 11 :])
    with pytest.raises(Damaged, match="checksum"):
        read(path)


def test_old_file_whose_storage_is_not_what_the_tree_says(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    data = small(path, zipped=False)
    at = data.rindex(struct.pack("<q", 2))
    path.write_bytes(data[:at] + struct.pack("<q", 1) + data[at + 8 :])
    with pytest.raises(Damaged, match="wrong size"):
        read(path)


def test_missing_file_and_other_files(tmp_path: Path) -> None:
    with pytest.raises(Damaged, match="missing"):
        read(tmp_path / "none")
    for content in (b"", b"{}", b"\x89HDF", b"PK\x03\x04" + bytes(100)):
        path = tmp_path / "x"
        path.write_bytes(content)
        with pytest.raises(Damaged):
            read(path)
