"""Where inputs become files: one folder a process, in memory where the system has such a place, and what is laid there.

Containers are written by a few lines of this file's own, so that a reader of dconv is not fed by its own writer.
"""

from __future__ import annotations

import atexit
import functools
import io
import json
import math
import os
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_MEMORY = Path("/dev/shm")  # noqa: S108 - a folder of a random name in it
_SIZES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
#: Of tensors whose bytes are there; a file may say that it has more, and is then as long, but holds nothing.
_MOST_BYTES = 1 << 40
#: GGUF: type number -> weights of a block, and its bytes.
_BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34), 12: (256, 144), 14: (256, 210), 30: (1, 2), 39: (32, 17)}


@functools.cache
def _top() -> Path:
    """Made by the process that starts, removed with it; those that it forks have a folder each in it."""
    top = Path(tempfile.mkdtemp(prefix="dconv-fuzz-", dir=_MEMORY if _MEMORY.is_dir() else None))
    maker = os.getpid()
    atexit.register(lambda: os.getpid() == maker and shutil.rmtree(top, ignore_errors=True))
    return top


@functools.cache
def _own(_process: int) -> Path:
    folder = _top() / str(_process)
    folder.mkdir()
    return folder


def scratch() -> Path:
    """This process's folder."""
    return _own(os.getpid())


def put(name: str, data: bytes) -> Path:
    """A file of the scratch folder, with ``data`` in it and nothing else of what was there."""
    path = scratch() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@functools.cache
def _copied(_process: int, kind: str) -> Path:
    return Path(shutil.copytree(whole(kind), scratch() / kind))


def checkpoint(kind: str) -> Path:
    """A small whole checkpoint that is this process's own, to be changed; see `whole`."""
    return _copied(os.getpid(), kind)


def whole(kind: str) -> Path:
    """The same as it was made: hf, again, sharded, torch_dist, legacy, model_pt, pt, bmtrain, meta."""
    return _checkpoints() / kind


@functools.cache
def _checkpoints() -> Path:
    from dconv.arch.registry import by_name
    from dconv.pipeline import Request, convert
    from tests.models import config_of, write_random

    top, family = _top() / "whole", by_name("llama")
    config = config_of(family, num_hidden_layers=1, vocab_size=16, intermediate_size=16)
    model = write_random(top / "hf", family, config)
    write_random(top / "sharded", family, config, shard_size=4000)
    convert(Request(model, "hf", top / "again"))
    for kind in ("torch_dist", "legacy", "model_pt"):
        convert(Request(model, "megatron", top / kind, megatron_format=kind, divisor=1 if kind == "model_pt" else 8))
    for kind in ("pt", "bmtrain"):
        convert(Request(model, kind, top / kind))
    _meta(top / "meta")
    return top


def _meta(folder: Path) -> None:
    """Meta's first Llama in small; its params.json is in the corpus."""
    shapes = {"tok_embeddings.weight": (16, 32), "norm.weight": (32,), "output.weight": (16, 32)}
    for part in ("wq", "wk", "wv", "wo"):
        shapes[f"layers.0.attention.{part}.weight"] = (32, 32)
    shapes |= {f"layers.0.feed_forward.w{part}.weight": (32, 96) if part == 2 else (96, 32) for part in (1, 2, 3)}
    shapes |= {f"layers.0.{part}_norm.weight": (32,) for part in ("attention", "ffn")}
    data = [(f"archive/data/{name}", bytes(2 * math.prod(shape))) for name, shape in shapes.items()]
    folder.mkdir()
    records = [("archive/data.pkl", pickled_tensors("bf16", shapes)), ("archive/byteorder", b"little"), *data]
    (folder / "consolidated.00.pth").write_bytes(torch_zip(records))


