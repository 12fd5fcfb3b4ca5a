"""Archives of torch.export and TorchScript, read: what they are, where the bytes of their weights lie.

A graph is no checkpoint: its weights are fused and named as one release of transformers had them, and what computes
with them is beside them. It can be looked at, run, and written once more for another device, nothing else.
"""

from __future__ import annotations

import errno
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dconv.arch.family import Family
from dconv.arch.layouts import Facts
from dconv.checkpoint import signs
from dconv.checkpoint.files import check_link, read_json, stamp
from dconv.checkpoint.source import Located, Source, seal, side_bytes, side_files
from dconv.checkpoint.torchframe import ZipWriter
from dconv.errors import Damaged, Refused, StorageFault
from dconv.sharding.parsed import Json, mapping_or_empty
from dconv.sharding.plan import Target, TargetFile, TargetTensor
from dconv.sharding.region import Region
from dconv.sharding.tensor import Logical, Piece, Slot, TensorSpec

#: Each with the file that dconv writes it as.
FILES: Final = signs.ARCHIVES
#: The file inside an archive that names inputs and outputs (``extra_files`` of torch's loaders).
PORTS: Final = "ports.json"
_LOCAL: Final = 30
#: A record that has weights: a code cannot be among them.
_WEIGHTS: Final = re.compile(r"data/(weights/weight_)?\d+")
#: More than any code, config or tokenizer.
_LARGEST_TEXT: Final = 1 << 30
#: Of one that is packed, as none of torch's is: few bytes may stand for many.
_LARGEST_PACKED: Final = 1 << 26
#: What `zipfile` raises about a record that is not as it should be: packed as it cannot unpack, encrypted, cut off.
TORN: Final = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    OSError,
    EOFError,
    StopIteration,
    RuntimeError,
    ValueError,
)
_PLACED: Final = re.compile(rb'torch\.device\("(cpu|mps|cuda(:\d+)?)"\)')


@dataclass(frozen=True)
class Archive:
    """An archive of a graph.

    Attributes:
        kind: a key of `FILES`.
        path: the file.
        records: name -> where its bytes begin, and how many; of compressed ones the offset is None.
        crcs: name -> the CRC-32 that its bytes had when they were written; 0 where none was.
    """

    kind: str
    path: Path
    records: Mapping[str, tuple[int | None, int]]
    crcs: Mapping[str, int]

    def weights(self) -> list[str]:
        """Names of the records that are weights and are not compressed, so that they can be compared in place."""
        return [name for name, (offset, _) in self.records.items() if _WEIGHTS.fullmatch(name) and offset is not None]

    def read(self, name: str) -> bytes:
        """A record that is no weight.

        Raises:
            Damaged: it is larger than any, or does not unpack.
        """
        at, nbytes = self.records[name]
        if nbytes > (_LARGEST_PACKED if at is None else _LARGEST_TEXT):
            raise Damaged("a record of an archive is larger than any", where=f"{name} in {self.path}")
        try:
            with zipfile.ZipFile(self.path) as opened:
                whole = next(it for it in opened.namelist() if it.partition("/")[2] == name)
                return opened.read(whole)
        except TORN as error:
            _check_storage(error, self.path)
            raise Damaged("an archive is broken", where=f"{name} in {self.path}", found=str(error)[:200]) from error


def archive_of(path: Path) -> Archive | None:
    """The archive of a graph that a path is, or that lies in it as dconv writes it; None where there is none."""
    return next((found for file in signs.archives(path) if (found := _read(file))), None)


def _read(path: Path) -> Archive | None:
    check_link(path)
    try:
        with zipfile.ZipFile(path) as opened, path.open("rb") as raw:
            infos = {info.filename.partition("/")[2]: info for info in opened.infolist()}
            kind = _kind(set(infos))
            if kind is None:
                return None
            if len(infos) < len(opened.infolist()):  # torch might read the other one
                raise Damaged("an archive has two records of one name", where=str(path))
            records: dict[str, tuple[int | None, int]] = {}
            for name, info in infos.items():
                raw.seek(info.header_offset)
                header = raw.read(_LOCAL)
                if len(header) < _LOCAL or not header.startswith(b"PK\x03\x04"):
                    raise Damaged("an archive is broken", where=f"{name} in {path}")
                begin = info.header_offset + _LOCAL + int.from_bytes(header[26:28], "little")
                begin += int.from_bytes(header[28:30], "little")
                if begin + info.compress_size > path.stat().st_size:
                    raise Damaged("an archive is cut off", where=f"{name} in {path}")
                records[name] = (begin if info.compress_type == zipfile.ZIP_STORED else None, info.file_size)
    except TORN as error:
        _check_storage(error, path)
        return None
    return Archive(kind, path, records, {name: info.CRC for name, info in infos.items()})


def _check_storage(error: Exception, path: Path) -> None:
    """Tell what an archive says wrong, a place before its beginning, from storage that fails.

    Raises:
        StorageFault: the latter.
    """
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        raise StorageFault(f"cannot read: {error.strerror}", where=str(path)) from error


