"""HuggingFace directories: safetensors and ``pytorch_model*.bin``, single or with an index, read and written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from dconv.arch.family import Family
from dconv.arch.layouts import Facts
from dconv.checkpoint import safetensors, torchzip
from dconv.checkpoint.files import check_plain_name, read_json, stamp
from dconv.checkpoint.inert import TensorRef
from dconv.checkpoint.source import Located, Source, expected_specs, shape_error, side_bytes, side_files
from dconv.errors import Damaged, Refused, group_names
from dconv.sharding.plan import Target, TargetFile, TargetTensor
from dconv.sharding.region import Region
from dconv.sharding.tensor import Extent, Piece, Slot, Stored, TensorSpec

_TP_BIN: Final = re.compile(r"pytorch_model\.tp(\d+)\.bin")


def is_huggingface(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))


def open_source(folder: Path) -> Source:
    """Describe a HuggingFace directory from headers alone.

    Raises:
        Damaged: a missing shard, a broken header, an index that points outside or disagrees with the files.
    """
    config = read_json(folder / "config.json", what="config.json") if (folder / "config.json").exists() else None
    shards = _shards(folder)
    files = {name: stamp(folder / name) for shard in shards for name in shard}
    names = tuple(dict.fromkeys(name for shard in shards for tensors in shard.values() for name in tensors))

    def locate(family: Family, facts: Facts) -> Located:
        return _locate(shards, family, facts)

    return Source(
        format="huggingface",
        root=folder,
        config=config,
        args=None,
        side=side_files(folder),
        files=files,
        parallel=None,
        locate=locate,
        left_out=_left_out(folder),
        stored_bytes=sum(t.spec.nbytes for shard in shards for tensors in shard.values() for t in tensors.values()),
        tensor_names=names,
    )


#: One tensor-parallel rank's files, each with its tensors. A usual directory has one rank.
_Shard = dict[str, dict[str, Stored]]


def _shards(folder: Path) -> list[_Shard]:
    for index, single in (
        ("model.safetensors.index.json", "model.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin"),
    ):
        if (folder / index).exists():
            return [_indexed(folder, folder / index)]
        if (folder / single).exists():
            return [{single: _read(folder / single)}]
    ranks = {int(m[1]): p for p in folder.iterdir() if (m := _TP_BIN.fullmatch(p.name))}
    if ranks:
        absent = sorted(set(range(max(ranks) + 1)) - set(ranks))
        if absent:
            raise Damaged(
                "a tensor-parallel shard is missing",
                where=group_names(f"pytorch_model.tp{rank}.bin" for rank in absent),
                expected=f"{max(ranks) + 1} files in {folder}",
            )
        return [{ranks[rank].name: _read(ranks[rank])} for rank in sorted(ranks)]
    loose = sorted(folder.glob("*.safetensors"))
    if len(loose) == 1:
        return [{loose[0].name: _read(loose[0])}]
    raise Damaged(
        "no weights that can be told apart",
        where=str(folder),
        expected="model.safetensors, pytorch_model.bin, or an index",
        found=f"{len(loose)} safetensors files without an index",
        do="fetch model.safetensors.index.json, which says which files belong together",
    )


def _indexed(folder: Path, index: Path) -> _Shard:
    weight_map = read_json(index, what="the index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise Damaged("the index has no weight_map", where=str(index))
    for name in dict.fromkeys(weight_map.values()):
        check_plain_name(name, said_by=index)
    wanted = list(dict.fromkeys(weight_map.values()))
    missing = [name for name in wanted if not (folder / name).exists()]
    if missing:
        raise Damaged(
            f"{len(missing)} of {len(wanted)} shards are missing, nothing was written",
            where=group_names(missing) + f"\nin {folder}",
            expected=f"the files that {index.name} names",
            do="fetch them again",
        )
    shard = {name: _read(folder / name) for name in wanted}
    said = set(weight_map.items())
    there = {(name, file) for file, tensors in shard.items() for name in tensors}
    for odd, text in ((said - there, "the index names tensors that their files lack"),
                      (there - said, "files hold tensors that the index does not name")):  # fmt: skip
        if odd:
            name, file = min(odd)
            raise Damaged(text, where=f"{group_names(n for n, _ in odd)}\nfirst {name} in {file}", found=str(index))
    return shard


def _read(path: Path) -> dict[str, Stored]:
    if path.suffix == ".safetensors":
        return safetensors.read_header(path)
    return read_state_dict(path)


def read_state_dict(path: Path) -> dict[str, Stored]:
    """The tensors of a plain ``torch.save(state_dict)`` file."""
    file = torchzip.read(path)
    if not isinstance(file.tree, dict):
        raise Damaged("not a state dict", where=str(path), found=type(file.tree).__name__)
    return {name: stored(file, ref, str(name)) for name, ref in file.tree.items() if isinstance(ref, TensorRef)}


def stored(file: torchzip.TorchFile, ref: TensorRef, name: str) -> Stored:
    """A tensor of a torch file as a stored tensor whose extent names the file by its last part."""
    at = file.locate(ref)
    spec = TensorSpec(name, at.shape, at.dtype)
    return Stored(spec, (Extent(Region.whole(at.shape), file.path.name, at.offset, at.strides),))


def _left_out(folder: Path) -> dict[str, str]:
    return {path.name: "code is never run nor copied" for path in sorted(folder.glob("*.py"))}


def _locate(shards: list[_Shard], family: Family, facts: Facts) -> Located:
    specs = expected_specs(family, facts)
    located = Located({}, {}, {})
    for rank, shard in enumerate(shards):
        for file, tensors in shard.items():
            for name, tensor in tensors.items():
                spec = specs.get(name)
                if spec is not None:
                    located.pieces.setdefault(name, []).append(_piece(spec, tensor, rank, len(shards)))
                elif reason := family.reason_to_leave_out(name, facts):
                    located.left_out[name] = reason
                else:
                    located.unknown[name] = file
    return located


def _piece(spec: TensorSpec, tensor: Stored, rank: int, count: int) -> Piece:
    """A stored tensor as a piece; per-rank files are stacked along the one axis on which they are short."""
    extent = tensor.extents[0]
    short = [i for i, (n, m) in enumerate(zip(spec.shape, tensor.spec.shape, strict=False)) if n != m]
    start = [0] * len(spec.shape)
    fits = len(spec.shape) == len(tensor.spec.shape) and (
        not short or (len(short) == 1 and count > 1 and tensor.spec.shape[short[0]] * count == spec.shape[short[0]])
    )
    if not fits:
        raise shape_error(spec.name, extent.file, spec.shape, tensor.spec.shape)
    if short:
        start[short[0]] = rank * tensor.spec.shape[short[0]]
    region = Region(tuple(start), tensor.spec.shape)
    return Piece(spec.name, region, extent.file, extent.offset, extent.strides, tensor.spec.dtype)


def lay_out(
    specs: Iterable[TensorSpec],
    *,
    config: Mapping[str, object] | None,
    side: Mapping[str, Path],
    shard_size: int,
    left_out: dict[str, str],
) -> Target:
    """A HuggingFace directory to be written: weight files of at most ``shard_size`` bytes, index, config, side files.

    Args:
        specs: the logical tensors, in the order to write them.
        config: config.json's content; None copies the one among ``side`` as it is.
    """
    parts = safetensors.by_size(specs, shard_size)
    files: list[TargetFile] = []
    tensors: list[TargetTensor] = []
    for number, part in enumerate(parts, 1):
        name = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        size, first, offsets = safetensors.lay_out(part)
        files.append(TargetFile(name, size, ((0, first),)))
        for spec, offset in zip(part, offsets, strict=True):
            axes = tuple(range(len(spec.shape)))
            slot = Slot(spec.name, Region.whole(spec.shape), (0,) * len(axes), axes)
            tensors.append(TargetTensor(spec.name, name, offset, spec, (slot,)))

    def closing() -> Iterable[tuple[str, bytes]]:
        if len(parts) > 1:
            total = sum(tensor.spec.nbytes for tensor in tensors)
            weight_map = {tensor.spec.name: tensor.file for tensor in tensors}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            yield "model.safetensors.index.json", json.dumps(index, indent=2).encode()
        yield from side_bytes(config, side)

    return Target(tuple(files), tuple(tensors), closing, left_out=left_out)


def with_dtype(config: Mapping[str, object], dtype: str) -> dict[str, object]:
    """A config that says another dtype (torch's name), under the key that it uses."""
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {**config, key: dtype}


def refuse_quantized(config: Mapping[str, object], where: Path) -> None:
    """A quantised source needs its decoder; moving its codes as plain numbers would ruin it."""
    if config.get("quantization_config"):
        raise Refused(
            "the source is quantised, which this version does not decode, nothing was written",
            where=f"quantization_config in {where / 'config.json'}",
            expected="bf16, f16 or f32 weights",
        )
