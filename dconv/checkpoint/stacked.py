"""Tensors under Megatron's global keys, in which layers and experts are stacked: on disk (torch_dist) or in memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

from dconv.arch.family import Family
from dconv.arch.layouts import Facts, size
from dconv.checkpoint import names
from dconv.checkpoint.shards import Shard, Shards
from dconv.errors import Damaged
from dconv.sharding.region import Region
from dconv.sharding.tensor import Extent, Stored, TensorSpec

_STACKED: Final = re.compile(r"(.+?\.layers\.)(?!\d)(.+)")
_LAYERS: Final = re.compile(r"\.layers\.\*\.")
_NUMBERED: Final = re.compile(r"\.layers\.\d{1,9}\.")
#: All experts of a layer in one tensor.
_EXPERTS: Final = re.compile(r"(.+\.experts\.)experts\.(?!\d)(.+)")
#: Gate and up apart, as ``singleton_local_shards`` has them.
_HALF: Final = re.compile(r"(.+\.linear_fc1\.(?:weight|bias))_([wv])")


def apart(wholes: Iterable[Stored], family: Family, facts: Facts) -> Shards:
    """Every layer and expert of the tensors that stand under global keys, under names of their own.

    Raises:
        Damaged: a stack of another length than the config says.
    """
    layers = {_LAYERS.sub(".layers.", row.megatron): row.stack for row in family.rows if row.per_layer}
    depth = {layer_prefix(key): size(facts, stack) for key, stack in layers.items() if stack in facts}
    experts = size(facts, "experts")
    named = {f"{row.megatron}.{end}": part for row in family.rows for part, end in enumerate(row.apart)}
    shards: Shards = {}
    for whole in wholes:
        for name, stored in _one_by_one(whole, depth, experts):
            part = named.get(_NUMBERED.sub(".layers.*.", name, count=1), -1)
            if part >= 0:
                name = name.rpartition(".")[0]
            elif half := _HALF.fullmatch(name):
                name, part = half[1], "wv".index(half[2])
            shards.setdefault(name, []).append(Shard(stored, None, part))
    return shards


def layer_prefix(key: str) -> str:
    """What stands before a layer's number."""
    return key[: key.index(".layers.") + len(".layers.")]


def _one_by_one(whole: Stored, depth: Mapping[str, int], experts: int) -> Iterable[tuple[str, Stored]]:
    """A stored tensor's layers and experts, each under its own name."""
    key = whole.spec.name
    stacked = _STACKED.fullmatch(key)
    if stacked is None or stacked[1] not in depth:
        layers = [(key, whole)]
    else:
        unstacked = _unstack(whole, depth[stacked[1]], "layers")
        layers = [(f"{stacked[1]}{number}.{stacked[2]}", layer) for number, layer in enumerate(unstacked)]
    for name, layer in layers:
        if single := names.parse_single(name):
            yield names.expert(*single), layer
        elif together := _EXPERTS.fullmatch(name):
            for number, one in enumerate(_unstack(layer, experts, "experts")):
                yield names.expert(together[1], number, together[2]), one
        else:
            yield name, layer


def _unstack(whole: Stored, count: int, what: str) -> list[Stored]:
    """The slices of a stored tensor along its first axis.

    Raises:
        Damaged: there are not ``count`` of them.
    """
    spec = whole.spec
    if not spec.shape or spec.shape[0] != count:
        raise Damaged(
            f"a stacked tensor has another number of {what} than the config says",
            where=spec.name,
            expected=str(count),
            found=str(spec.shape),
        )
    held: list[list[Extent]] = [[] for _ in range(count)]
    for extent in whole.extents:
        for i in range(extent.region.shape[0]):
            held[extent.region.start[0] + i].append(_slice(extent, i))
    return [Stored(TensorSpec(spec.name, spec.shape[1:], spec.dtype), tuple(extents)) for extents in held]


def _slice(extent: Extent, i: int) -> Extent:
    region = Region(extent.region.start[1:], extent.region.shape[1:])
    return Extent(region, extent.file, extent.offset + i * extent.strides[0], extent.strides[1:])
