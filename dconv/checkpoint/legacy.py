"""Megatron's legacy container: one ``mp_rank_XX[_YYY[_ZZZ]]/model_optim_rng.pt`` a rank, read and written.

Source: ``megatron/training/checkpointing.py`` (file names, top-level keys), read together with ``megatron.md`` facts:
keys are local to a pipeline stage, virtual chunks are ``model0`` …, expert parallelism adds a third number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from reprlib import repr as short  # of nested hostile values too
from typing import Any, Final

from dconv.arch.family import Family
from dconv.arch.layouts import Facts
from dconv.checkpoint import megatron, pickling, torchframe, torchzip
from dconv.checkpoint.files import stamp
from dconv.checkpoint.pickled import TensorRef
from dconv.checkpoint.rename import AS_STORED, Renaming
from dconv.checkpoint.source import Located, Source
from dconv.errors import Damaged, Refused, group_names
from dconv.sharding.coords import Parallel
from dconv.sharding.plan import Target, TargetFile, TargetTensor
from dconv.sharding.region import Region
from dconv.sharding.tensor import Extent, Stored, TensorSpec

_FOLDER: Final = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_FILE: Final = "model_optim_rng.pt"
_CHUNK: Final = re.compile(r"model\d*")
#: Missing shards that are looked at for an error's text.
_NAMED: Final = 10_000
#: Modules whose (empty) extra state a strict load asks for.
_WITH_STATE: Final = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "output_layer")
_NOT_WEIGHTS: Final = ("optimizer", "opt_param_scheduler", "lr_scheduler", "rng_state", "rerun_state_machine")


def open_source(iteration: Path, *, rename: Renaming = AS_STORED) -> Source:
    """Describe the shards of one iteration from their pickles and zip directories.

    Raises:
        Damaged: a rank's file is missing, torn, or its chunks do not fit together.
        Refused: a layout that no row describes (classic models, expert shards).
    """
    folders = _folders(iteration)
    tp, pp = 1 + max(t for t, _ in folders), 1 + max(p for _, p in folders)
    if len(folders) != tp * pp:
        absent = ((t, p) for p in range(pp) for t in range(tp) if (t, p) not in folders)
        raise Damaged(
            f"{tp * pp - len(folders)} of {tp * pp} shards are missing, nothing was written",
            where=group_names(_folder_name(t, p, pp) for t, p in islice(absent, _NAMED)) + f"\nin {iteration}",
            expected=f"tensor parallel {tp} x pipeline parallel {pp}",
        )
    files = {f"{folder.name}/{_FILE}": stamp(folder / _FILE) for folder in folders.values()}  # before what they hold
    opened = {place: _open(folder) for place, folder in folders.items()}
    chunks = {place: [rename(chunk, file.path) for chunk in _chunks(file)] for place, file in opened.items()}
    parallel = _parallel(tp, pp, chunks)
    layers = parallel.chunks(sum(map(sum, parallel.stages or ())))
    shards: megatron.Shards = {}
    left_out: dict[str, str] = {}
    for (t, p), file in opened.items():
        for vp, chunk in enumerate(chunks[t, p]):
            for name, value in chunk.items():
                if isinstance(value, TensorRef) and not megatron.is_state(name):
                    at = _stored(iteration, file, value, name)
                    key = megatron.renumber(name, layers[p][vp])
                    shards.setdefault(key, []).append(megatron.Shard(t, tp, at))
        for key, value in file.tree.items():
            if key in _NOT_WEIGHTS:
                left_out[key] = "not weights"
            elif not _CHUNK.fullmatch(str(key)) and not _is_plain(value) and key != "args":
                left_out[str(key)] = "not the model"
    config, side = megatron.sides(iteration)

    def locate(family: Family, facts: Facts) -> Located:
        return megatron.locate(shards, family, facts)

    return Source(
        format="megatron legacy",
        root=iteration,
        config=config,
        args=megatron.plain_args(opened[0, 0].tree.get("args")),
        side=side,
        files=files,
        parallel=parallel,
        locate=locate,
        left_out=left_out,
        stored_bytes=sum(s.stored.spec.nbytes for held in shards.values() for s in held),
        tensor_names=tuple(shards),
    )


def _folders(iteration: Path) -> dict[tuple[int, int], Path]:
    found: dict[tuple[int, int], Path] = {}
    for path in sorted(iteration.glob("mp_rank_*")):
        match = _FOLDER.fullmatch(path.name)
        if match is None or not path.is_dir():
            continue
        if match[3] is not None:
            raise Refused(
                "expert parallel shards are not read for this family",
                where=str(path),
                expected="mp_rank_XX or mp_rank_XX_YYY",
            )
        place = int(match[1]), int(match[2] or 0)
        if place in found:
            raise Damaged("two directories of one rank", where=str(path), found=found[place].name)
        found[place] = path
    return found


def _open(folder: Path) -> torchzip.TorchFile:
    file = torchzip.read(folder / _FILE)
    if not isinstance(file.tree, dict):
        raise Damaged("not a Megatron checkpoint", where=str(folder / _FILE), found=type(file.tree).__name__)
    return file


def _chunks(file: torchzip.TorchFile) -> list[Mapping[str, Any]]:
    held = {str(key): value for key, value in file.tree.items() if _CHUNK.fullmatch(str(key))}
    names = ["model"] if "model" in held else [f"model{i}" for i in range(len(held))]
    chunks = [value for name in names if isinstance(value := held.get(name), Mapping)]
    if not chunks or len(chunks) != len(held):
        raise Damaged(
            "no model in a Megatron checkpoint",
            where=str(file.path),
            expected="model, or model0, model1 …",
            found=", ".join(map(str, file.tree))[:200],
        )
    for chunk in chunks:
        _check_chunk(file, chunk)
    if any("language_model" in chunk for chunk in chunks):
        raise Refused(
            "a classic (pre-core) Megatron model, which this version does not read",
            where=str(file.path),
            expected="decoder.layers.* names",
            found="language_model",
        )
    return chunks


def _check_chunk(file: torchzip.TorchFile, chunk: Mapping[Any, Any]) -> None:
    """Nothing may be in a state dict that would be passed over without a word.

    Raises:
        Refused: a value that is neither a tensor, nor plain, nor an extra state.
    """
    if "language_model" in chunk:
        return
    for name, value in chunk.items():
        if not isinstance(name, str):
            raise Damaged("a tensor whose name is no text", where=str(file.path), found=short(name))
        if not isinstance(value, TensorRef) and not _is_plain(value) and not megatron.is_state(name):
            raise Refused(
                "a value in the model that is no tensor, nothing was written",
                where=f"{short(name)} in {file.path}",
                expected="tensors by name",
                found=short(value),
            )


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, str | int | float)


def _parallel(tp: int, pp: int, chunks: Mapping[tuple[int, int], Sequence[Mapping[str, Any]]]) -> Parallel:
    """The pipeline layout, counted from the layers that are there: right for every way of dividing them."""
    vpp = {len(held) for held in chunks.values()}
    if len(vpp) != 1:
        raise Damaged("ranks disagree on the number of virtual pipeline chunks", found=str(sorted(vpp)))
    stages = []
    for p in range(pp):
        counts = {tuple(megatron.local_layers(chunk) for chunk in chunks[t, p]) for t in range(tp)}
        if len(counts) != 1:
            raise Damaged(
                "tensor-parallel ranks of one stage hold different layers",
                where=f"pipeline stage {p}",
                found=str(sorted(counts)),
            )
        stages.append(counts.pop())
    return Parallel(tp=tp, pp=pp, vpp=vpp.pop(), stages=tuple(stages))


def _stored(iteration: Path, file: torchzip.TorchFile, ref: TensorRef, name: str) -> Stored:
    at = file.locate(ref)
    path = file.path.relative_to(iteration).as_posix()
    spec = TensorSpec(name, at.shape, at.dtype)
    return Stored(spec, (Extent(Region.whole(at.shape), path, at.offset, at.strides),))


def _folder_name(tp: int, pp: int, pp_size: int) -> str:
    return f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if pp_size > 1 else "")


def lay_out(model: megatron.Model, *, local_spec: bool) -> Target:
    """A legacy checkpoint to be written, one file a rank under ``release/``.

    Args:
        local_spec: names of the local layer spec instead of TransformerEngine's.
    """
    files: list[TargetFile] = []
    tensors: list[TargetTensor] = []
    stages = model.stages()
    for rank, coord in enumerate(model.parallel.coords()):
        folder = _folder_name(coord.tp, coord.pp, model.parallel.pp)
        path = f"{megatron.RELEASE}/{folder}/{_FILE}"
        placed = stages[coord.pp]
        shard = [_tensor(model, item, coord.tp, folder, path, local_spec) for item in placed]
        frame = _frame(model, shard, [item.chunk for item in placed])
        files.append(TargetFile(path, frame.size, frame.literals, rank))
        tensors.extend(replace(tensor, offset=frame.data[str(i)]) for i, tensor in enumerate(shard))
    return Target(tuple(files), tuple(tensors), model.closing, model.seal, model.parallel.world, model.left_out)


def _tensor(
    model: megatron.Model, item: megatron.Placed, tp: int, folder: str, path: str, local_spec: bool
) -> TargetTensor:
    """One tensor of a rank's file, its offset still to be filled in."""
    fused = item.entry.fused
    stretches = fused.shard(tp, model.parallel.tp, model.padded_vocab)
    slots = fused.slots(stretches)
    shape = fused.shape(sum(s.stop - s.start for s in stretches))
    name = megatron.local_name(item.name) if local_spec else item.name
    spec = TensorSpec(name, shape, model.dtype(item.entry))
    padding = math.prod(shape) - sum(slot.region.volume for slot in slots)
    chunk = f"model{item.chunk}." if model.parallel.vpp > 1 else ""
    return TargetTensor(f"{folder}:{chunk}{name}", path, 0, spec, slots, padding)


def _frame(model: megatron.Model, shard: Sequence[TargetTensor], chunks: Sequence[int]) -> torchframe.Frame:
    states: list[dict[str, object]] = [{} for _ in range(model.parallel.vpp)]
    for i, (tensor, chunk) in enumerate(zip(shard, chunks, strict=True)):
        name = tensor.spec.name
        states[chunk][name] = torchframe.tensor(tensor.spec.dtype, tensor.spec.shape, str(i))
        states[chunk].update((f"{module}._extra_state", None) for module in stateful([name]))
    named = {"model": states[0]} if len(states) == 1 else {f"model{i}": state for i, state in enumerate(states)}
    tree = {"args": pickling.namespace(model.args), "checkpoint_version": 3.0, "iteration": 0, **named}
    return torchframe.frame(tree, [(str(i), tensor.spec.nbytes) for i, tensor in enumerate(shard)])


def stateful(names: Iterable[str]) -> Iterator[str]:
    """The modules among those of these weights whose (empty) extra state a strict load asks for."""
    for name in names:
        module, _, parameter = name.rpartition(".")
        if parameter == "weight" and module.rpartition(".")[2] in _WITH_STATE:
            yield module
