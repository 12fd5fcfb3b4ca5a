"""HuggingFace directories: safetensors and ``pytorch_model*.bin``, single or with an index, read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dconv.arch.family import Family
from dconv.arch.layouts import Facts
from dconv.checkpoint import safetensors, tied
from dconv.checkpoint.files import check_plain_name, listed, read_json, stamp, stamps
from dconv.checkpoint.ranks import cut_region, read_ranks
from dconv.checkpoint.rename import AS_STORED, Renaming
from dconv.checkpoint.signs import STATE_DICTS
from dconv.checkpoint.source import Located, Source, expected_specs, side_files
from dconv.coded.beside import BESIDE, with_beside
from dconv.coded.decode import decode
from dconv.coded.decoded import Decoded
from dconv.errors import Damaged, DconvError, Refused, group_names
from dconv.sharding.dtypes import carrier
from dconv.sharding.ops import MOVE
from dconv.sharding.parsed import is_dict
from dconv.sharding.plan import Copy
from dconv.sharding.reader import Reader
from dconv.sharding.region import Index, Region
from dconv.sharding.tensor import Extent, FileStamp, Piece, Stored, TensorSpec

_TP_BIN: Final = re.compile(r"pytorch_model\.tp(\d+)\.bin")
#: One tensor-parallel rank's files, each with its tensors. A usual directory has one rank.
Shard = dict[str, dict[str, Stored]]
#: How files that may hold weights end.
_WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".pth")
#: Bytes of what reads a tensor of a few numbers.
_SMALL: Final = 1 << 12


def is_huggingface(folder: Path) -> bool:
    """Whether a directory has weights in files of HuggingFace's names."""
    return bool(listed(folder, "*.safetensors") or listed(folder, "pytorch_model*.bin"))


def is_ranked(folder: Path) -> bool:
    """Whether a directory has one torch file a tensor-parallel rank."""
    return any(map(_TP_BIN.fullmatch, (path.name for path in folder.iterdir())))


def open_source(folder: Path, *, rename: Renaming = AS_STORED) -> Source:
    """Describe a HuggingFace directory from headers alone; only two copies of a tied embedding are compared.

    Raises:
        Damaged: a missing shard, a broken header, an index that points outside or disagrees with the files.
        Refused: ``rename`` gives two tensors one name.
    """
    config, before = read_config(folder), stamps(folder, _WEIGHTS)
    shards = [renamed(folder, shard, rename) for shard in shards_of(folder)]
    ranked = len(shards) > 1 or any(map(_TP_BIN.fullmatch, shards[0]))
    return source_of(folder, shards, before, config, side_files(folder), "pt" if ranked else "huggingface")


def read_config(folder: Path) -> dict[str, object] | None:
    """The config.json of a directory, where there is one, with what a file beside it says of quantisation.

    Raises:
        Refused: the two do not agree on it.
    """
    path = folder / "config.json"
    config = read_json(path, what=path.name) if path.exists() else None
    for names in BESIDE:
        at = next((at for name in names if (at := folder / name).is_file()), None)
        if config is not None and at is not None:
            config = with_beside(config, read_json(at, what=at.name), str(at))
    return config


def renamed(folder: Path, shard: Shard, rename: Renaming) -> Shard:
    """A shard under its new names; two files may not come to hold one name either."""
    if not rename.rules and not rename.submodel:
        return shard
    held = [(file, name, tensor) for file, tensors in shard.items() for name, tensor in tensors.items()]
    new: Shard = {file: {} for file in shard}
    for name, (file, tensor) in rename({name: (file, tensor) for file, name, tensor in held}, folder).items():
        new[file][name] = tensor
    return new


