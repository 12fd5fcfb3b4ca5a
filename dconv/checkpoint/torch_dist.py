"""Megatron's ``torch_dist`` container (PyTorch distributed checkpoint files), read and written without torch.

Keys are global. Uniform models stack their layers in axis 0 of one key; on reading both forms become one tensor a
layer. Source: ``megatron/core/dist_checkpointing`` and what its loader was seen to insist on (``docs/adr``).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from dconv.arch.family import Family
from dconv.arch.layouts import Facts
from dconv.checkpoint import dcp, megatron, pickling, run_config, torchframe, torchzip
from dconv.checkpoint.files import stamp
from dconv.checkpoint.rename import AS_STORED, Renaming
from dconv.checkpoint.source import Located, Source
from dconv.errors import Damaged
from dconv.sharding.plan import Target, TargetFile, TargetTensor
from dconv.sharding.region import Index, Region
from dconv.sharding.tensor import Extent, Stored, TensorSpec

_METADATA: Final = ".metadata"
_MARKER: Final = "metadata.json"
_COMMON: Final = "common.pt"
_COMMON_STATE: Final = "common_state/shard_0_1"
_STACKED: Final = re.compile(r"(decoder\.layers\.)(?!\d)(.+)")
_OPTIMIZER: Final = ("optimizer", "chained_", "opt_param_scheduler")

#: A shard's tensors go to several files so that several ranks can write one shard without contending for a file.
_FILE_BYTES: Final = 1 << 30
_SPLIT_FROM: Final = 64 << 20

#: Modules whose extra state some layer spec asks for; a missing entry is fatal for Megatron's loader, an extra one not.
_LAYER_STATES: Final = (
    "self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention",
    "self_attention.q_layernorm", "self_attention.k_layernorm", "mlp.linear_fc1", "mlp.linear_fc2",
    "input_layernorm", "pre_mlp_layernorm",
)  # fmt: skip
_MODEL_STATES: Final = ("decoder.final_layernorm", "output_layer")


def open_source(iteration: Path, *, rename: Renaming = AS_STORED) -> Source:
    """Describe a torch_dist checkpoint from its metadata; chunk places are looked up when a table asks for them.

    Raises:
        Damaged: broken metadata, or chunks whose files are missing or torn.
    """
    metadata = dcp.read_metadata(iteration / _METADATA)
    weights, left_out = _weights(metadata)
    weights = rename(weights, iteration / _METADATA)
    names = dict.fromkeys(chunk.file for tensor in weights.values() for chunk in tensor.chunks)
    files = {name: stamp(iteration / name) for name in names}  # before what they hold
    config, side = megatron.sides(iteration)

    def locate(family: Family, facts: Facts) -> Located:
        return megatron.locate(_shards(iteration, weights, int(facts["layers"])), family, facts)

    return Source(
        format="megatron torch_dist",
        root=iteration,
        config=config,
        args=_args(iteration, metadata),
        side=side,
        files=files,
        parallel=None,
        locate=locate,
        left_out=left_out,
        stored_bytes=sum(TensorSpec(k, t.shape, t.dtype).nbytes for k, t in weights.items()),
        tensor_names=tuple(weights),
    )


def _weights(metadata: dcp.DcpMetadata) -> tuple[dict[str, dcp.DcpTensor], dict[str, str]]:
    weights: dict[str, dcp.DcpTensor] = {}
    left_out: dict[str, str] = {}
    for key, tensor in metadata.tensors.items():
        if key.startswith(_OPTIMIZER):
            left_out["optimizer"] = "optimizer state is not weights"
        elif key.startswith(("rng_state", "rerun_state")):
            left_out[key.split("/")[0]] = "not weights"
        elif not megatron.is_state(key):
            weights[key] = tensor
    for key in metadata.objects:
        if key.startswith("rng_state"):
            left_out["rng_state"] = "not weights"
    return weights, left_out


def _args(iteration: Path, metadata: dcp.DcpMetadata) -> dict[str, object] | None:
    """Megatron-LM's args from the common state; Megatron-Bridge has a file of its own for them."""
    common: Any = None
    if (iteration / _COMMON).exists():
        common = torchzip.read(iteration / _COMMON).tree
    elif _COMMON_STATE in metadata.objects:
        common = dcp.read_object(iteration, metadata.objects[_COMMON_STATE])
        common = common[0] if isinstance(common, list) and common else common
    if isinstance(common, Mapping) and "args" in common:
        return megatron.plain_args(common["args"])
    return run_config.read_args(iteration / run_config.NAME)


