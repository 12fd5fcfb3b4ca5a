"""Megatron's ``torch_dist`` container (PyTorch distributed checkpoint files), read and written without torch.

Keys are global. Uniform models stack their layers in axis 0 of one key; on reading both forms become one tensor a
layer. Source: ``megatron/core/dist_checkpointing`` and what its loader was seen to insist on (``docs/adr``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from dconv.arch.family import Entry, Family
from dconv.arch.layouts import Facts, size
from dconv.checkpoint import dcp, megatron, names, pickling, run_config, stacked, torchframe, torchzip
from dconv.checkpoint.files import stamp
from dconv.checkpoint.rename import AS_STORED, Renaming
from dconv.checkpoint.shards import locate
from dconv.checkpoint.source import Located, Source
from dconv.errors import Refused
from dconv.sharding.coords import Coord
from dconv.sharding.parsed import is_list, is_mapping
from dconv.sharding.plan import Target, TargetFile, TargetTensor
from dconv.sharding.region import Index, Region
from dconv.sharding.tensor import Extent, Stored, TensorSpec

_METADATA: Final = ".metadata"
_MARKER: Final = "metadata.json"
_COMMON: Final = "common.pt"
_COMMON_STATE: Final = "common_state/shard_0_1"
#: Objects beside the model that nobody misses.
_NO_WEIGHTS: Final = ("common_state", "rerun_state")
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
    published, left_out = _weights(metadata)
    weights = rename(published, iteration / _METADATA)
    said = dict.fromkeys(chunk.file for tensor in weights.values() for chunk in tensor.chunks)
    files = {name: stamp(iteration / name) for name in said}  # before what they hold
    config, side = megatron.sides(iteration)
    args, lacks = _args(iteration, metadata)

    def lay(family: Family, facts: Facts) -> Located:
        return locate(stacked.apart(_wholes(iteration, weights), family, facts), family, facts)

    return Source(
        format="megatron torch_dist",
        root=iteration,
        config=config,
        args=args,
        side=side,
        files=files,
        parallel=None,
        locate=lay,
        left_out=left_out,
        stored_bytes=sum(TensorSpec(k, t.shape, t.dtype).nbytes for k, t in weights.items()),
        shapes={key: tensor.shape for key, tensor in weights.items()},
        lacks=lacks,
        stored=lambda: _wholes(iteration, published),
    )


def _weights(metadata: dcp.DcpMetadata) -> tuple[dict[str, dcp.DcpTensor], dict[str, str]]:
    weights: dict[str, dcp.DcpTensor] = {}
    left_out: dict[str, str] = {}
    for key, tensor in metadata.tensors.items():
        if key.startswith(_OPTIMIZER):
            left_out["optimizer"] = "optimizer state is not weights"
        elif key.startswith(("rng_state", "rerun_state")):
            left_out[key.split("/")[0]] = "not weights"
        elif not names.is_state(key):
            weights[key] = tensor
    for key in metadata.objects:
        if key.startswith("rng_state"):
            left_out["rng_state"] = "not weights"
        elif not names.is_state(key) and not key.startswith((*_OPTIMIZER, *_NO_WEIGHTS)):
            left_out[key] = "an object, no tensor"
    return weights, left_out


def _args(iteration: Path, metadata: dcp.DcpMetadata) -> tuple[dict[str, object] | None, str]:
    """Megatron-LM's args from the common state, or from Megatron-Bridge's own file; else what that lacks."""
    common: Any = None
    if (iteration / _COMMON).exists():
        common = torchzip.read(iteration / _COMMON).tree
    elif _COMMON_STATE in metadata.objects:
        common = dcp.read_object(iteration, metadata.objects[_COMMON_STATE])
        common = common[0] if is_list(common) and common else common
    if is_mapping(common) and "args" in common:
        return megatron.plain_args(common["args"]), ""
    return run_config.read_args(iteration / run_config.NAME)


def _wholes(iteration: Path, weights: Mapping[str, dcp.DcpTensor]) -> Iterable[Stored]:
    for key, tensor in weights.items():
        extents = tuple(_extent(iteration, chunk, tensor.dtype) for chunk in tensor.chunks)
        yield Stored(TensorSpec(key, tensor.shape, tensor.dtype), extents)


def _extent(iteration: Path, chunk: dcp.DcpChunk, dtype: str) -> Extent:
    at = dcp.locate_chunk(iteration, chunk, dtype)
    return Extent(Region(chunk.offsets, chunk.sizes), chunk.file, at.offset, at.strides)


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
    stages = [(one, one.stages()) for one in model.models]
    for rank, coord in enumerate(model.parallel.coords()):
        mine = [
            chunk
            for one, held in stages
            for item in held[coord.pp][coord.ep]
            if not item.again and _writes(one, item.entry, coord)
            for chunk in _chunks(one, item, coord)
        ]
        for number, group in enumerate(_groups(mine)):
            name = f"__{rank}_{number}.distcp"
            file, placed = _file(f"{megatron.RELEASE}/{name}", group, rank, blobs)
            files.append(file)
            chunks.extend(placed)
    _refuse_mixed(chunks)
    objects_name = f"__{model.parallel.world}_0.distcp"
    objects_file, objects = _objects(objects_name, model)
    files.append(objects_file)

    def closing() -> Iterable[tuple[str, bytes]]:
        yield from model.closing()
        yield f"{megatron.RELEASE}/{_COMMON}", dcp.object_blob(_common(model))
        yield f"{megatron.RELEASE}/{_METADATA}", dcp.dump_metadata(_tensors(chunks, blobs), objects)
        if not model.prefix and run_config.can_say(model.args):  # of one model alone
            said = run_config.dump(model.args, size(model.facts, "vocab"), model.parallel.tp)
            yield f"{megatron.RELEASE}/{run_config.NAME}", said
        marker = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        yield f"{megatron.RELEASE}/{_MARKER}", json.dumps(marker).encode()

    tensors = tuple(chunk.tensor for chunk in chunks)
    return Target(tuple(files), tensors, closing, model.seal, model.parallel.world, model.left_out)


def _refuse_mixed(chunks: Iterable[_Chunk]) -> None:
    """Raises Refused where layers that are stacked under one key differ in their dtype."""
    dtypes: dict[str, str] = {}
    for chunk in chunks:
        dtype = chunk.tensor.spec.dtype
        if dtypes.setdefault(chunk.key, dtype) != dtype:
            raise Refused(
                "torch_dist holds all layers of a tensor under one dtype, nothing was written",
                where=chunk.key,
                found=f"{dtypes[chunk.key]} and {dtype}",
                do="--dtype makes them one, --megatron-format legacy keeps each as it is",
            )


def _writes(model: megatron.Model, entry: Entry, coord: Coord) -> bool:
    """Whether a rank is the first of those that hold a shard."""
    parallel = model.parallel
    several = parallel.ep * parallel.etp if entry.expert >= 0 else parallel.tp
    return coord.inner < several and (model.is_cut(entry) or megatron.cut(entry, coord, parallel)[0] == 0)


def _key(model: megatron.Model, entry: Entry) -> tuple[str, Index, Index]:
    """A tensor's key, its place along the axes that stack layers and experts there, and their lengths."""
    place: list[int] = []
    lengths: list[int] = []
    key = entry.row.megatron
    number = str(entry.layer)
    if model.local_spec:  # its spelling may depend on what it is below the layer
        respelled = names.local_name if model.facts.get("mla") else names.local_key
        key = respelled(key.replace("*", "0")).replace(".layers.0.", ".layers.*.", 1)
    if entry.layer >= 0 and entry.row.stacked and model.facts.get("uniform_layers", True):
        key = key.replace(".*", "")
        place.append(entry.layer)
        lengths.append(size(model.facts, entry.row.stack))
    if entry.expert >= 0:
        place.append(entry.expert)
        lengths.append(size(model.facts, "experts"))
    return model.prefix + key.replace("*", number).replace("#", "experts"), tuple(place), tuple(lengths)


