"""FORMAT ``pt``: HuggingFace's names in one plain state dict, or in one a tensor-parallel rank, config.json beside.

A rank's file has of every tensor what Megatron's rank has of it: rows, columns, or all. Where that is no unbroken
stretch (gate and up in one tensor), nobody could put the files together without being told how, so it is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from dconv.arch.family import Entry, Family
from dconv.arch.layouts import Facts
from dconv.checkpoint import huggingface, state_dict
from dconv.checkpoint.rename import AS_STORED, Renaming
from dconv.checkpoint.source import Side, Source, seal, side_bytes, side_files
from dconv.errors import Refused
from dconv.sharding.plan import Target, TargetFile, TargetTensor
from dconv.sharding.region import Region
from dconv.sharding.tensor import Slot, TensorSpec

#: The name that transformers looks for.
_WHOLE: Final = "pytorch_model.bin"


def open_source(path: Path, *, rename: Renaming = AS_STORED) -> Source:
    """Describe a state dict: a file, or the one in a directory; or a directory with one file a rank.

    Raises:
        Damaged: no such file, or one that is torn.
        Refused: ``rename`` gives two tensors one name.
    """
    if path.is_dir() and huggingface.is_ranked(path):
        return huggingface.open_source(path, rename=rename)
    found = state_dict.read(path, rename)
    folder, name = found.path.parent, found.path.name
    config, side = huggingface.read_config(folder), side_files(folder)
    return huggingface.source_of(folder, [{name: found.tensors}], {name: found.stamp}, config, side, "pt")


def lay_out(
    family: Family,
    facts: Facts,
    specs: Mapping[str, TensorSpec],
    *,
    tp: int,
    config: Mapping[str, object] | None,
    side: Side,
    left_out: dict[str, str],
) -> Target:
    """One state dict, or with ``tp`` over 1 one a rank, config.json and the side files beside.

    Args:
        family: the model's.
        facts: what config and tensors tell of the model.
        specs: the logical tensors as they are to be written.
        tp: ranks of tensor parallelism, each with a file of its own.
        config: config.json's content; None copies the one among ``side`` as it is.
        side: files that travel with the model, by name.
        left_out: stored tensors that are not written, each with the reason.

    Raises:
        Refused: a tensor that does not divide over ``tp`` ranks, or of which a rank would have no unbroken stretch.
    """
    if tp == 1:
        file, tensors = state_dict.lay_out_file(_WHOLE, [whole_tensor(spec) for spec in specs.values()])
        files = [file]
    else:
        parts = {name: regions for entry in family.entries(facts) for name, regions in cut(entry, tp)}
        files: list[TargetFile] = []
        tensors: list[TargetTensor] = []
        for rank in range(tp):
            mine = [_part(spec, parts[spec.name][rank], rank) for spec in specs.values()]
            file, placed = state_dict.lay_out_file(f"pytorch_model.tp{rank}.bin", mine, owner=rank)
            files.append(file)
            tensors += placed

    def closing() -> Iterable[tuple[str, bytes]]:
        return side_bytes(config, side)

    return Target(tuple(files), tuple(tensors), closing, seal(config, side), tp, left_out)


def whole_tensor(spec: TensorSpec, name: str = "") -> TargetTensor:
    """All of a logical tensor, written as ``name`` (its own by default); file and offset still to be filled in."""
    slot = Slot.whole(spec.name, spec.shape)
    return TargetTensor(name or spec.name, "", 0, replace(spec, name=name or spec.name), (slot,))


def _part(spec: TensorSpec, region: Region, rank: int) -> TargetTensor:
    axes = tuple(range(len(spec.shape)))
    slot = Slot(spec.name, region, (0,) * len(axes), axes)
    return TargetTensor(f"tp{rank}:{spec.name}", "", 0, replace(spec, shape=region.shape), (slot,))


def cut(entry: Entry, tp: int) -> Iterator[tuple[str, list[Region]]]:
    """Each logical tensor of an entry with the box that every rank has of it.

    Raises:
        Refused: see `lay_out`.
    """
    fused = entry.fused
    ranks = [fused.slots(fused.shard(rank, tp)) for rank in range(tp)]
    for spec in fused.specs:
        whole = Region.whole(spec.shape)
        if not fused.parallel:
            yield spec.name, [whole] * tp
            continue
        axis = fused.order[fused.axis]
        n = spec.shape[axis] // tp
        regions = [_stretch(whole, axis, rank * n, n) for rank in range(tp)]
        for region, slots in zip(regions, ranks, strict=True):
            boxes = [slot.region for slot in slots if slot.tensor == spec.name]
            if not all(map(region.contains, boxes)) or sum(box.volume for box in boxes) * tp != whole.volume:
                raise Refused(
                    f"{spec.name} does not divide over {tp} files, nothing was written",
                    where="--tp",
                    expected="one unbroken stretch for every tensor-parallel rank, all of one size",
                    found=f"what Megatron's ranks have of {fused.name}",
                    do="--tp with a divisor of the query groups; fused projections: FORMAT megatron, or no --tp",
                )
        yield spec.name, regions


def _stretch(whole: Region, axis: int, start: int, length: int) -> Region:
    starts, shape = list(whole.start), list(whole.shape)
    starts[axis], shape[axis] = start, length
    return Region(tuple(starts), tuple(shape))