def _shards(iteration: Path, weights: Mapping[str, dcp.DcpTensor], layers: int) -> megatron.Shards:
    shards: megatron.Shards = {}
    for key, tensor in weights.items():
        extents = [_extent(iteration, chunk, tensor.dtype) for chunk in tensor.chunks]
        stacked = _STACKED.fullmatch(key)
        if stacked is None:
            stored = Stored(TensorSpec(key, tensor.shape, tensor.dtype), tuple(extents))
            shards.setdefault(key, []).append(megatron.Shard(0, 0, stored))
            continue
        if not tensor.shape or tensor.shape[0] != layers:
            raise Damaged(
                "a stacked tensor has another number of layers than the config says",
                where=key,
                expected=str(layers),
                found=str(tensor.shape),
            )
        by_layer: list[list[Extent]] = [[] for _ in range(layers)]
        for extent in extents:
            for i in range(extent.region.shape[0]):
                by_layer[extent.region.start[0] + i].append(_one_layer(extent, i))
        for layer, held in enumerate(by_layer):
            name = f"{stacked[1]}{layer}.{stacked[2]}"
            spec = TensorSpec(name, tensor.shape[1:], tensor.dtype)
            shards.setdefault(name, []).append(megatron.Shard(0, 0, Stored(spec, tuple(held))))
    return shards


def _extent(iteration: Path, chunk: dcp.DcpChunk, dtype: str) -> Extent:
    at = dcp.locate_chunk(iteration, chunk, dtype)
    return Extent(Region(chunk.offsets, chunk.sizes), chunk.file, at.offset, at.strides)


def _one_layer(extent: Extent, i: int) -> Extent:
    region = Region(extent.region.start[1:], extent.region.shape[1:])
    return Extent(region, extent.file, extent.offset + i * extent.strides[0], extent.strides[1:])


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A chunk to be written: its key's global shape, its place there, and the tensor."""

    key: str
    shape: Index
    offsets: Index
    tensor: TargetTensor


def lay_out(model: megatron.Model) -> Target:
    """A torch_dist checkpoint to be written under ``release/``: one chunk for each layer, part and tensor shard.

    A loader reads whole chunks, so small chunks keep its memory small; gate and up are chunks of their own because
    their global tensor is [all gate | all up].
    """
    files: list[TargetFile] = []
    chunks: list[_Chunk] = []
    blobs: dict[str, tuple[str, int, int]] = {}
    stages = model.stages()
    for rank, coord in enumerate(model.parallel.coords()):
        mine = [
            chunk
            for item in stages[coord.pp]
            if not item.again and (item.entry.fused.parallel or coord.tp == 0)
            for chunk in _chunks(model, item, coord.tp)
        ]
        for number, group in enumerate(_groups(mine)):
            name = f"__{rank}_{number}.distcp"
            file, placed = _file(f"{megatron.RELEASE}/{name}", group, rank, blobs)
            files.append(file)
            chunks.extend(placed)
    objects_name = f"__{model.parallel.world}_0.distcp"
    objects_file, objects = _objects(objects_name, int(model.facts["layers"]), _common(model))
    files.append(objects_file)

    def closing() -> Iterable[tuple[str, bytes]]:
        yield from model.closing()
        yield f"{megatron.RELEASE}/{_COMMON}", dcp.object_blob(_common(model))
        yield f"{megatron.RELEASE}/{_METADATA}", dcp.dump_metadata(_tensors(chunks, blobs), objects)
        yield (
            f"{megatron.RELEASE}/{run_config.NAME}",
            run_config.dump(model.args, int(model.facts["vocab"]), model.parallel.tp),
        )
        marker = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        yield f"{megatron.RELEASE}/{_MARKER}", json.dumps(marker).encode()

    tensors = tuple(chunk.tensor for chunk in chunks)
    return Target(tuple(files), tensors, closing, model.seal, model.parallel.world, model.left_out)


