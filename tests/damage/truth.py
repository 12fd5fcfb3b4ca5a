"""Where tensors lie in files, as others say: the formats' own libraries, or a few lines that share none of dconv's."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Tensor:
    """A tensor's bytes.

    Attributes:
        name: as a message has to name it.
        form: tensors of one form could stand for each other.
    """

    name: str
    file: str
    begin: int
    end: int
    form: str


Read = Callable[[Path], Iterator[Tensor]]


def nothing(folder: Path) -> Iterator[Tensor]:
    """Of a folder whose files are what is listed."""
    return iter(())


def safetensors(folder: Path) -> Iterator[Tensor]:
    for path in sorted(folder.rglob("*.safetensors")):
        data = path.read_bytes()
        begin = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:begin]).items():
            if name != "__metadata__":
                low, high = entry["data_offsets"]
                form = f"{entry['dtype']}{entry['shape']}"
                yield Tensor(name, path.relative_to(folder).as_posix(), begin + low, begin + high, form)


def gguf(folder: Path) -> Iterator[Tensor]:
    from gguf import GGUFReader

    for path in folder.glob("*.gguf"):
        for one in GGUFReader(path).tensors:
            form = f"{one.tensor_type}{one.shape.tolist()}"
            yield Tensor(one.name, path.name, int(one.data_offset), int(one.data_offset + one.n_bytes), form)


def torch_file(folder: Path) -> Iterator[Tensor]:
    for path in sorted([*folder.glob("*.pt"), *folder.glob("*.bin")]):
        loaded = torch.load(path, weights_only=False)
        yield from _found(path, folder, tensors_in(loaded.get("model", loaded)))


def legacy(folder: Path) -> Iterator[Tensor]:
    for path in sorted(folder.rglob("model_optim_rng.pt")):
        for tensor in _found(path, folder, tensors_in(torch.load(path, weights_only=False)["model"])):
            yield Tensor(f"{path.parent.name}:{tensor.name}", tensor.file, tensor.begin, tensor.end, tensor.form)


def torch_dist(folder: Path) -> Iterator[Tensor]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    iteration = folder / "release"
    for index, info in FileSystemReader(iteration).read_metadata().storage_data.items():
        if index.offset is None:  # bytes, not a tensor
            continue
        path = iteration / info.relative_path
        data = path.read_bytes()
        record = data[info.offset : info.offset + info.length]
        value = torch.load(io.BytesIO(record), weights_only=True)
        at = info.offset + _only(record, bytes_of(value))
        start, layers = list(index.offset), "decoder.layers."
        name = index.fqn
        if name.startswith(layers):  # the first axis stacks them
            name = name.replace(layers, f"{layers}{start.pop(0)}.")
        name = f"{name}@{'.'.join(map(str, start))}"
        file = path.relative_to(folder).as_posix()
        yield Tensor(name, file, at, at + value.nbytes, f"{value.dtype}{tuple(value.shape)}")


def onnx(folder: Path) -> Iterator[Tensor]:
    import onnx

    for one in onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer:
        said = {entry.key: entry.value for entry in one.external_data}
        if said:
            begin = int(said["offset"])
            form = f"{one.data_type}{list(one.dims)}"
            yield Tensor(one.name, said["location"], begin, begin + int(said["length"]), form)


def torch_export(folder: Path) -> Iterator[Tensor]:
    held = torch.export.load(folder / "model.pt2").state_dict
    yield from _found(folder / "model.pt2", folder, {name.removeprefix("model."): one for name, one in held.items()})


def torchscript(folder: Path) -> Iterator[Tensor]:
    held = torch.jit.load(folder / "model.pt").state_dict()
    yield from _found(folder / "model.pt", folder, {name.replace("__", "."): one for name, one in held.items()})


def tensors_in(tree: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """All tensors below a state dict, by the names that lead there."""
    found: dict[str, torch.Tensor] = {}
    for key, value in tree.items():
        if isinstance(value, torch.Tensor):
            found[key] = value
        elif isinstance(value, Mapping):
            found |= {f"{key}.{inner}": one for inner, one in tensors_in(value).items()}
    return found


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _found(path: Path, folder: Path, tensors: Mapping[str, torch.Tensor]) -> Iterator[Tensor]:
    """Tensors by their bytes, which are random: each stands in its file once."""
    data = path.read_bytes()
    file = path.relative_to(folder).as_posix()
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() > 16:
            begin = _only(data, bytes_of(tensor))
            yield Tensor(name, file, begin, begin + tensor.nbytes, f"{tensor.dtype}{tuple(tensor.shape)}")


def _only(data: bytes, part: bytes) -> int:
    at = data.find(part)
    assert at >= 0
    assert data.find(part, at + 1) < 0
    return at