def source_of(
    folder: Path,
    shards: list[Shard],
    before: Mapping[str, FileStamp],
    config: dict[str, object] | None,
    side: dict[str, Path],
    container: str,
) -> Source:
    """A checkpoint of HuggingFace's names.

    Args:
        folder: the directory.
        shards: one dict a tensor-parallel rank.
        before: stamps of the directory's weight files, taken before they were read.
        config: config.json; None where there is none, or another is to be used.
        side: files that travel with the model, by name.
        container: its name in reports.
    """
    files = {name: before[name] if name in before else stamp(folder / name) for shard in shards for name in shard}
    tensors = {name: at for part in shards[0].values() for name, at in part.items()} if len(shards) == 1 else {}
    stored = [at for shard in shards for part in shard.values() for at in part.values()]
    fault: DconvError | None = None
    found: list[Decoded] = []
    try:
        with closing(Reader(folder, files, _SMALL)) as reader:
            whole = [{name: at for part in shard.values() for name, at in part.items()} for shard in shards]
            found = [decode(shard, config, partial(small_values, reader)) for shard in whole]
        shards = [_decoded(shard, made) for shard, made in zip(shards, found, strict=True)]
    except DconvError as error:
        fault = error
    shapes = {name: at.spec.shape for shard in shards for part in shard.values() for name, at in part.items()}

    def locate(family: Family, facts: Facts) -> Located:
        named = _full_names(shards, family, facts)
        alone = tied.alone(folder, files, named, family.copies(facts))
        return _locate(named, family, facts, alone)

    return Source(
        format=container,
        root=folder,
        config=config,
        args=None,
        side=side,
        files=files,
        parallel=None,
        locate=locate,
        left_out=_left_out(folder, before.keys() - files.keys())
        | {name: why for made in found for name, why in made.left_out.items()},
        stored_bytes=sum(at.spec.nbytes for at in stored),
        shapes=shapes,
        tensors=tensors,
        derived={file: derived for made in found for file, derived in made.derived.items()},
        coded={name: words for made in found for name, words in made.coded.items()},
        fault=fault,
        stored=lambda: stored,
    )


def small_values(reader: Reader, stored: Stored) -> NDArray[np.generic]:
    """All elements of a stored tensor of a few numbers, in ``carrier`` of its dtype."""
    extent, out = stored.extents[0], np.empty(stored.spec.shape, carrier(stored.spec.dtype))
    reader.read_box(Copy(extent.region, extent.file, extent.offset, extent.strides, stored.spec.dtype, MOVE), out)
    return out


def _decoded(shard: Shard, made: Decoded) -> Shard:
    """The same files with the tensors that their codes make."""
    left = dict(made.tensors)
    new: Shard = {file: {name: left.pop(name) for name in part if name in left} for file, part in shard.items()}
    for name, tensor in left.items():  # under another name than any of its parts
        new[next(iter(shard))][name] = tensor
    return new


def shards_of(folder: Path) -> list[Shard]:
    """The weight files of a directory, each with its tensors; one dict, or one a tensor-parallel rank."""
    for index, single in (
        ("model.safetensors.index.json", "model.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin"),
    ):
        if (folder / index).exists():
            shard = _indexed(folder, folder / index)
            if single not in shard and (folder / single).exists():
                raise Damaged(
                    "two models in one directory, nothing was written",
                    where=str(folder),
                    expected=f"{index} with the files that it names, or {single}",
                    found=f"both, and {single} is not among those files: transformers would load it alone",
                    do="move the one that is not meant to another directory",
                )
            return [shard]
        if (folder / single).exists():
            return [{single: _read(folder / single)}]
    ranks = read_ranks(folder, _TP_BIN)
    if ranks:
        return [{file: tensors} for file, tensors in ranks]
    loose = listed(folder, "*.safetensors")
    if len(loose) == 1:
        return [{loose[0].name: _read(loose[0])}]
    if not any(entry.suffix in (".safetensors", *STATE_DICTS) for entry in folder.iterdir()):
        raise Damaged(
            "a config without weights, nothing was written",
            where=str(folder),
            expected="model.safetensors, pytorch_model.bin, or an index",
            found=", ".join(sorted(entry.name for entry in folder.iterdir())[:6]),
            do="dconv plan needs no weights;  --fake-weight makes them up",
        )
    raise Damaged(
        "no weights that can be told apart",
        where=str(folder),
        expected="model.safetensors, pytorch_model.bin, or an index",
        found=f"{len(loose)} safetensors files without an index",
        do="fetch model.safetensors.index.json, which says which files belong together",
    )