def _chunks(model: megatron.Model, item: megatron.Placed, tp: int) -> Iterable[_Chunk]:
    entry = item.entry
    fused = entry.fused
    layer = entry.layer
    lead: Index = (layer,) if layer >= 0 else ()
    key = entry.row.megatron.replace(".*", "") if layer >= 0 else entry.row.megatron
    whole = fused.whole(model.padded_vocab)
    layers = (int(model.facts["layers"]),) if layer >= 0 else ()
    shape = layers + fused.shape(sum(s.stop - s.start for s in whole))
    before = 0
    for part, stretch in zip(whole, fused.shard(tp, model.parallel.tp, model.padded_vocab), strict=True):
        slots = fused.slots([stretch], (0,) * len(lead))
        sizes = (1,) * len(lead) + fused.shape(stretch.stop - stretch.start)
        spec = TensorSpec(key, sizes, model.dtype(entry))
        offsets = [*lead, *([0] * len(fused.order))]
        offsets[len(lead) + fused.axis] = before + stretch.start
        padding = math.prod(sizes) - sum(slot.region.volume for slot in slots)
        name = f"{fused.name}@{'.'.join(map(str, offsets[len(lead) :]))}"
        yield _Chunk(key, shape, tuple(offsets), TargetTensor(name, "", 0, spec, slots, padding))
        before += part.stop


def _groups(chunks: Sequence[_Chunk]) -> list[list[_Chunk]]:
    """Cut a rank's chunks, in order, into files of about equal bytes."""
    total = sum(chunk.tensor.spec.nbytes for chunk in chunks)
    count = 1 if total < _SPLIT_FROM else max(2, -(-total // _FILE_BYTES))
    groups: list[list[_Chunk]] = [[]]
    at = 0
    for chunk in chunks:
        if groups[-1] and at >= len(groups) * total / count:
            groups.append([])
        groups[-1].append(chunk)
        at += chunk.tensor.spec.nbytes
    return groups


def _file(
    path: str, group: Sequence[_Chunk], rank: int, blobs: dict[str, tuple[str, int, int]]
) -> tuple[TargetFile, list[_Chunk]]:
    """Lay out one ``.distcp`` file: one torch zip a chunk, one behind the other."""
    literals: list[tuple[int, bytes]] = []
    placed: list[_Chunk] = []
    at = 0
    for chunk in group:
        spec = chunk.tensor.spec
        frame = torchframe.frame(torchframe.tensor(spec.dtype, spec.shape, "0"), [("0", spec.nbytes)], base=at)
        literals.extend(frame.literals)
        tensor = replace(chunk.tensor, file=path, offset=frame.data["0"])
        blobs[tensor.key] = (path.rpartition("/")[2], at, frame.size)
        placed.append(replace(chunk, tensor=tensor))
        at += frame.size
    return TargetFile(path, at, tuple(literals), rank), placed


def _tensors(chunks: Iterable[_Chunk], blobs: Mapping[str, tuple[str, int, int]]) -> dict[str, dcp.DcpTensor]:
    shapes: dict[str, tuple[str, Index]] = {}
    found: dict[str, list[dcp.DcpChunk]] = {}
    for chunk in chunks:
        shapes[chunk.key] = (chunk.tensor.spec.dtype, chunk.shape)
        place = dcp.DcpChunk(chunk.offsets, chunk.tensor.spec.shape, *blobs[chunk.tensor.key])
        found.setdefault(chunk.key, []).append(place)
    return {key: dcp.DcpTensor(dtype, shape, tuple(found[key])) for key, (dtype, shape) in shapes.items()}


def _objects(name: str, layers: int, common: object) -> tuple[TargetFile, dict[str, tuple[str, int, int]]]:
    """The file of extra states and of the common state (where newer Megatron looks for it)."""
    empty = dcp.object_blob([None])
    wanted = {
        f"decoder.layers.{module}._extra_state/shard_{layer}_{layers}": empty
        for module in _LAYER_STATES
        for layer in range(layers)
    }
    wanted |= {f"{module}._extra_state/shard_0_1": empty for module in _MODEL_STATES}
    wanted[_COMMON_STATE] = dcp.object_blob([common])
    objects: dict[str, tuple[str, int, int]] = {}
    data = bytearray()
    for key, blob in wanted.items():
        objects[key] = (name, len(data), len(blob))
        data += blob
    path = f"{megatron.RELEASE}/{name}"
    return TargetFile(path, len(data), ((0, bytes(data)),), 0), objects


def _common(model: megatron.Model) -> dict[str, object]:
    args = pickling.namespace(model.args)
    return {"args": args, "checkpoint_version": 3.0, "iteration": 0, "content_metadata": {}}