def pickled_tensors(dtype: str, shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """The pickle of a state dict, each of whose tensors has a storage of its name."""
    from dconv.checkpoint import pickling, torchframe
    from dconv.sharding.dtypes import ITEMSIZE

    sizes = {name: ITEMSIZE[dtype] * math.prod(shape) for name, shape in shapes.items()}
    tree = {name: torchframe.tensor(dtype, shape, name) for name, shape in shapes.items()}
    return pickling.dumps(tree, lambda node: torchframe.lower(node, sizes))


@functools.cache
def _records(path: Path) -> tuple[tuple[str, bytes], ...]:
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        places = [(it.filename, it.header_offset, it.file_size) for it in archive.infolist()]
    found = []
    for name, at, size in places:  # not by zipfile: dconv, like torch at times, writes no checksums
        begin = at + 30 + sum(struct.unpack_from("<2H", raw, at + 26))
        found.append((name, raw[begin : begin + size]))
    return tuple(found)


def pickled_in(path: Path) -> bytes:
    """The pickle of a file of ``torch.save``."""
    return next(data for name, data in _records(path) if name.endswith("/data.pkl"))


def with_pickle(path: Path, pickled: bytes) -> bytes:
    """Such a file again, with another pickle: lengths, places and checksums are right.

    Args:
        path: of a file that stays as it is.
    """
    held = _records(path)
    return torch_zip([(name, pickled if name.endswith("/data.pkl") else data) for name, data in held])


def torch_zip(records: Sequence[tuple[str, bytes]]) -> bytes:
    """A zip as ``torch.save`` has it, but for its alignment."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records:
            archive.writestr(zipfile.ZipInfo(name), data)
    return stream.getvalue()


def safetensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """A file whose header is whole: offsets and length follow from ``{name: [dtype, shape]}``. It holds zeros only."""
    header, at = {}, 0
    for name, said in tensors.items():
        dtype, shape = said if isinstance(said, list) and len(said) == 2 else (said, [])
        size = _SIZES.get(dtype, 1) if isinstance(dtype, str) else 1
        for length in shape if isinstance(shape, list) else []:
            size *= length if type(length) is int else 1
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + min(max(at, 0), _MOST_BYTES))


def gguf(path: Path, values: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """A file whose header is whole: counts and offsets follow from ``{name: [type, shape]}``. It holds zeros only."""
    parts = [b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))]
    parts += [_text(key) + _typed(value) for key, value in values.items()]
    at = 0
    for name, said in tensors.items():
        kind, shape = said if isinstance(said, list) and len(said) == 2 else (said, [])
        kind = kind % (1 << 32) if type(kind) is int else 0
        axes = [n % (1 << 64) for n in reversed(shape) if type(n) is int] if isinstance(shape, list) else []
        parts.append(_text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, at % (1 << 64)))
        weights, size = _BLOCKS.get(kind, (1, 4))
        for length in axes:
            size *= length
        at += -(-(size // weights) // 32) * 32
    head = b"".join(parts)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(-(-len(head) // 32) * 32 + min(at, _MOST_BYTES))


def _text(text: object) -> bytes:
    data = str(text).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _typed(value: Any) -> bytes:
    kind = _kind(value)
    if kind != 9:
        return struct.pack("<I", kind) + _plain(kind, value)
    kind = _kind(value[0]) if value else 4
    kind = 8 if kind == 9 else kind
    return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(_plain(kind, one) for one in value)


def _kind(value: Any) -> int:
    if isinstance(value, bool):
        return 7
    if isinstance(value, int):
        return 4 if 0 <= value < 1 << 32 else 11 if value < 0 else 10
    return 6 if isinstance(value, float) else 9 if isinstance(value, list) else 8


def _plain(kind: int, value: Any) -> bytes:
    if kind == 8:
        return _text(value)
    if kind == 6:
        number = float(value) if isinstance(value, int | float) and abs(value) < 1e38 else 0.0
        return struct.pack("<f", number)
    number = value if isinstance(value, int) else 0
    return (number % (1 << (64 if kind > 9 else 8 if kind == 7 else 32))).to_bytes({7: 1, 4: 4}.get(kind, 8), "little")