def _kind(names: set[str]) -> str | None:
    if "archive_format" in names and any(name.startswith("models/") for name in names):
        return "torch_export"
    scripted = "constants.pkl" in names and "data.pkl" in names
    return "torchscript" if scripted and any(name.startswith("code/") for name in names) else None


def open_source(archive: Archive) -> Source:
    """Describe an archive, from its directory and the config.json beside it, as far as can be: it is not converted."""
    folder = archive.path.parent
    there = folder / "config.json"

    def locate(_family: Family, _facts: Facts) -> Located:
        return Located({}, {}, {})

    return Source(
        format=archive.kind,
        root=folder,
        config=read_json(there, what="config.json") if there.is_file() else None,
        args=None,
        side=side_files(folder),
        files={archive.path.name: stamp(archive.path)},
        parallel=None,
        locate=locate,
        stored_bytes=sum(archive.records[name][1] for name in archive.weights()),
        lacks="a graph without a config.json beside it",
        fault=refusal(archive),
    )


def refusal(archive: Archive) -> Refused:
    """Why nothing but the same is made of a graph."""
    return Refused(
        f"a graph ({archive.kind}) is what a conversion ends with, nothing was written",
        where=str(archive.path),
        expected="a checkpoint, or the same FORMAT for another --device",
        do="convert from the checkpoint that it was made of",
    )


def placed_anew(archive: Archive, device: str) -> tuple[Logical, Target]:
    """The same archive for another device, and as what it is read: records with weights as bytes, all else anew.

    Raises:
        Refused: weights that are compressed, or pickled.
        Damaged: see `Archive.read`.
    """
    change = {"torch_export": _export_on, "torchscript": _script_on}[archive.kind]
    weights = archive.weights()
    root, file = archive.path.parent, archive.path.name
    specs: dict[str, TensorSpec] = {}
    pieces: dict[str, tuple[Piece, ...]] = {}
    tensors: list[TargetTensor] = []
    writer = ZipWriter(0, "model")
    for name in archive.records:
        if name not in weights and name != ".data/serialization_id" and not name.endswith(".debug_pkl"):
            content = archive.read(name)
            said = _ports_on(content, device) if name == f"extra/{PORTS}" else change(name, content, device)
            writer.add(name, said)
    for name in weights:
        offset, nbytes = archive.records[name]
        box = Region.whole((nbytes,))
        specs[name] = TensorSpec(name, (nbytes,), "u8")
        pieces[name] = (Piece(name, box, file, offset or 0, (1,), "u8"),)
        to = FILES[archive.kind]
        tensors.append(
            TargetTensor(name, to, writer.reserve(name, nbytes), specs[name], (Slot(name, box, (0,), (0,)),))
        )
    size = writer.finish()
    side = side_files(root)
    target = Target(
        (TargetFile(FILES[archive.kind], size, tuple(writer.literals)),),
        tuple(tensors),
        lambda: side_bytes(None, side),
        seal(None, side),
    )
    return Logical(root, specs, pieces, {file: stamp(archive.path)}), target


def _ports_on(content: bytes, device: str) -> bytes:
    try:
        return json.dumps({**json.loads(content), "device": device}).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise Damaged("an archive is broken", where=f"extra/{PORTS}", found=str(error)[:200]) from error


def device_of(archive: Archive) -> str:
    """The device that a graph of dconv's is written for; "" where its archive does not say."""
    if f"extra/{PORTS}" not in archive.records:
        return ""
    try:
        said = json.loads(archive.read(f"extra/{PORTS}"))
    except (ValueError, RecursionError):
        return ""
    return str(mapping_or_empty(said).get("device", ""))


def _export_on(name: str, content: bytes, device: str) -> bytes:
    if not name.endswith(".json") or name.startswith("extra/"):
        return content
    try:
        return exported_on(content, device)
    except (ValueError, RecursionError) as error:
        raise Damaged("an archive is broken", where=name, found=str(error)[:200]) from error


def exported_on(content: bytes, device: str) -> bytes:
    """JSON of torch.export, whose tensors and operations are on another device."""
    kind, _, index = device.partition(":")
    said: dict[str, Any] = {"type": kind, "index": int(index) if index else None}

    def placed(node: Json) -> Json:
        if isinstance(node, list):
            return [placed(it) for it in node]
        if isinstance(node, dict):
            return said if node.keys() == said.keys() else {key: placed(it) for key, it in node.items()}
        return node

    return json.dumps(placed(json.loads(content))).encode()


def _script_on(name: str, content: bytes, device: str) -> bytes:
    if name.startswith("code/"):
        return _PLACED.sub(f'torch.device("{device}")'.encode(), content)
    return _storages_on(content, device) if name == "data.pkl" else content


def _storages_on(content: bytes, device: str) -> bytes:
    """A pickle of TorchScript in which storages lie on another device: that is a string in each, or one for all."""
    short = device.encode()

    def text(raw: bytes) -> bytes:
        return b"X" + len(raw).to_bytes(4, "little") + raw

    for old in _devices(content):
        content = content.replace(text(old), text(short))
    return content


def _devices(content: bytes) -> list[bytes]:
    return sorted(
        {found[1] for found in re.finditer(rb"X.\x00\x00\x00(cpu|mps|cuda(?::\d+)?)(?=[^\w:])", content, re.S)}
    )
