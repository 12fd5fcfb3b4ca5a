"""torch.distributed.checkpoint's ``.metadata``, and the small containers it points at.

A DCP directory is files full of ``torch.save`` containers, one a chunk, and a pickle ``.metadata`` that says
which box of which tensor lies in which byte range. Megatron's ``torch_dist`` is this format.

Source: torch/distributed/checkpoint/{metadata,filesystem}.py of torch 2.13.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short  # of nested hostile values too
from typing import Any, Final, NoReturn, TypeGuard

from dconv.checkpoint import inert, pickling, torchframe, torchzip
from dconv.checkpoint.allowed import is_size
from dconv.checkpoint.files import check_plain_name, stamp
from dconv.checkpoint.pickled import DTypeRef, Node, Record, TensorRef
from dconv.checkpoint.pickling import Global, NewObj, Reduce
from dconv.errors import Damaged, Refused, StorageFault
from dconv.sharding.parsed import is_dict, is_list

_METADATA: Final = "torch.distributed.checkpoint.metadata"
_FILESYSTEM: Final = "torch.distributed.checkpoint.filesystem"


@dataclass(frozen=True, slots=True)
class DcpChunk:
    """A box of a tensor, and the container that holds it: ``length`` bytes at byte ``offset`` of ``file``."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class DcpTensor:
    """A global tensor and its chunks, each inside it; whether they cover it is not checked here."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[DcpChunk, ...]


@dataclass(frozen=True, slots=True)
class DcpMetadata:
    """``objects``: key -> (file, offset, length) of a pickled object."""

    tensors: dict[str, DcpTensor]
    objects: dict[str, tuple[str, int, int]]


def read_metadata(path: Path) -> DcpMetadata:
    """Read a ``.metadata`` file.

    Args:
        path: the file, or the directory that holds it.

    Raises:
        Damaged: no DCP metadata, chunks outside their tensor or without a place, names that leave the folder.
        Refused: chunks that were transformed (compressed) when written, dtypes that dconv does not know.
        StorageFault: the file cannot be read.
    """
    path = path / ".metadata" if path.is_dir() else path
    stamp(path)  # it is a file, not a pipe that nobody writes to
    try:
        with open(path, "rb") as file:
            data = file.read(inert.MAX_BYTES + 1)
    except OSError as fault:
        raise StorageFault(f"cannot read a file: {fault.strerror}", where=str(path)) from fault
    return _Reader(path).metadata(inert.load(data, where=str(path)))


class _Reader:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._names: set[str] = set()
        self._chunks = 0

    def bad(self, what: str, key: object, found: object = "") -> NoReturn:
        raise Damaged(what, where=f"{self._path}\n{short(key)}", found="" if found == "" else short(found))

    def metadata(self, tree: object) -> DcpMetadata:
        fields = self._fields(tree, "Metadata", "metadata")
        entries, stored = fields.get("state_dict_metadata"), fields.get("storage_data")
        if not is_dict(entries) or not is_dict(stored):
            self.bad("no metadata of torch.distributed.checkpoint", "state_dict_metadata, storage_data")
        places: dict[tuple[object, object], tuple[str, int, int]] = {}
        for index, info in stored.items():
            place = self._fields(index, "MetadataIndex", "storage_data")
            key = place.get("fqn"), place.get("offset")
            if not isinstance(key[0], str) or not (key[1] is None or _sizes(key[1])) or key in places:
                self.bad("a wrong or repeated place in storage_data", key[0])
            places[key] = self._place(info, key[0])
        self._chunks = 2 * len(places)
        tensors: dict[str, DcpTensor] = {}
        objects: dict[str, tuple[str, int, int]] = {}
        for key, entry in entries.items():
            if not isinstance(key, str) or not isinstance(entry, Record):
                self.bad("metadata of unknown form", key, entry)
            if entry.symbol.name == "BytesStorageMetadata":
                if (key, None) not in places:
                    self.bad("an object without a place", key)
                objects[key] = places[key, None]
            else:
                tensors[key] = self._tensor(key, self._fields(entry, "TensorStorageMetadata", key), places)
        return DcpMetadata(tensors, objects)

    def _fields(self, node: object, name: str, key: object) -> dict[str, Any]:
        if not isinstance(node, Record) or node.symbol.name != name or not isinstance(node.state, dict):
            self.bad(f"metadata without a {name}", key, node)
        return node.state

    def _place(self, info: object, key: object) -> tuple[str, int, int]:
        fields = self._fields(info, "_StorageInfo", key)
        if fields.get("transform_descriptors"):
            raise Refused(
                "chunks that were compressed or encoded when written",
                where=f"{self._path}\n{short(key)}",
                found=short(fields["transform_descriptors"]),
            )
        name, offset, length = fields.get("relative_path"), fields.get("offset"), fields.get("length")
        if not isinstance(name, str) or name not in self._names:
            name = check_plain_name(name, said_by=self._path)
            self._names.add(name)
        place = offset, length
        if not _sizes(place):
            self.bad("a chunk of wrong place", key, place)
        return name, place[0], place[1]

    def _tensor(self, key: str, fields: dict[str, Any], places: Mapping[Any, tuple[str, int, int]]) -> DcpTensor:
        properties, shape, chunks = fields.get("properties"), fields.get("size"), fields.get("chunks")
        if not isinstance(properties, Record) or not _sizes(shape) or not is_list(chunks):
            self.bad("a tensor of unknown form", key)
        state = properties.state
        dtype = state[0] if isinstance(state, tuple) and state else properties.fields.get("dtype")
        if not isinstance(dtype, DTypeRef):
            raise Refused(f"a tensor of {short(dtype)}", where=f"{self._path}\n{short(key)}")
        found: dict[tuple[int, ...], DcpChunk] = {}
        for chunk in chunks:
            box = self._fields(chunk, "ChunkStorageMetadata", key)
            offsets, sizes = box.get("offsets"), box.get("sizes")
            if not _sizes(offsets) or not _sizes(sizes) or not len(offsets) == len(sizes) == len(shape):
                self.bad("a chunk of wrong form", key, (offsets, sizes))
            if any(o + n > total for o, n, total in zip(offsets, sizes, shape, strict=True)):
                self.bad("a chunk outside its tensor", key, (offsets, sizes, shape))
            place = places.get((key, offsets))
            if place is None:
                self.bad("a chunk without a place", key, offsets)
            self._chunks -= 1  # a list may hold one entry a million times, and many tensors one list
            if self._chunks < 0 or (offsets in found and 0 not in sizes):
                self.bad("two chunks at one place", key, offsets)
            found[offsets] = DcpChunk(offsets, sizes, *place)
        return DcpTensor(dtype.name, shape, tuple(found.values()))


def _sizes(value: Node) -> TypeGuard[tuple[int, ...]]:
    return type(value) is tuple and len(value) <= 64 and all(map(is_size, value))


def locate_chunk(directory: Path, chunk: DcpChunk, dtype: str) -> torchzip.Located:
    """Where a chunk's elements lie in ``directory / chunk.file``; offset and strides in bytes.

    Args:
        directory: the checkpoint's.
        chunk: its file, place and sizes, as ``.metadata`` says.
        dtype: that of the tensor (dconv's short name).

    Raises:
        Damaged: the container there is broken or holds anything but one tensor of the chunk's sizes.
    """
    file = torchzip.read(directory / chunk.file, chunk.offset, chunk.length)
    where = f"{file.path}, bytes {chunk.offset} to {chunk.offset + chunk.length}"
    if not isinstance(file.tree, TensorRef):
        raise Damaged("a chunk that is no tensor", where=where, found=type(file.tree).__name__)
    located = file.locate(file.tree)
    if located.shape != chunk.sizes or located.dtype != dtype:
        expected = f"{dtype} {chunk.sizes}"
        found = f"{located.dtype} {located.shape}"
        raise Damaged("a chunk that is not what .metadata says", where=where, expected=expected, found=found)
    return located


def read_object(directory: Path, place: tuple[str, int, int]) -> Any:
    """The inert tree of an entry of `DcpMetadata.objects`; tensors in it stay unresolved `TensorRef`."""
    name, offset, length = place
    return torchzip.read(directory / name, offset, length).tree


def object_blob(tree: object) -> bytes:
    """A container of plain data, as at an object's place; Megatron's ``_extra_state`` is ``[None]``."""
    frame = torchframe.frame(tree, ())
    return frame.literals[0][1]


def dump_metadata(tensors: Mapping[str, DcpTensor], objects: Mapping[str, tuple[str, int, int]]) -> bytes:
    """The bytes of a ``.metadata`` that torch's ``FileSystemReader`` and megatron-core load.

    ``planner_data`` is None: it only serves to un-flatten nested state dicts, and Megatron's are flat.
    """
    entries: dict[str, NewObj] = {}
    places: dict[NewObj, NewObj] = {}
    for key, tensor in tensors.items():
        boxes: list[NewObj] = []
        for index, chunk in enumerate(tensor.chunks):
            offsets = _size(chunk.offsets)
            boxes.append(NewObj(_CHUNK, (), {"offsets": offsets, "sizes": _size(chunk.sizes)}))
            where = NewObj(_INDEX, (), {"fqn": key, "index": index, "offset": offsets})
            places[where] = _info(chunk.file, chunk.offset, chunk.length)
        form = (pickling.dtype(tensor.dtype), _STRIDED, False, _CONTIGUOUS, False)
        properties = NewObj(_PROPERTIES, (), form)
        entries[key] = NewObj(_TENSOR, (), {"properties": properties, "size": _size(tensor.shape), "chunks": boxes})
    for key, place in objects.items():
        entries[key] = NewObj(_BYTES)
        places[NewObj(_INDEX, (), {"fqn": key, "index": None})] = _info(*place)
    state = {
        "state_dict_metadata": entries,
        "planner_data": None,
        "storage_data": places,
        "storage_meta": None,
        "version": "1.0.0",
    }
    return pickling.dumps(NewObj(_ROOT, (), state))


_ROOT: Final = Global(_METADATA, "Metadata")
_TENSOR: Final = Global(_METADATA, "TensorStorageMetadata")
_BYTES: Final = Global(_METADATA, "BytesStorageMetadata")
_CHUNK: Final = Global(_METADATA, "ChunkStorageMetadata")
_INDEX: Final = Global(_METADATA, "MetadataIndex")
_PROPERTIES: Final = Global(_METADATA, "TensorProperties")
_INFO: Final = Global(_FILESYSTEM, "_StorageInfo")
_STRIDED: Final = Reduce(Global("torch.serialization", "_get_layout"), ("torch.strided",))
_CONTIGUOUS: Final = pickling.enum(_METADATA, "_MEM_FORMAT_ENCODING", 0)
_SIZE: Final = Global("torch", "Size")


def _size(sizes: tuple[int, ...]) -> Reduce:
    return Reduce(_SIZE, (sizes,))


def _info(file: str, offset: int, length: int) -> NewObj:
    return NewObj(_INFO, (), {"relative_path": file, "offset": offset, "length": length})
