"""GGUF headers that are broken or hostile: each is told from a good one before a tensor is looked for."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dconv.checkpoint.gguf_header import Long, read_header
from dconv.errors import Damaged, DconvError, Refused
from dconv.pipeline import Request, prepare
from tests.formats.gguf_files import recorded, rewrite


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def number(key: str, value: int, kind: int = 4) -> bytes:
    return text(key) + struct.pack("<II", kind, value)


def tensor(name: str = "a", shape: tuple[int, ...] = (32, 2), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf(
    keys: list[bytes], tensors: list[bytes], data: int = 256, *, version: int = 3, counts: tuple[int, int] | None = None
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(keys))))
    head += b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


def opened(folder: Path, content: bytes) -> Any:
    (folder / "x.gguf").write_bytes(content)
    return read_header(folder / "x.gguf")


@pytest.mark.parametrize("version", [2, 3])
def test_a_good_one(tmp_path: Path, version: int) -> None:
    keys = [number("split.no", 7), text("list") + struct.pack("<IIQ", 9, 4, 2) + struct.pack("<II", 5, 6)]
    keys.append(text("words") + struct.pack("<IIQ", 9, 8, 5000) + text("w") * 5000)
    found = opened(tmp_path, gguf(keys, [tensor("a", (32, 2)), tensor("b", (), offset=256)], 260, version=version))
    assert found.values == {"split.no": 7, "list": [5, 6], "words": Long(5000)}
    assert [(t.name, t.shape, t.kind, t.nbytes) for t in found.tensors.values()] == [
        ("a", (2, 32), "F32", 256),
        ("b", (), "F32", 4),
    ]


HUGE = 1 << 62
#: What is wrong -> the file.
DAMAGED = {
    "other letters": b"GGML" + bytes(60),
    "nothing in it": b"",
    "more keys than bytes": gguf([], [], counts=(0, HUGE)),
    "more tensors than bytes": gguf([], [], counts=(HUGE, 0)),
    "a key twice": gguf([number("a", 1), number("a", 2)], []),
    "a key that is no text": gguf([text(b"\xff\xfe") + struct.pack("<II", 4, 1)], []),
    "a key longer than the file": gguf([struct.pack("<Q", HUGE)], []),
    "a value of no type": gguf([text("a") + struct.pack("<II", 13, 0)], []),
    "a text longer than the file": gguf([text("a") + struct.pack("<IQ", 8, HUGE)], []),
    "an array longer than the file": gguf([text("a") + struct.pack("<IIQ", 9, 0, HUGE)], []),
    "texts more than the file": gguf([text("a") + struct.pack("<IIQ", 9, 8, HUGE)], []),
    "an array of arrays": gguf([text("a") + struct.pack("<IIQ", 9, 9, 1)], []),
    "no alignment": gguf([number("general.alignment", 0)], []),
    "an alignment of 24": gguf([number("general.alignment", 24)], []),
    "an alignment that is a text": gguf([text("general.alignment") + struct.pack("<I", 8) + text("32")], []),
    "a tensor twice": gguf([], [tensor("a"), tensor("a", offset=256)], 512),
    "too many axes": gguf([], [tensor(shape=(1, 1, 1, 1, 1))]),
    "half a block": gguf([], [tensor(shape=(48, 2), kind=8)]),
    "a block with no axis": gguf([], [tensor(shape=(), kind=8)]),
    "more than 2^64 elements": gguf([], [tensor(shape=(2**62, 2**62))]),
    "more than 2^63 bytes": gguf([], [tensor(shape=(2**59,))]),
    "a gap": gguf([], [tensor("a"), tensor("b", offset=512)], 1024),
    "an overlap": gguf([], [tensor("a"), tensor("b", offset=128)], 1024),
    "not from the beginning": gguf([], [tensor("a", offset=32)], 1024),
    "an offset past everything": gguf([], [tensor("a", offset=2**64 - 32)], 1024),
    "a type of no table": gguf([], [tensor(kind=2**31)]),
    "version 0": gguf([], [], version=0),
    "version 2^31": gguf([], [], version=2**31),
    "a name that is a path": gguf([], [tensor("../../x")]),
    "a name with NUL": gguf([], [tensor("a\0b")]),
    "data cut off": gguf([], [tensor("a")], 255),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(Damaged) as caught:
        opened(tmp_path, content)
    assert "x.gguf" in caught.value.where


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (gguf([], [], version=1), "version 1"),
        (gguf([], [], version=4), "version 4"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(40), "big-endian"),
        (gguf([], [tensor(kind=31)]), "type 31"),
    ],
)
def test_refused(tmp_path: Path, content: bytes, found: str) -> None:
    with pytest.raises(Refused) as caught:
        opened(tmp_path, content)
    assert caught.value.found == found


def test_a_sparse_file_of_empty_words_ends(tmp_path: Path) -> None:
    """A header may be said to be as long as the file, and a file costs nothing."""
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf([text("a") + struct.pack("<IIQ", 9, 0, 1 << 40)], [], 0))
    os.truncate(path, 1 << 41)
    with pytest.raises(Damaged, match="implausibly large"):
        read_header(path)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return recorded(tmp_path_factory.mktemp("real"), "llama").read_bytes()


def test_every_beginning_of_a_file(tmp_path: Path, real: bytes) -> None:
    end = max(t.offset + t.nbytes for t in opened(tmp_path, real).tensors.values())
    for length in [*range(0, 3000, 29), *range(3000, end, 4999), end - 1]:
        with pytest.raises(Damaged):
            opened(tmp_path, real[:length])


@settings(max_examples=300, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 2999), st.integers(0, 255)), min_size=1, max_size=4))
def test_other_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, real: bytes, changes: list[tuple[int, int]]
) -> None:
    content = bytearray(real)
    for at, byte in changes:
        content[at] = byte
    folder = tmp_path_factory.mktemp("changed")
    try:
        for found in opened(folder, bytes(content)).tensors.values():
            assert found.offset + found.nbytes <= len(real)
        prepare(Request(folder / "x.gguf", "hf", folder / "out"))
    except DconvError:
        pass


@pytest.mark.parametrize("key", ["block_count", "attention.head_count", "vocab_size", "feed_forward_length"])
@pytest.mark.parametrize("value", [0, 2**31 - 1])
def test_sizes_that_no_model_has(tmp_path: Path, key: str, value: int) -> None:
    """Refused at once: nothing is counted up to them."""
    source = rewrite(recorded(tmp_path, "llama"), tmp_path / "x.gguf", values={f"llama.{key}": value})
    if key == "vocab_size":  # what the tensor has is what counts
        assert prepare(Request(source, "hf", tmp_path / "out")).config["vocab_size"] == 61
        return
    with pytest.raises(DconvError):
        prepare(Request(source, "hf", tmp_path / "out"))