def _indexed(folder: Path, index: Path) -> Shard:
    weight_map = read_json(index, what="the index").get("weight_map")
    if not is_dict(weight_map) or not weight_map:
        raise Damaged("the index has no weight_map", where=str(index))
    wanted = list(dict.fromkeys(check_plain_name(name, said_by=index) for name in weight_map.values()))
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
    from dconv.checkpoint import state_dict  # seldom

    return state_dict.read_tensors(path)


def _left_out(folder: Path, others: Iterable[str]) -> dict[str, str]:
    code = {path.name: "code is never run nor copied" for path in listed(folder, "*.py")}
    return code | dict.fromkeys(sorted(others), "not a file of the model's weights")


def _full_names(shards: list[Shard], family: Family, facts: Facts) -> list[Shard]:
    """The same with `Family.base` where a directory of the base class leaves it out, and `Family.also` undone.

    Raises:
        Damaged: two tensors would have one name.
    """
    if not family.base and not family.also:
        return shards
    known = expected_specs(family, facts)
    there = {name for shard in shards for tensors in shard.values() for name in tensors}

    def full(name: str) -> str:
        published = family.published(name)
        if name in known:
            return name
        return next((it for it in (published, family.base + published) if it in known and it not in there), name)

    before: dict[str, str] = {}
    for name in there:
        if before.setdefault(full(name), name) != name:
            raise Damaged(
                "a tensor under two of the names that it has had, nothing was written",
                where=" and ".join(sorted((before[full(name)], name))),
                expected="one of the two",
                found=f"{full(name)} twice",
            )
    return [{file: {full(n): t for n, t in tensors.items()} for file, tensors in shard.items()} for shard in shards]


def _locate(shards: list[Shard], family: Family, facts: Facts, alone: Mapping[str, str]) -> Located:
    """See `Located`; ``alone`` are copies that stand for the tensor itself."""
    if len(shards) > 1:
        _refuse_broken(family, facts)
    specs = expected_specs(family, facts)
    twins = family.twin_names(facts)
    located = Located({}, {}, {})
    for rank, shard in enumerate(shards):
        for file, tensors in shard.items():
            for stored_name, tensor in tensors.items():
                name = alone.get(stored_name, twins.get(stored_name, stored_name))
                spec = specs.get(name)
                if spec is not None:
                    located.pieces.setdefault(name, []).append(_piece(spec, tensor, rank, len(shards)))
                elif reason := family.reason_to_leave_out(name, facts):
                    located.left_out[name] = reason
                else:
                    located.unknown[name] = file
    return located


def _refuse_broken(family: Family, facts: Facts) -> None:
    """Of fused projections a rank has no unbroken stretch, and its file does not say which rows it has.

    Raises:
        Refused: the family has some.
    """
    for entry in family.entries(facts):
        runs = [run for part in entry.fused.parts for run in part.runs]
        if entry.fused.parallel and len(entry.fused.specs) == 1 and len(runs) > 1:
            raise Refused(
                f"{family.name} has fused projections, which one file a rank does not tell apart, nothing was written",
                where=entry.fused.specs[0].name,
                expected="q, k, v, gate and up in tensors of their own",
            )


def _piece(spec: TensorSpec, tensor: Stored, rank: int, count: int) -> Piece:
    extent = tensor.extents[0]
    if spec.published == tensor.spec.shape:
        strides = _split_last(spec, extent)
        return Piece(spec.name, Region.whole(spec.shape), extent.file, extent.offset, strides, tensor.spec.dtype)
    region = cut_region(spec, tensor, rank, count, ranked=_TP_BIN.fullmatch(extent.file) is not None)
    return Piece(spec.name, region, extent.file, extent.offset, extent.strides, tensor.spec.dtype)


def _split_last(spec: TensorSpec, extent: Extent) -> Index:
    """Strides of a tensor whose last axis in the file is two axes here."""
    last = extent.strides[-1]
    return (*extent.strides[:-1], last * spec.shape[-1], last)