def _chunks(model: megatron.Model, item: megatron.Placed, coord: Coord) -> Iterable[_Chunk]:
    entry = item.entry
    fused = entry.fused
    key, lead, lengths = _key(model, entry)
    whole = fused.whole(model.padded_vocab)
    shape = lengths + fused.shape(sum(s.stop - s.start for s in whole))
    before, together = 0, key
    for part, stretch in zip(whole, model.shard(entry, coord), strict=True):
        if entry.row.apart:
            before, key, shape = 0, f"{together}.{entry.row.apart[part.part]}", lengths + fused.shape(part.stop)
        slots = model.slots(fused, [stretch], (0,) * len(lead))
        sizes = (1,) * len(lead) + fused.shape(stretch.stop - stretch.start)
        spec = TensorSpec(key, sizes, model.dtype(entry))
        offsets = [*lead, *([0] * len(fused.order))]
        offsets[len(lead) + fused.axis] = before + stretch.start
        padding = math.prod(sizes) - sum(slot.region.volume for slot in slots)
        name = f"{model.prefix}{fused.name}{key[len(together) :]}@{'.'.join(map(str, offsets[len(lead) :]))}"
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


def _objects(name: str, model: megatron.Model) -> tuple[TargetFile, dict[str, tuple[str, int, int]]]:
    """The file of extra states, all empty, and of the common state (where newer Megatron looks for it)."""
    empty, common = dcp.object_blob([None]), dcp.object_blob([_common(model)])
    objects: dict[str, tuple[str, int, int]] = {}
    for one in model.models:
        objects.update(dict.fromkeys(_states(one), (name, 0, len(empty))))
    objects[_COMMON_STATE] = (name, len(empty), len(common))
    path = f"{megatron.RELEASE}/{name}"
    return TargetFile(path, len(empty) + len(common), ((0, empty), (len(empty), common)), 0), objects


def _states(model: megatron.Model) -> Iterable[str]:
    """Keys of all extra states that a model of either layer spec may ask for."""
    stacks = {
        stacked.layer_prefix(row.megatron): size(model.facts, row.stack) for row in model.family.rows if row.stacked
    }
    for prefix, layers in stacks.items():
        for layer in range(layers):
            together = model.facts.get("uniform_layers", True)
            key, at = (prefix, f"{layer}_{layers}") if together else (f"{prefix}{layer}.", "0_1")
            yield from (f"{model.prefix}{key}{module}._extra_state/shard_{at}" for module in _LAYER_STATES)
    for entry in model.family.entries(model.facts):
        if entry.layer < 0 and entry.row.first_stage and ".linear_" not in entry.row.megatron:
            continue  # embeddings have none
        key, place, lengths = _key(model, entry)
        offset, shape = (".".join(map(str, axes)) for axes in (place or (0,), lengths or (1,)))
        yield f"{key.rpartition('.')[0]}._extra_state/shard_{offset}_{shape}"
    yield from (f"{model.prefix}{module}._extra_state/shard_0_1" for module in _MODEL_STATES)


def _common(model: megatron.Model) -> dict[str, object]:
    args = pickling.namespace(model.args)
    return {"args": args, "checkpoint_version": 3.0, "iteration": 0, "content_metadata": {}}
